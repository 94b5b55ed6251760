// The tiles of AMX in plain C++, for sanitizers and for machines without AMX. The intrinsics become
// macros of the same names.
#pragma once

#include "vector.h"

namespace naslora {
namespace {

thread_local uint32_t emulated_tiles[8][16][16];
thread_local uint8_t emulated_config[64];

inline void emulated_product(int c, int a, int b) {
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j) {
        const uint32_t x = emulated_tiles[a][i][k], y = emulated_tiles[b][k][j];
        float sum = float_of(emulated_tiles[c][i][j]);
        sum += float_of(x << 16) * float_of(y << 16);
        sum += float_of(x & 0xffff0000u) * float_of(y & 0xffff0000u);
        emulated_tiles[c][i][j] = bits_of(sum);
      }
}

}  // namespace
}  // namespace naslora

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(t, from, bytes) \
  for (int i = 0; i < 16; ++i) memcpy(emulated_tiles[t][i], (const char*)(from) + i * (bytes), 64)
#define _tile_stored(t, to, bytes) \
  for (int i = 0; i < 16; ++i) memcpy((char*)(to) + i * (bytes), emulated_tiles[t][i], 64)
#define _tile_zero(t) memset(emulated_tiles[t], 0, sizeof emulated_tiles[t])
#define _tile_dpbf16ps(c, a, b) emulated_product(c, a, b)
#define _tile_loadconfig(config) memcpy(emulated_config, config, 64)
#define _tile_storeconfig(config) memcpy(config, emulated_config, 64)
