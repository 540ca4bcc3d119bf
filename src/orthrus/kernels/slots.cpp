// Moves the slots of an accepted path of a tree to the end of the request's history, in all stores (the keys and the
// values of each layer) of a pool. One call does it for all stores: each move is a few hundred bytes, so the number of
// calls determines the time.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>

namespace {

// The elements of one slot in one head: `size` contiguous pieces of `bytes` bytes each, `step` bytes apart.
struct Slot {
  char* start;
  int64_t size, bytes, step;

  void copy_from(const Slot& from) const {
    for (int64_t i = 0; i < size; ++i) std::memcpy(start + i * step, from.start + i * step, bytes);
  }
};

// The operator `move_slots`: copies slot from[i] of each store to slot to[i], for one i after another. stores:
// (1, heads, slots, size), or transposed in pages, (1, heads, pages, size, slots of a page).
void move_slots(at::TensorList stores, at::IntArrayRef from, at::IntArrayRef to) {
  TORCH_CHECK(from.size() == to.size(), "move_slots: as many slots to move as places");
  for (const at::Tensor& store : stores) {
    const bool transposed = store.dim() == 5;
    TORCH_CHECK(
        (store.dim() == 4 || transposed) && store.size(0) == 1 && store.stride(-1) == 1 && store.device().is_cpu(),
        "move_slots: (1, heads, slots, size) or (1, heads, pages, size, slots of a page) only");
    const int64_t page = transposed ? store.size(4) : 1, num_slots = store.size(2) * page;
    for (size_t i = 0; i < from.size(); ++i)
      TORCH_CHECK(
          0 <= from[i] && from[i] < num_slots && 0 <= to[i] && to[i] < num_slots,
          "move_slots: slots that the store does not have");
    const int64_t element_bytes = store.element_size();
    char* head = static_cast<char*>(store.data_ptr());
    for (int64_t h = 0; h < store.size(1); ++h, head += store.stride(1) * element_bytes) {
      const auto slot = [&](int64_t number) {
        char* start = head + (number / page * store.stride(2) + number % page) * element_bytes;
        if (transposed) return Slot{start, store.size(3), element_bytes, store.stride(3) * element_bytes};
        return Slot{start, 1, store.size(3) * element_bytes, 0};
      };
      for (size_t i = 0; i < from.size(); ++i)
        if (from[i] != to[i]) slot(to[i]).copy_from(slot(from[i]));
    }
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("move_slots(Tensor(a!)[] stores, int[] sources, int[] targets) -> ()");
}

TORCH_LIBRARY_IMPL(orthrus, CPU, library) { library.impl("move_slots", &move_slots); }
