// Vectors of the compiler's own, as long as the processor's, and the product that all kernels are made of.
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

// Numbers of a vector; rows and vectors of columns whose sums stay in the registers. Of 16 registers 6 by 2
// leave enough for weights and x.
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

template <typename To, typename From>
To bits(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof(To));
  return out;
}

template <typename V>
V read(const void* from) {
  V out;
  std::memcpy(&out, from, sizeof(V));
  return out;
}

// By value, so that an array of vectors can stay in registers.
template <typename V>
void write(V value, void* to) {
  std::memcpy(to, &value, sizeof(V));
}

// Zeros, one by one: an array that is filled at once is taken for memory.
template <typename V, int kM, int kV>
void clear(V (&array)[kM][kV]) {
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < kV; ++v) array[m][v] = V{};
}

// Memory for numbers, not filled with anything.
template <typename T>
std::unique_ptr<T[]> room(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

// Bytes of weights that are asked for ahead: a processor does not look beyond a page by itself.
constexpr int64_t kAhead = 4096;

inline void ask_ahead(const char* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(from + kAhead + byte);
}

// Brings what is wanted soon into the second cache.
inline void ask_for(const char* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(from + byte, 0, 2);
}

inline Floats all(float value) { return value - Floats{}; }

// The same numbers as vectors of PyTorch's.
struct Parts {
  at::vec::Vectorized<float> part[kLanes / at::vec::Vectorized<float>::size()];
};

// e to the power of numbers, to 20 units in the last place.
inline Floats exponential(Floats power) {
  auto parts = bits<Parts>(power);
  for (auto& part : parts.part) part = part.exp_u20();
  return bits<Floats>(parts);
}

// A product and a sum, rounded once: written out, since a compiler may do it in one function and not in the next.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  const auto x = bits<Parts>(a), y = bits<Parts>(b), z = bits<Parts>(c);
  Parts out;
  for (size_t i = 0; i < std::size(out.part); ++i) out.part[i] = at::vec::fmadd(x.part[i], y.part[i], z.part[i]);
  return bits<Floats>(out);
}

inline Floats floats(const float* from) { return read<Floats>(from); }
inline Floats floats(const c10::BFloat16* from) {
  return bits<Floats>(__builtin_convertvector(read<Vector<uint16_t>>(from), Vector<uint32_t>) << 16);
}

inline void store(Floats value, float* to) { std::memcpy(to, &value, sizeof(value)); }
inline void store(Floats value, c10::BFloat16* to) {
  const auto raw = bits<Vector<uint32_t>>(value);
  // To the nearest, ties to even; what is no number stays none.
  auto rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
  rounded = value == value ? rounded : Vector<uint32_t>{} + 0x7fc0u;
  const auto narrow = __builtin_convertvector(rounded, Vector<uint16_t>);
  std::memcpy(to, &narrow, sizeof(narrow));
}

// sum + a * b, rounded once, with all three in registers. Of 16 registers GCC makes poor use: it would read a weight
// from memory again for each row, and keep sums there.
inline Floats add_product(Floats sum, Floats a, Floats b) {
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#else
  return multiply_add(a, b, sum);
#endif
}

// Calls part with a number of rows from 1 to kMost that the compiler knows.
template <int kMost, typename Part>
void with_known(int64_t rows, const Part& part) {
  if (rows == kMost)
    part(std::integral_constant<int, kMost>{});
  else if constexpr (kMost > 1)
    with_known<kMost - 1>(rows, part);
}

// Pairs of bfloat16 numbers, one pair a lane: the first and the second of each, widened.
inline Floats first_of(Ints pairs) { return bits<Floats>(pairs << 16); }
inline Floats second_of(Ints pairs) { return bits<Floats>(pairs & -65536); }

