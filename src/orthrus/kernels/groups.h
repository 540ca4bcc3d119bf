// Matrix products of int8 rows and 4-bit weights. The products of a group of 32 inputs are summed in integers.
//
// In a group, weight = minimum + step * q, with q from 0 to 15. A block of weights stores for each group of inputs:
//   steps   (kGroupWidth) float16
//   minima  (kGroupWidth) float16
//   q       (4, kGroupWidth, 4) bytes; byte (t, column, i) holds input 4 t + i of the group in its lower four bits, and
//           input 16 + 4 t + i in its upper four bits
#pragma once

#include <c10/util/Half.h>

#include "dots.h"
#include "rounding.h"
#include "vectors.h"

namespace orthrus {

// Fewer vectors than in dots.h, because each row has sums of the current group in addition to its total sums.
constexpr int kGroupVectors = std::min(kDotVectors, 2), kGroupRows = kDotRows;
constexpr int64_t kGroupWidth = kGroupVectors * kLanes;
constexpr int64_t kGroupBytes = kGroupWidth * (2 * 2 + kGroupSize / 2);

// GroupSums: the sums of one group. add_fours adds, in each lane, the products of four weights (bytes from 0 to 15) and
// four int8 elements of x. widen_sums returns int32 sums.
#if !ORTHRUS_VNNI && (defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__)))
// Two products sum to at most 2 * 15 * 127 = 3810 in magnitude, so an int16 holds the eight such sums of a group.
typedef int16_t GroupSums __attribute__((vector_size(4 * kLanes)));
inline Ints widen_sums(GroupSums sums) { return add_pairs(Ints{}, bit_cast<Ints>(sums), Ints{} + 0x00010001); }

inline GroupSums add_fours(GroupSums sums, Ints weights, Ints x) {
#ifdef __AVX512BW__
  sums += bit_cast<GroupSums>(_mm512_maddubs_epi16(bit_cast<__m512i>(weights), bit_cast<__m512i>(x)));
#else
  sums += bit_cast<GroupSums>(_mm256_maddubs_epi16(bit_cast<__m256i>(weights), bit_cast<__m256i>(x)));
#endif
  // Without this barrier, GCC would compute all products of a group before it adds them, and run out of registers.
  asm("" : "+v"(sums));
  return sums;
}
#else
using GroupSums = Ints;
inline Ints widen_sums(GroupSums sums) { return sums; }

#if !ORTHRUS_VNNI
inline Ints add_fours(Ints sums, Ints weights, Ints x) {
  for (int byte = 0; byte < 4; ++byte) sums += (weights >> (8 * byte) & 255) * (x << (24 - 8 * byte) >> 24);
  return sums;
}
#endif
#endif

// Loads kLanes float16 elements as float32.
inline Floats load_floats(const c10::Half* from) {
#if defined(__AVX512F__)
  return bit_cast<Floats>(_mm512_cvtph_ps(load_unaligned<__m256i>(from)));
#elif defined(__F16C__)
  return bit_cast<Floats>(_mm256_cvtph_ps(load_unaligned<__m128i>(from)));
#else
  Floats out;
  for (int i = 0; i < kLanes; ++i) out[i] = from[i];
  return out;
#endif
}

// sums (kM, kGroupWidth) = rows [row, row + kM) times a block of 4-bit weights. Each sum adds its groups in order.
//
// For one group: sum(x * weight) = scale of x * step * sum(integers of x * q) + minimum * sum(x).
// next, next_bytes: memory that the caller reads afterwards; it is prefetched meanwhile.
template <int kM>
void multiply_groups(
    const GroupQuantisedRows& rows, int64_t row, const char* weight, int64_t inputs, float* sums, const char* next,
    int64_t next_bytes) {
  const int8_t* x = rows.x.get() + row * inputs;
  const int64_t groups = inputs / kGroupSize;
  const float *scales = rows.scales.get() + row * groups, *row_sums = rows.sums.get() + row * groups;
  Floats acc[kM][kGroupVectors];
  clear(acc);
  const int64_t prefetch_bytes = next_bytes / groups;
  for (int64_t g = 0; g < groups; ++g, weight += kGroupBytes, next += prefetch_bytes) {
    prefetch_ahead(weight, kGroupBytes);
    prefetch(next, prefetch_bytes);
    const auto* steps = reinterpret_cast<const c10::Half*>(weight);
    const c10::Half* minima = steps + kGroupWidth;
    const char* packed = weight + 4 * kGroupWidth;
    GroupSums group_sums[kM][kGroupVectors];
    clear(group_sums);
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      Ints packed_lanes[kGroupVectors];
      for (int v = 0; v < kGroupVectors; ++v)
        packed_lanes[v] = load_unaligned<Ints>(packed + 4 * (t * kGroupWidth + v * kLanes));
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Ints w[kGroupVectors];
        for (int v = 0; v < kGroupVectors; ++v) w[v] = (half ? packed_lanes[v] >> 4 : packed_lanes[v]) & 0x0f0f0f0f;
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          const Ints x_lanes = broadcast_four_bytes(x + m * inputs + g * kGroupSize + 16 * half + 4 * t);
          for (int v = 0; v < kGroupVectors; ++v) group_sums[m][v] = add_fours(group_sums[m][v], w[v], x_lanes);
        }
      }
    }
    for (int v = 0; v < kGroupVectors; ++v) {
      const Floats step = load_floats(steps + v * kLanes), minimum = load_floats(minima + v * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const Floats sum = __builtin_convertvector(widen_sums(group_sums[m][v]), Floats);
        acc[m][v] = multiply_add(sum, step * scales[m * groups + g], acc[m][v]);
        acc[m][v] = multiply_add(minimum, broadcast(row_sums[m * groups + g]), acc[m][v]);
      }
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int v = 0; v < kGroupVectors; ++v) store_unaligned(acc[m][v], sums + m * kGroupWidth + v * kLanes);
}

}  // namespace orthrus
