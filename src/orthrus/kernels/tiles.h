// Products of bfloat16 and int8 numbers by AMX: sums of 16 columns and up to 16 rows in one register.
#pragma once

#include <ATen/cpu/Utils.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vectors.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include <immintrin.h>
#define ORTHRUS_TILES 1
#else
#define ORTHRUS_TILES 0
#endif

namespace orthrus {

// A register's rows and the bytes of one; columns of a block of weights, rows that are multiplied at once.
constexpr int64_t kTileRows = 16, kTileBytes = 64, kTileColumns = 32, kTileMostRows = 2 * kTileRows;

// Whether this processor has AMX, and the system lets us use it; asks for that.
inline bool has_tiles() {
#if ORTHRUS_TILES
  static const bool found = at::cpu::init_amx();
  return found;
#else
  return false;
#endif
}

#if ORTHRUS_TILES

// Sets the registers of this thread up for products of `rows` rows, as long as it lives.
class Tiles {
 public:
  explicit Tiles(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } set;
    const int64_t first = std::min(rows, kTileRows), second = rows - first;
    // Sums 0 and 1 of the first rows, 2 and 3 of the second; their x, 4 and 5; weights 6 and 7.
    const int64_t rows_of[] = {first, first, second, second, first, second, kTileRows, kTileRows};
    for (int i = 0; i < 8; ++i)
      if (rows_of[i] > 0) set.rows[i] = static_cast<uint8_t>(rows_of[i]), set.bytes[i] = kTileBytes;
    // Compilers do not see what these instructions read.
    asm volatile("" : : "r"(&set) : "memory");
    _tile_loadconfig(&set);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Rows of x, `x_bytes` apart, times a block of weights (inputs / v, kTileColumns, v), to sums (rows, kTileColumns).
// As many rows as the registers have been set up for: more than kTileRows if `two`. x: `steps` * kTileBytes a row.
template <typename T, bool two>
void multiply_tiles(const char* x, int64_t x_bytes, const char* weight, int64_t steps, void* sums) {
  constexpr int64_t kWeightBytes = kTileColumns * 4, kStep = kTileRows * kWeightBytes;
  asm volatile("" : : : "memory");
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const char* here = weight + step * kStep;
    ask_ahead(here, kStep);
    _tile_loadd(4, x + step * kTileBytes, x_bytes);
    _tile_loadd(6, here, kWeightBytes);
    _tile_loadd(7, here + kTileBytes, kWeightBytes);
    if constexpr (two) _tile_loadd(5, x + kTileRows * x_bytes + step * kTileBytes, x_bytes);
    if constexpr (std::is_same_v<T, int8_t>) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if constexpr (two) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (two) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  char* to = static_cast<char*>(sums);
  _tile_stored(0, to, kWeightBytes);
  _tile_stored(1, to + kTileBytes, kWeightBytes);
  if constexpr (two) {
    _tile_stored(2, to + kTileRows * kWeightBytes, kWeightBytes);
    _tile_stored(3, to + kTileRows * kWeightBytes + kTileBytes, kWeightBytes);
  }
  asm volatile("" : : : "memory");
}

#endif

}  // namespace orthrus
