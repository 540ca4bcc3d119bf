// Matrix products with instructions that multiply and add several interleaved inputs per 32-bit lane: two of int16 or
// bfloat16, or four of int8.
//
// A block of weights is (inputs / v, kDotWidth, v), where v inputs of a column are interleaved.
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

// The tile of sums that fits into the registers: rows of x, and vectors of columns.
#ifdef __AVX512F__
constexpr int kDotVectors = 3, kDotRows = 8;
#elif defined(__AVX2__)
constexpr int kDotVectors = 2, kDotRows = 6;
#else
// Without vector instructions each operation becomes many, and larger tiles take minutes to compile.
constexpr int kDotVectors = 1, kDotRows = 2;
#endif
constexpr int64_t kDotWidth = kDotVectors * kLanes;

// A vector with the same four bytes in each lane.
inline Ints broadcast_four_bytes(const void* from) { return load_unaligned<int32_t>(from) - Ints{}; }

// Loads pairs of int8 and widens them to pairs of int16, one pair per lane.
inline Ints load_int16_pairs(const int8_t* from) {
#if defined(__AVX512BW__)
  return bit_cast<Ints>(_mm512_cvtepi8_epi16(load_unaligned<__m256i>(from)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return bit_cast<Ints>(_mm256_cvtepi8_epi16(load_unaligned<__m128i>(from)));
#else
  typedef int8_t Narrow __attribute__((vector_size(2 * kLanes)));
  typedef int16_t Wide __attribute__((vector_size(4 * kLanes)));
  return bit_cast<Ints>(__builtin_convertvector(load_unaligned<Narrow>(from), Wide));
#endif
}

// In each lane: sum + a[0] * b[0] + a[1] * b[1], where a and b are pairs of int16.
inline Ints add_pairs(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
  return bit_cast<Ints>(_mm512_dpwssd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX512BW__)
  return sum + bit_cast<Ints>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return bit_cast<Ints>(_mm256_dpwssd_avx_epi32(bit_cast<__m256i>(sum), bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  // With intrinsics, GCC would compute many products before it adds them, and run out of registers.
  Ints product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
  return sum;
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
#define ORTHRUS_VNNI 1

// In each lane: sum + the products of four uint8 of a and four int8 of b.
inline Ints add_fours(Ints sum, Ints a, Ints b) {
#ifdef __AVX512VNNI__
  return bit_cast<Ints>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#else
  return bit_cast<Ints>(_mm256_dpbusd_avx_epi32(bit_cast<__m256i>(sum), bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#endif
}

// Weights and x in int8. The instruction needs unsigned weights, so they are stored with 128 added. To correct for
// that, a row's sums start at `kRowSumFactor` times the sum of the row's elements.
struct Int8Dot {
  using X = int8_t;
  using Sums = Ints;
  static constexpr int64_t kInterleaved = 4, kBytesPerLane = 4;
  static constexpr uint32_t kRowSumFactor = -128;
  static Ints weights(const char* from) { return load_unaligned<Ints>(from); }
  static Ints add(Ints sum, Ints weights, Ints x) { return add_fours(sum, weights, x); }
};
#else
#define ORTHRUS_VNNI 0

// Weights in int8, x in int16.
struct Int8Dot {
  using X = int16_t;
  using Sums = Ints;
  static constexpr int64_t kInterleaved = 2, kBytesPerLane = 2;
  static constexpr uint32_t kRowSumFactor = 0;
  static Ints weights(const char* from) { return load_int16_pairs(reinterpret_cast<const int8_t*>(from)); }
  static Ints add(Ints sum, Ints weights, Ints x) { return add_pairs(sum, weights, x); }
};
#endif

// Whether the vector instruction for bfloat16 is faster than float32. It is not on Intel's processors: it takes two
// cycles, in which float32 instructions make twice as many products. For bfloat16, those processors have AMX.
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
  static constexpr int64_t kInterleaved = 2, kBytesPerLane = 4;
  static Ints weights(const char* from) { return load_unaligned<Ints>(from); }
  static Floats add(Floats sum, Ints weights, Ints x) {
    return bit_cast<Floats>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(weights), bit_cast<__m512bh>(x)));
  }
};
#endif

// sums (kM, kDotWidth) = x (kM, inputs) times a block of weights. `inputs` is a multiple of Dot::kInterleaved.
//
// x_step: elements from one row of x to the next. initial_sums: a start value for each row's sums, or null.
// next, next_bytes: memory that the caller reads afterwards; it is prefetched meanwhile.
template <typename Dot, int kM, typename Sum>
void multiply_dots(
    const typename Dot::X* x, int64_t x_step, const char* weight, int64_t inputs, const Sum* initial_sums, Sum* sums,
    const char* next, int64_t next_bytes) {
  constexpr int64_t kUnrolledInputs = 4 * Dot::kInterleaved;
  const int64_t vector_bytes = kLanes * Dot::kBytesPerLane;
  typename Dot::Sums acc[kM][kDotVectors];
  clear(acc);
  if (initial_sums)
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 3
      for (int v = 0; v < kDotVectors; ++v) acc[m][v] += initial_sums[m];
  const auto add = [&](const typename Dot::X* from, const char* weights_here) {
    Ints w[kDotVectors];
    for (int v = 0; v < kDotVectors; ++v) w[v] = Dot::weights(weights_here + v * vector_bytes);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const Ints x_lanes = broadcast_four_bytes(from + m * x_step);
      for (int v = 0; v < kDotVectors; ++v) acc[m][v] = Dot::add(acc[m][v], w[v], x_lanes);
    }
  };
  const int64_t prefetch_bytes = next_bytes * kUnrolledInputs / inputs;
  int64_t k = 0;
  for (; k + kUnrolledInputs <= inputs; k += kUnrolledInputs) {
    prefetch_ahead(weight, 4 * kDotVectors * vector_bytes);
    prefetch(next, prefetch_bytes);
    next += prefetch_bytes;
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) add(x + k + i * Dot::kInterleaved, weight + i * kDotVectors * vector_bytes);
    weight += 4 * kDotVectors * vector_bytes;
  }
  for (; k < inputs; k += Dot::kInterleaved, weight += kDotVectors * vector_bytes) add(x + k, weight);
  for (int m = 0; m < kM; ++m)
    for (int v = 0; v < kDotVectors; ++v) store_unaligned(acc[m][v], sums + m * kDotWidth + v * kLanes);
}

}  // namespace orthrus
