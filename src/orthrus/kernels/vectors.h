// SIMD vectors as long as the processor's registers (GCC's vector extension), and the matrix product in float32 that
// several kernels share.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <type_traits>
#include <utility>

namespace orthrus {

// kLanes: elements of a vector. kRows x kVectors: the tile of sums that stays in registers, in rows and in vectors of
// columns. Of AVX2's 16 registers, 6 x 2 sums leave enough for weights and x.
#ifdef __AVX512F__
constexpr int kLanes = 16, kRows = 8, kVectors = 3;
#else
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
#endif
constexpr int64_t kCacheLine = 64;

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
using Floats = Vector<float>;
using Ints = Vector<int32_t>;

// The same bytes as another type.
template <typename To, typename From>
To bit_cast(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof(To));
  return out;
}

// Loads a value from memory of any alignment.
template <typename V>
V load_unaligned(const void* from) {
  V out;
  std::memcpy(&out, from, sizeof(V));
  return out;
}

// Stores a value to memory of any alignment. It is passed by value, so that an array of vectors can stay in registers.
template <typename V>
void store_unaligned(V value, void* to) {
  std::memcpy(to, &value, sizeof(V));
}

// Sets each vector to zero. If the array were filled as a whole, the compiler would keep it in memory.
template <typename V, int kM, int kV>
void clear(V (&array)[kM][kV]) {
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) array[m][v] = V{};
}

// Allocates an uninitialized array; std::make_unique would fill it with zeros.
template <typename T>
std::unique_ptr<T[]> uninitialized(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

// How many bytes ahead of the current position weights are prefetched. The hardware prefetcher stops at the end of a
// memory page.
constexpr int64_t kPrefetchDistance = 4096;

// Prefetches the `bytes` bytes that lie kPrefetchDistance after `from`.
inline void prefetch_ahead(const char* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(from + kPrefetchDistance + byte);
}

// Prefetches `bytes` bytes into the second-level cache.
inline void prefetch(const char* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(from + byte, 0, 2);
}

// A vector with `value` in each lane.
inline Floats broadcast(float value) { return value - Floats{}; }

// One vector of ours as PyTorch's vectors, which may be shorter.
struct TorchVectors {
  at::vec::Vectorized<float> part[kLanes / at::vec::Vectorized<float>::size()];
};

// exp(power), with an error of up to 20 units in the last place.
inline Floats exponential(Floats power) {
  auto parts = bit_cast<TorchVectors>(power);
  for (auto& part : parts.part) part = part.exp_u20();
  return bit_cast<Floats>(parts);
}

// a * b + c, rounded once. The fused operation is explicit, because a compiler may contract a * b + c in one function
// and not in another.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  const auto x = bit_cast<TorchVectors>(a), y = bit_cast<TorchVectors>(b), z = bit_cast<TorchVectors>(c);
  TorchVectors out;
  for (size_t i = 0; i < std::size(out.part); ++i) out.part[i] = at::vec::fmadd(x.part[i], y.part[i], z.part[i]);
  return bit_cast<Floats>(out);
}

// Loads kLanes elements as float32.
inline Floats load_floats(const float* from) { return load_unaligned<Floats>(from); }
inline Floats load_floats(const c10::BFloat16* from) {
  return bit_cast<Floats>(__builtin_convertvector(load_unaligned<Vector<uint16_t>>(from), Vector<uint32_t>) << 16);
}

// Stores kLanes elements, rounded to the type of the destination.
inline void store_floats(Floats value, float* to) { std::memcpy(to, &value, sizeof(value)); }
inline void store_floats(Floats value, c10::BFloat16* to) {
  const auto raw = bit_cast<Vector<uint32_t>>(value);
  // Rounds to nearest, ties to even. NaN stays NaN.
  auto rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
  rounded = value == value ? rounded : Vector<uint32_t>{} + 0x7fc0u;
  const auto narrow = __builtin_convertvector(rounded, Vector<uint16_t>);
  std::memcpy(to, &narrow, sizeof(narrow));
}

// sum + a * b, rounded once. With AVX2, assembly keeps all three in registers: with only 16 registers, GCC would reload
// a weight from memory for each row, and keep sums in memory.
inline Floats add_product(Floats sum, Floats a, Floats b) {
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#else
  return multiply_add(a, b, sum);
#endif
}

// Calls part(std::integral_constant<int, count>), for a count from 1 to kMax. So `count` can be a template argument.
template <int kMax, typename Part>
void with_static_count(int64_t count, const Part& part) {
  if (count == kMax)
    part(std::integral_constant<int, kMax>{});
  else if constexpr (kMax > 1)
    with_static_count<kMax - 1>(count, part);
}

