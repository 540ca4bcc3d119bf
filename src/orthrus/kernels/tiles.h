// Matrix products in bfloat16 and int8 with AMX. One tile register holds the sums of up to 16 rows and 16 columns.
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

// Rows of a tile register, and bytes of each; columns of a block of weights (two registers); most rows of x that are
// multiplied at once (two registers).
constexpr int64_t kTileRows = 16, kTileBytes = 64, kTileColumns = 32, kMaxTileRows = 2 * kTileRows;

// Whether this processor has AMX and the kernel was compiled for it. The first call asks the operating system for
// permission to use AMX.
inline bool has_tiles() {
#if ORTHRUS_TILES
  static const bool found = at::cpu::init_amx();
  return found;
#else
  return false;
#endif
}

#if ORTHRUS_TILES

// Configures this thread's tile registers for products of `rows` rows, until it is destroyed.
class TileConfig {
 public:
  explicit TileConfig(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int64_t first = std::min(rows, kTileRows), second = rows - first;
    // Registers 0 and 1 hold the sums of the first rows, 2 and 3 those of the others, 4 and 5 their x, 6 and 7 weights.
    const int64_t register_rows[] = {first, first, second, second, first, second, kTileRows, kTileRows};
    for (int i = 0; i < 8; ++i)
      if (register_rows[i] > 0) config.rows[i] = static_cast<uint8_t>(register_rows[i]), config.bytes[i] = kTileBytes;
    // The compiler does not know that _tile_loadconfig reads this memory.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileConfig() { _tile_release(); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;
};

// sums (rows, kTileColumns) = x (rows, inputs) times a block of weights (inputs / v, kTileColumns, v).
//
// The number of rows is that of this thread's TileConfig. kTwoRowTiles: there are more than kTileRows of them.
// x_bytes: bytes from one row of x to the next. steps: a row of x has steps * kTileBytes bytes.
template <typename T, bool kTwoRowTiles>
void multiply_tiles(const char* x, int64_t x_bytes, const char* weight, int64_t steps, void* sums) {
  constexpr int64_t kWeightBytes = kTileColumns * 4, kStep = kTileRows * kWeightBytes;
  // The compiler does not know that tile loads read memory, nor that tile stores write it.
  asm volatile("" : : : "memory");
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwoRowTiles) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const char* here = weight + step * kStep;
    prefetch_ahead(here, kStep);
    _tile_loadd(4, x + step * kTileBytes, x_bytes);
    _tile_loadd(6, here, kWeightBytes);
    _tile_loadd(7, here + kTileBytes, kWeightBytes);
    if constexpr (kTwoRowTiles) _tile_loadd(5, x + kTileRows * x_bytes + step * kTileBytes, x_bytes);
    if constexpr (std::is_same_v<T, int8_t>) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if constexpr (kTwoRowTiles) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwoRowTiles) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  char* to = static_cast<char*>(sums);
  _tile_stored(0, to, kWeightBytes);
  _tile_stored(1, to + kTileBytes, kWeightBytes);
  if constexpr (kTwoRowTiles) {
    _tile_stored(2, to + kTileRows * kWeightBytes, kWeightBytes);
    _tile_stored(3, to + kTileRows * kWeightBytes + kTileBytes, kWeightBytes);
  }
  asm volatile("" : : : "memory");
}

#endif

}  // namespace orthrus
