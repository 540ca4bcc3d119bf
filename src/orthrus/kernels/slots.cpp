// An accepted path of a tree gathered behind its request's history, in all stores of a pool at once: a few hundred
// bytes each, so that what counts is the number of calls.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>

namespace {

// The numbers of one slot: `size` runs of `bytes`, `step` bytes apart.
struct Slot {
  char* start;
  int64_t size, bytes, step;

  void take(const Slot& from) const {
    for (int64_t i = 0; i < size; ++i) std::memcpy(start + i * step, from.start + i * step, bytes);
  }
};

// stores: (1, heads, slots, size), or (1, heads, pages, size, slots of a page). Slot from[i] moves to to[i], one after
// another.
void move_slots(at::TensorList stores, at::IntArrayRef from, at::IntArrayRef to) {
  TORCH_CHECK(from.size() == to.size(), "move_slots: as many slots to move as places");
  for (const at::Tensor& store : stores) {
    const bool turned = store.dim() == 5;
    TORCH_CHECK(
        (store.dim() == 4 || turned) && store.size(0) == 1 && store.stride(-1) == 1 && store.device().is_cpu(),
        "move_slots: (1, heads, slots, size) or (1, heads, pages, size, slots of a page) only");
    const int64_t page = turned ? store.size(4) : 1, num_slots = store.size(2) * page;
    for (size_t i = 0; i < from.size(); ++i)
      TORCH_CHECK(
          0 <= from[i] && from[i] < num_slots && 0 <= to[i] && to[i] < num_slots,
          "move_slots: slots that the store does not have");
    const int64_t item = store.element_size();
    char* head = static_cast<char*>(store.data_ptr());
    for (int64_t h = 0; h < store.size(1); ++h, head += store.stride(1) * item) {
      const auto slot = [&](int64_t number) {
        char* start = head + (number / page * store.stride(2) + number % page) * item;
        if (turned) return Slot{start, store.size(3), item, store.stride(3) * item};
        return Slot{start, 1, store.size(3) * item, 0};
      };
      for (size_t i = 0; i < from.size(); ++i)
        if (from[i] != to[i]) slot(to[i]).take(slot(from[i]));
    }
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("move_slots(Tensor(a!)[] stores, int[] sources, int[] targets) -> ()");
}

TORCH_LIBRARY_IMPL(orthrus, CPU, library) { library.impl("move_slots", &move_slots); }