// Pairs of bfloat16 (inputs / 2, kV vectors of numbers, 2), widened to (inputs, kV vectors of numbers).
template <int kV>
inline void widen_pairs(const c10::BFloat16* from, int64_t inputs, float* to) {
  for (int64_t k = 0; k < inputs; k += 2, from += 2 * kV * kLanes, to += 2 * kV * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      const Ints pairs = read<Ints>(from + 2 * v * kLanes);
      write(first_of(pairs), to + v * kLanes);
      write(second_of(pairs), to + (kV + v) * kLanes);
    }
}

// Rows x (kM, inputs) times weight (inputs, kV vectors of numbers), each sum in the order of the inputs: it is
// the same to the last bit whatever rows and columns are beside it, and a zero in x changes nothing.
// kBeside 2: weights are bfloat16 (inputs / 2, kV vectors of numbers, 2), which one read widens for two inputs.
// Rows of x, weight and sums lie `x_step`, `weight_step` and `sums_step` numbers apart. onward: the sums go on
// from what `sums` holds, as if these inputs followed the earlier ones. next: what is wanted afterwards,
// `next_step` bytes an input.
template <int kM, int kV, int kBeside = 1, typename T>
void multiply(
    const float* x, int64_t x_step, const T* weight, int64_t weight_step, int64_t inputs, float* sums,
    int64_t sums_step, const char* next = nullptr, int64_t next_step = 0, bool onward = false) {
  Floats acc[kM][kV];
  clear(acc);
  if (onward)
    for (int m = 0; m < kM; ++m)
      for (int v = 0; v < kV; ++v) acc[m][v] = floats(sums + m * sums_step + v * kLanes);
  const auto add_one = [&](int64_t k, const Floats(&w)[kV]) {
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const Floats a = all(x[m * x_step + k]);
      for (int v = 0; v < kV; ++v) acc[m][v] = add_product(acc[m][v], a, w[v]);
    }
  };
  const auto add = [&](int64_t k) {
    Floats w[kV];
    if constexpr (kBeside == 2) {
      const T* from = weight + k * weight_step;
      for (int v = 0; v < kV; ++v) w[v] = first_of(read<Ints>(from + 2 * v * kLanes));
      add_one(k, w);
      // A pointer that compilers know nothing of: they would keep what was read, for which there are no registers.
      asm("" : "+r"(from));
      for (int v = 0; v < kV; ++v) w[v] = second_of(read<Ints>(from + 2 * v * kLanes));
      add_one(k + 1, w);
    } else {
      for (int v = 0; v < kV; ++v) w[v] = floats(weight + k * weight_step + v * kLanes);
      add_one(k, w);
    }
  };
#ifdef __AVX2__
  constexpr int64_t kSteps = 4;
#else
  constexpr int64_t kSteps = kBeside;
#endif
  int64_t k = 0;
  for (; k + kSteps <= inputs; k += kSteps) {
    ask_for(next + k * next_step, kSteps * next_step);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kSteps; i += kBeside) add(k + i);
  }
  for (; k < inputs; k += kBeside) add(k);
  for (int m = 0; m < kM; ++m)
    for (int v = 0; v < kV; ++v) write(acc[m][v], sums + m * sums_step + v * kLanes);
}

// The same for any number of rows up to kMost.
template <int kMost, int kV, int kBeside = 1, typename T>
void multiply_rows(
    int64_t rows, const float* x, int64_t x_step, const T* weight, int64_t weight_step, int64_t inputs, float* sums,
    int64_t sums_step, const char* next = nullptr, int64_t next_step = 0, bool onward = false) {
  with_known<kMost>(rows, [&](auto known) {
    multiply<decltype(known)::value, kV, kBeside>(
        x, x_step, weight, weight_step, inputs, sums, sums_step, next, next_step, onward);
  });
}

// Calls part(first, count) for parts of `num` that are as alike as can be, none larger than `most`.
template <typename Part>
void evenly(int64_t num, int64_t most, const Part& part) {
  const int64_t parts = (num + most - 1) / most;
  for (int64_t i = 0; i < parts; ++i) part(num * i / parts, num * (i + 1) / parts - num * i / parts);
}

}  // namespace orthrus
