// What a block of warp_tiles.cu has in shared memory, and a warp in registers.
//
//     WARPS, ROW_TILES    warps of a block; 16 rows times this is the slab of a warp
//     SHARED_BYTES        of shared memory, as the launch asks for

#pragma once

#include "net.cuh"
#include "operands.cuh"

constexpr int SLAB_ROWS = 16 * ROW_TILES, TILE_ROWS = SLAB_ROWS * WARPS, THREADS = 32 * WARPS;

// Shared memory ---------------------------------------------------------------------------------

// 8 more in a row of a matrix: 8 rows then lie in different banks.
DEVICE constexpr int stride(int l) { return width(l) + 8; }

// Whether f'_l must be kept until D_l comes. It need not, where the rounded H_l tells it: by its
// sign, or well enough for operands of one part.
template <int l>
DEVICE constexpr bool keeps_slopes() {
  if constexpr (l == 0 || l == L) return false;
  constexpr int f = activations[l > 0 ? l - 1 : 0];
  if constexpr (f == IDENTITY || f == RELU || f == LEAKY_RELU) return false;
  return PARTS == 2 || !Activation<f, float>::slope_from_output;
}

// f' at the 4 numbers of a C, in float32 or in 16 bits.
struct alignas(8 * PARTS) Slopes {
  unsigned words[2 * PARTS];
};
template <int l, bool kept>
struct KeptSlopes {};
template <int l>
struct KeptSlopes<l, true> {
  Slopes slopes[ROW_TILES][width(l) / 8][THREADS];
};

template <int l>
struct Rows : KeptSlopes<l, keeps_slopes<l>()> {
  alignas(16) Parts<TILE_ROWS, stride(l)> rows;  // H_l, then D_l
};
template <int l>
struct Layer : Rows<l> {
  alignas(16) Parts<width(l), stride(l - 1)> W;
  float b[width(l)];
};
template <>
struct Layer<0> : Rows<0> {};

template <int l>
struct Layers : Layers<l + 1> {
  Layer<l> layer;
};
template <>
struct Layers<L + 1> {
  alignas(16) float rows_scale[L + 1][WARPS];  // by which products are multiplied
  float W_scale[L + 1];
  float scratch[2][WARPS];
};
typedef Layers<0> Shared;
static_assert(sizeof(Shared) == SHARED_BYTES, "what the launch asks for");

template <int l>
DEVICE Layer<l>& layer(Shared& shared) {
  return static_cast<Layers<l>&>(shared).layer;
}

DEVICE float rows_scale(const Shared& shared, int l, int slab) {
  return FLOAT16 ? shared.rows_scale[l][slab] : 1;
}
DEVICE float W_scale(const Shared& shared, int l) { return FLOAT16 ? shared.W_scale[l] : 1; }

// Slabs -----------------------------------------------------------------------------------------

// As C of products: (m, j, q) is row 16 m + g, or 8 below, and column 8 j + 2t, or the next.
template <int columns>
struct Slab {
  float C[ROW_TILES][columns / 8][4];
};
DEVICE int row_of(int m, int q) { return 16 * m + lane() / 4 + q / 2 * 8; }
DEVICE int column_of(int j, int q) { return 8 * j + lane() % 4 * 2 + q % 2; }

// Rounds H_l or D_l into shared memory, as an operand of products.
template <int l>
DEVICE void stage(Shared& shared, const Slab<width(l)>& slab) {
  Scale scale = {1, 1};
  if constexpr (FLOAT16) {
    unsigned largest = 0;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int j = 0; j < width(l) / 8; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) largest = larger(largest, magnitude(slab.C[m][j][q]));
    scale = scale_of(warp_maximum(largest));
    __syncwarp();  // before D_l, every lane has read the scale of H_l: a reduction orders no memory
    if (lane() == 0) shared.rows_scale[l][warp()] = scale.back;
  }
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int j = 0; j < width(l) / 8; ++j)
#pragma unroll
      for (int below = 0; below < 4; below += 2) {
        const float* pair = &slab.C[m][j][below];
        unsigned words[PARTS];
        split(pair[0] * scale.there, pair[1] * scale.there, words);
        const int row = warp() * SLAB_ROWS + row_of(m, below);
        store(layer<l>(shared).rows, row, column_of(j, 0), words);
      }
  __syncwarp();
}
