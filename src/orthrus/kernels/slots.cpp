// An accepted path of a tree gathered behind the history, in all stores of a slot cache at once: a few hundred bytes
// each, so that what counts is the number of calls.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>

namespace {

// stores: (batch, heads, slots, size). Slot slots[i] of a row moves to start + i; they ascend, so none is overwritten
// before it has been read.
void move_slots(at::TensorList stores, int64_t row, int64_t start, at::IntArrayRef slots) {
  for (size_t i = 0; i < slots.size(); ++i)
    TORCH_CHECK(
        slots[i] >= start + static_cast<int64_t>(i) && (i == 0 || slots[i] > slots[i - 1]),
        "move_slots: slots must ascend from where they go");
  for (const at::Tensor& store : stores) {
    TORCH_CHECK(
        store.dim() == 4 && store.stride(3) == 1 && 0 <= row && row < store.size(0) && start >= 0 &&
            (slots.empty() || slots.back() < store.size(2)),
        "move_slots: slots that the store does not have");
    const int64_t item = store.element_size(), bytes = store.size(3) * item;
    char* from = static_cast<char*>(store.data_ptr()) + row * store.stride(0) * item;
    for (int64_t head = 0; head < store.size(1); ++head, from += store.stride(1) * item)
      for (size_t i = 0; i < slots.size(); ++i) {
        const int64_t to = start + static_cast<int64_t>(i);
        if (slots[i] != to)
          std::memcpy(from + to * store.stride(2) * item, from + slots[i] * store.stride(2) * item, bytes);
      }
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("move_slots(Tensor(a!)[] stores, int row, int start, int[] slots) -> ()");
}

TORCH_LIBRARY_IMPL(orthrus, CPU, library) { library.impl("move_slots", &move_slots); }
