// Products of rows of int8 and weights of four bits, summed in whole numbers by groups.
//
// A block of weights is, for each group of inputs, the steps and least values of its columns in float16 and bytes
// (4, width, 4): input 4 t + i of the group in the lower half of byte (t, column, i), input 16 + 4 t + i in the upper one.
#pragma once

#include <c10/util/Half.h>

#include "dots.h"
#include "rounding.h"
#include "vectors.h"

namespace orthrus {

// As many rows as for dots, but each has sums of a group beside those of all of them.
constexpr int kGroupVectors = std::min(kDotVectors, 2), kGroupRows = kDotRows;
constexpr int64_t kGroupWidth = kGroupVectors * kLanes;
constexpr int64_t kGroupBytes = kGroupWidth * (2 * 2 + kGroup / 2);

// Sums, lane by lane, of a group's products of four weights of four bits and four numbers of int8.
#if !ORTHRUS_FOURS && (defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__)))
// Two products make 3810 at most: those of a group's eight quarters fit into int16.
typedef int16_t GroupSums __attribute__((vector_size(4 * kLanes)));
inline Ints total(GroupSums sums) { return add_pairs(Ints{}, bits<Ints>(sums), Ints{} + 0x00010001); }

inline GroupSums add_fours(GroupSums sums, Ints weights, Ints x) {
#ifdef __AVX512BW__
  sums += bits<GroupSums>(_mm512_maddubs_epi16(bits<__m512i>(weights), bits<__m512i>(x)));
#else
  sums += bits<GroupSums>(_mm256_maddubs_epi16(bits<__m256i>(weights), bits<__m256i>(x)));
#endif
  // GCC would collect all of a group's products first, for which there are too few registers.
  asm("" : "+v"(sums));
  return sums;
}
#else
using GroupSums = Ints;
inline Ints total(GroupSums sums) { return sums; }

#if !ORTHRUS_FOURS
inline Ints add_fours(Ints sums, Ints weights, Ints x) {
  for (int byte = 0; byte < 4; ++byte) sums += (weights >> (8 * byte) & 255) * (x << (24 - 8 * byte) >> 24);
  return sums;
}
#endif
#endif

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

// Rows from `row` on times a block of weights of four bits, to sums (kM, kGroupWidth); each in the order of groups.
// next: what is wanted afterwards, `share` bytes of it.
template <int kM>
void multiply_groups(
    const GroupedRows& rows, int64_t row, const char* weight, int64_t inputs, float* sums, const char* next,
    int64_t share) {
  const int8_t* x = rows.x.get() + row * inputs;
  const int64_t groups = inputs / kGroup;
  const float *scales = rows.scales.get() + row * groups, *totals = rows.sums.get() + row * groups;
  Floats acc[kM][kGroupVectors];
  clear(acc);
  const int64_t wanted = share / groups;
  for (int64_t g = 0; g < groups; ++g, weight += kGroupBytes, next += wanted) {
    ask_ahead(weight, kGroupBytes);
    ask_for(next, wanted);
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
