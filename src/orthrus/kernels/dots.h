// Products of numbers that lie side by side in the lanes of vectors: two of int16 or bfloat16, or four of int8.
//
// A block of weights is (inputs / beside, width, beside).
#pragma once

#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifdef __AVX512BF16__
#define ORTHRUS_BFLOAT16_DOTS 1
#else
#define ORTHRUS_BFLOAT16_DOTS 0
#endif

namespace orthrus {

// Vectors of columns and rows of x whose sums fit into the registers.
#ifdef __AVX512F__
constexpr int kDotVectors = 3, kDotRows = 8;
#elif defined(__AVX2__)
constexpr int kDotVectors = 2, kDotRows = 6;
#else
// Compilers take minutes over more, where an instruction here is many there.
constexpr int kDotVectors = 1, kDotRows = 2;
#endif
constexpr int64_t kDotWidth = kDotVectors * kLanes;

// The same four bytes in each lane.
inline Ints four_bytes(const void* from) { return read<int32_t>(from) - Ints{}; }

// Pairs of int8 numbers as pairs of int16, one pair a lane.
inline Ints pairs(const int8_t* from) {
#if defined(__AVX512BW__)
  return bits<Ints>(_mm512_cvtepi8_epi16(read<__m256i>(from)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return bits<Ints>(_mm256_cvtepi8_epi16(read<__m128i>(from)));
#else
  typedef int8_t Narrow __attribute__((vector_size(2 * kLanes)));
  typedef int16_t Wide __attribute__((vector_size(4 * kLanes)));
  return bits<Ints>(__builtin_convertvector(read<Narrow>(from), Wide));
#endif
}

// sum + both products of each lane's pairs of int16.
inline Ints add_pairs(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
  return bits<Ints>(_mm512_dpwssd_epi32(bits<__m512i>(sum), bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX512BW__)
  return sum + bits<Ints>(_mm512_madd_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return bits<Ints>(_mm256_dpwssd_avx_epi32(bits<__m256i>(sum), bits<__m256i>(a), bits<__m256i>(b)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  // Left to itself GCC would collect many products before it adds them, for which there are too few registers.
  Ints product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
  return sum;
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
#define ORTHRUS_FOURS 1

// sum + the four products of each lane's numbers, a without signs and b with.
inline Ints add_fours(Ints sum, Ints a, Ints b) {
#ifdef __AVX512VNNI__
  return bits<Ints>(_mm512_dpbusd_epi32(bits<__m512i>(sum), bits<__m512i>(a), bits<__m512i>(b)));
#else
  return bits<Ints>(_mm256_dpbusd_avx_epi32(bits<__m256i>(sum), bits<__m256i>(a), bits<__m256i>(b)));
#endif
}

// Weights and x in int8. The weights are kept without signs, 128 more than they are, which the sums start below zero
// for: by `kShift` times the sum of the row.
struct WholeDot {
  using X = int8_t;
  using Sums = Ints;
  static constexpr int64_t kBeside = 4, kBytes = 4;
  static constexpr uint32_t kShift = -128;
  static Ints weights(const char* from) { return read<Ints>(from); }
  static Ints add(Ints sum, Ints weights, Ints x) { return add_fours(sum, weights, x); }
};
#else
#define ORTHRUS_FOURS 0

// Weights in int8, x in int16.
struct WholeDot {
  using X = int16_t;
  using Sums = Ints;
  static constexpr int64_t kBeside = 2, kBytes = 2;
  static constexpr uint32_t kShift = 0;
  static Ints weights(const char* from) { return pairs(reinterpret_cast<const int8_t*>(from)); }
  static Ints add(Ints sum, Ints weights, Ints x) { return add_pairs(sum, weights, x); }
};
#endif

// Whether these instructions add products of bfloat16 faster than those of float32 do. On Intel's processors each takes
// two cycles, in which float32 makes twice as many products; they have AMX for bfloat16.
inline bool has_fast_bfloat16_dots() {
#if ORTHRUS_BFLOAT16_DOTS
  static const bool is_fast = !__builtin_cpu_is("intel");
  return is_fast;
#else
  return false;
#endif
}

#if ORTHRUS_BFLOAT16_DOTS
// Weights and x in bfloat16.
struct Bfloat16Dot {
  using X = c10::BFloat16;
  using Sums = Floats;
  static constexpr int64_t kBeside = 2, kBytes = 4;
  static Ints weights(const char* from) { return read<Ints>(from); }
  static Floats add(Floats sum, Ints weights, Ints x) {
    return bits<Floats>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(weights), bits<__m512bh>(x)));
  }
};
#endif

// Rows x (kM, inputs), a multiple of those side by side, times a block of weights, to sums (kM, kDotWidth).
// Sums start with those of `starts` (kM), if there are any. next: what is wanted afterwards, `share` bytes of it.
template <typename Dot, int kM, typename Sum>
void multiply_dots(
    const typename Dot::X* x, int64_t x_step, const char* weight, int64_t inputs, const Sum* starts, Sum* sums,
    const char* next, int64_t share) {
  constexpr int64_t kStep = 4 * Dot::kBeside;
  const int64_t vector = kLanes * Dot::kBytes;
  typename Dot::Sums acc[kM][kDotVectors];
  clear(acc);
  if (starts)
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 3
      for (int v = 0; v < kDotVectors; ++v) acc[m][v] += starts[m];
  const auto add = [&](const typename Dot::X* from, const char* here) {
    Ints w[kDotVectors];
    for (int v = 0; v < kDotVectors; ++v) w[v] = Dot::weights(here + v * vector);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const Ints each = four_bytes(from + m * x_step);
      for (int v = 0; v < kDotVectors; ++v) acc[m][v] = Dot::add(acc[m][v], w[v], each);
    }
  };
  const int64_t wanted = share * kStep / inputs;
  int64_t k = 0;
  for (; k + kStep <= inputs; k += kStep) {
    ask_ahead(weight, 4 * kDotVectors * vector);
    ask_for(next, wanted);
    next += wanted;
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) add(x + k + i * Dot::kBeside, weight + i * kDotVectors * vector);
    weight += 4 * kDotVectors * vector;
  }
  for (; k < inputs; k += Dot::kBeside, weight += kDotVectors * vector) add(x + k, weight);
  for (int m = 0; m < kM; ++m)
    for (int v = 0; v < kDotVectors; ++v) write(acc[m][v], sums + m * kDotWidth + v * kLanes);
}

}  // namespace orthrus
