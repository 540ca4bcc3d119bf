// An accepted path of a tree gathered behind its request's history, in all stores of a pool at once: a few hundred
// bytes each, so that what counts is the number of calls.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>

namespace {

// stores: (1, heads, slots, size). Slot from[i] moves to to[i], one after another.
void move_slots(at::TensorList stores, at::IntArrayRef from, at::IntArrayRef to) {
  TORCH_CHECK(from.size() == to.size(), "move_slots: as many slots to move as places");
  for (const at::Tensor& store : stores) {
    TORCH_CHECK(
        store.dim() == 4 && store.size(0) == 1 && store.stride(3) == 1 && store.device().is_cpu(),
        "move_slots: (1, heads, slots, size) only");
    for (size_t i = 0; i < from.size(); ++i)
      TORCH_CHECK(
          0 <= from[i] && from[i] < store.size(2) && 0 <= to[i] && to[i] < store.size(2),
          "move_slots: slots that the store does not have");
    const int64_t item = store.element_size(), bytes = store.size(3) * item, step = store.stride(2) * item;
    char* head = static_cast<char*>(store.data_ptr());
    for (int64_t h = 0; h < store.size(1); ++h, head += store.stride(1) * item)
      for (size_t i = 0; i < from.size(); ++i)
        if (from[i] != to[i]) std::memcpy(head + to[i] * step, head + from[i] * step, bytes);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("move_slots(Tensor(a!)[] stores, int[] sources, int[] targets) -> ()");
}

TORCH_LIBRARY_IMPL(orthrus, CPU, library) { library.impl("move_slots", &move_slots); }
