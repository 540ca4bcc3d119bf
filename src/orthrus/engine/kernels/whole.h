// Products of whole numbers, summed as such: rows of int16 by weights of int8, rows of int8 by weights of four bits.
//
// A block of int8 weights is (inputs / 2, width, 2). One of four bits is, for each group of inputs, the steps and
// least values of its columns in float16 and bytes (4, width, 4): input 4 t + i of the group in the lower half of
// byte (t, column, i), input 16 + 4 t + i in the upper one.
#pragma once

#include <c10/util/Half.h>

#include "rounding.h"
#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace orthrus {

// Vectors of columns and rows of x whose sums fit into the registers.
#ifdef __AVX512F__
constexpr int kPairVectors = 3, kPairRows = 8, kGroupVectors = 2, kGroupRows = 8;
#elif defined(__AVX2__)
constexpr int kPairVectors = 2, kPairRows = 6, kGroupVectors = 2, kGroupRows = 6;
#else
// Compilers take minutes over more, where an instruction here is many there.
constexpr int kPairVectors = 1, kPairRows = 2, kGroupVectors = 1, kGroupRows = 2;
#endif
constexpr int64_t kPairWidth = kPairVectors * kLanes, kGroupWidth = kGroupVectors * kLanes;
constexpr int64_t kGroupBytes = kGroupWidth * (2 * 2 + kGroup / 2);

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
  sum += bits<Ints>(_mm256_madd_epi16(bits<__m256i>(a), bits<__m256i>(b)));
  // GCC would collect many products before it adds them, for which there are too few registers.
  asm("" : "+v"(sum));
  return sum;
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Sums, lane by lane, of a group's products of four weights of four bits and four numbers of int8.
#if !defined(__AVX512VNNI__) && (defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)))
// Two products make 3810 at most: those of a group's eight quarters fit into int16.
typedef int16_t GroupSums __attribute__((vector_size(4 * kLanes)));
inline Ints total(GroupSums sums) { return add_pairs(Ints{}, bits<Ints>(sums), Ints{} + 0x00010001); }
#else
using GroupSums = Ints;
inline Ints total(GroupSums sums) { return sums; }
#endif

inline GroupSums add_fours(GroupSums sums, Ints weights, Ints x) {
#if defined(__AVX512VNNI__)
  return bits<Ints>(_mm512_dpbusd_epi32(bits<__m512i>(sums), bits<__m512i>(weights), bits<__m512i>(x)));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return bits<Ints>(_mm256_dpbusd_avx_epi32(bits<__m256i>(sums), bits<__m256i>(weights), bits<__m256i>(x)));
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#ifdef __AVX512BW__
  sums += bits<GroupSums>(_mm512_maddubs_epi16(bits<__m512i>(weights), bits<__m512i>(x)));
#else
  sums += bits<GroupSums>(_mm256_maddubs_epi16(bits<__m256i>(weights), bits<__m256i>(x)));
#endif
  // GCC would collect all of a group's products first, for which there are too few registers.
  asm("" : "+v"(sums));
  return sums;
#else
  for (int byte = 0; byte < 4; ++byte) sums += (weights >> (8 * byte) & 255) * (x << (24 - 8 * byte) >> 24);
  return sums;
#endif
}

inline Floats floats(const c10::Half* from) {
#if defined(__AVX512F__)
  return bits<Floats>(_mm512_cvtph_ps(read<__m256i>(from)));
#elif defined(__F16C__)
  return bits<Floats>(_mm256_cvtph_ps(read<__m128i>(from)));
#else
  Floats out;
  for (int i = 0; i < kLanes; ++i) out[i] = from[i];
  return out;
#endif
}

// Rows x (kM, inputs), an even number of them, times a block of int8 weights, to sums (kM, kPairWidth).
template <int kM>
void multiply_pairs(const int16_t* x, int64_t x_step, const char* weight, int64_t inputs, int32_t* sums) {
  Ints acc[kM][kPairVectors];
  clear(acc);
  const auto add = [&](int64_t k) {
    const char* here = weight + k * kPairWidth;
    Ints w[kPairVectors];
    for (int v = 0; v < kPairVectors; ++v) w[v] = pairs(reinterpret_cast<const int8_t*>(here) + 2 * v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const Ints pair = four_bytes(x + m * x_step + k);
      for (int v = 0; v < kPairVectors; ++v) acc[m][v] = add_pairs(acc[m][v], w[v], pair);
    }
  };
  int64_t k = 0;
  for (; k + 8 <= inputs; k += 8) {
    ask_ahead(weight + k * kPairWidth, 8 * kPairWidth);
#pragma GCC unroll 4
    for (int64_t i = 0; i < 8; i += 2) add(k + i);
  }
  for (; k < inputs; k += 2) add(k);
  for (int m = 0; m < kM; ++m)
    for (int v = 0; v < kPairVectors; ++v) write(acc[m][v], sums + m * kPairWidth + v * kLanes);
}

// Rows from `row` on times a block of weights of four bits, to sums (kM, kGroupWidth); each in the order of groups.
template <int kM>
void multiply_groups(const GroupedRows& rows, int64_t row, const char* weight, int64_t inputs, float* sums) {
  const int8_t* x = rows.x.get() + row * inputs;
  const int64_t groups = inputs / kGroup;
  const float *scales = rows.scales.get() + row * groups, *totals = rows.sums.get() + row * groups;
  Floats acc[kM][kGroupVectors];
  clear(acc);
  for (int64_t g = 0; g < groups; ++g, weight += kGroupBytes) {
    ask_ahead(weight, kGroupBytes);
    const auto* steps = reinterpret_cast<const c10::Half*>(weight);
    const c10::Half* least = steps + kGroupWidth;
    const char* packed = weight + 4 * kGroupWidth;
    GroupSums found[kM][kGroupVectors];
    clear(found);
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      Ints both[kGroupVectors];
      for (int v = 0; v < kGroupVectors; ++v) both[v] = read<Ints>(packed + 4 * (t * kGroupWidth + v * kLanes));
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Ints w[kGroupVectors];
        for (int v = 0; v < kGroupVectors; ++v) w[v] = (half ? both[v] >> 4 : both[v]) & 0x0f0f0f0f;
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          const Ints four = four_bytes(x + m * inputs + g * kGroup + 16 * half + 4 * t);
          for (int v = 0; v < kGroupVectors; ++v) found[m][v] = add_fours(found[m][v], w[v], four);
        }
      }
    }
    for (int v = 0; v < kGroupVectors; ++v) {
      const Floats step = floats(steps + v * kLanes), low = floats(least + v * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const Floats sum = __builtin_convertvector(total(found[m][v]), Floats);
        acc[m][v] = multiply_add(sum, step * scales[m * groups + g], acc[m][v]);
        acc[m][v] = multiply_add(low, all(totals[m * groups + g]), acc[m][v]);
      }
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int v = 0; v < kGroupVectors; ++v) write(acc[m][v], sums + m * kGroupWidth + v * kLanes);
}

}  // namespace orthrus