// `pairs` holds two bfloat16 elements in each lane. These return the first, or the second, of each pair as float32.
inline Floats widen_first(Ints pairs) { return bit_cast<Floats>(pairs << 16); }
inline Floats widen_second(Ints pairs) { return bit_cast<Floats>(pairs & -65536); }

// Widens interleaved bfloat16 (inputs / 2, kV * kLanes, 2) to float32 (inputs, kV * kLanes).
template <int kV>
inline void widen_pairs(const c10::BFloat16* from, int64_t inputs, float* to) {
  for (int64_t k = 0; k < inputs; k += 2, from += 2 * kV * kLanes, to += 2 * kV * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      const Ints pairs = load_unaligned<Ints>(from + 2 * v * kLanes);
      store_unaligned(widen_first(pairs), to + v * kLanes);
      store_unaligned(widen_second(pairs), to + (kV + v) * kLanes);
    }
}

// sums (kM, kV * kLanes) = x (kM, inputs) times weight (inputs, kV * kLanes).
//
// Each sum adds its products in the order of the inputs. So it has the same bits whatever other rows and columns are
// computed, and inputs that are zero do not change it.
//
// kInterleaved: 1, or 2 for weights in bfloat16 (inputs / 2, kV * kLanes, 2); one load then serves two inputs.
// x_step, weight_step, sums_step: elements from one row to the next.
// next, next_step: memory that the caller reads afterwards. `next_step` bytes of it are prefetched for each input.
// accumulate: start with the values in `sums`, as if these inputs followed earlier ones.
template <int kM, int kV, int kInterleaved = 1, typename T>
void multiply(
    const float* x, int64_t x_step, const T* weight, int64_t weight_step, int64_t inputs, float* sums,
    int64_t sums_step, const char* next = nullptr, int64_t next_step = 0, bool accumulate = false) {
  Floats acc[kM][kV];
  clear(acc);
  if (accumulate)
    for (int m = 0; m < kM; ++m)
      for (int v = 0; v < kV; ++v) acc[m][v] = load_floats(sums + m * sums_step + v * kLanes);
  const auto add_one = [&](int64_t k, const Floats(&w)[kV]) {
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const Floats a = broadcast(x[m * x_step + k]);
      for (int v = 0; v < kV; ++v) acc[m][v] = add_product(acc[m][v], a, w[v]);
    }
  };
  const auto add = [&](int64_t k) {
    Floats w[kV];
    if constexpr (kInterleaved == 2) {
      const T* from = weight + k * weight_step;
      for (int v = 0; v < kV; ++v) w[v] = widen_first(load_unaligned<Ints>(from + 2 * v * kLanes));
      add_one(k, w);
      // Hides the pointer's value, so that the compiler loads the weights again. It has too few registers to keep them.
      asm("" : "+r"(from));
      for (int v = 0; v < kV; ++v) w[v] = widen_second(load_unaligned<Ints>(from + 2 * v * kLanes));
      add_one(k + 1, w);
    } else {
      for (int v = 0; v < kV; ++v) w[v] = load_floats(weight + k * weight_step + v * kLanes);
      add_one(k, w);
    }
  };
#ifdef __AVX2__
  constexpr int64_t kUnrolledInputs = 4;
#else
  constexpr int64_t kUnrolledInputs = kInterleaved;
#endif
  int64_t k = 0;
  for (; k + kUnrolledInputs <= inputs; k += kUnrolledInputs) {
    prefetch(next + k * next_step, kUnrolledInputs * next_step);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kUnrolledInputs; i += kInterleaved) add(k + i);
  }
  for (; k < inputs; k += kInterleaved) add(k);
  for (int m = 0; m < kM; ++m)
    for (int v = 0; v < kV; ++v) store_unaligned(acc[m][v], sums + m * sums_step + v * kLanes);
}

// `multiply` for a number of rows from 1 to kMaxRows that is known only at run time.
template <int kMaxRows, int kV, int kInterleaved = 1, typename T>
void multiply_rows(
    int64_t rows, const float* x, int64_t x_step, const T* weight, int64_t weight_step, int64_t inputs, float* sums,
    int64_t sums_step, const char* next = nullptr, int64_t next_step = 0, bool accumulate = false) {
  with_static_count<kMaxRows>(rows, [&](auto count) {
    multiply<decltype(count)::value, kV, kInterleaved>(
        x, x_step, weight, weight_step, inputs, sums, sums_step, next, next_step, accumulate);
  });
}

// Splits `total` items into as few parts of at most `largest` items as possible, of nearly equal size. Calls
// part(first, count) for each.
template <typename Part>
void for_each_part(int64_t total, int64_t largest, const Part& part) {
  const int64_t parts = (total + largest - 1) / largest;
  for (int64_t i = 0; i < parts; ++i) part(total * i / parts, total * (i + 1) / parts - total * i / parts);
}

}  // namespace orthrus
