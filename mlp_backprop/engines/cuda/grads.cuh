// What every warp of warp_tiles.cu keeps of the gradients: equations (1) and (2), tile by tile.

#pragma once

#include "tile.cuh"

// The blocks of dE/dW_l that a warp has: the warps stand in a grid over them, which leaves each as
// few as can be, then as few to load.
struct Share {
  int across;         // warps side by side
  int rows, columns;  // in blocks, of a warp
};
DEVICE constexpr Share share(int l) {
  Share best = {};
  for (int down = 1, least = 1 << 30; down <= WARPS; down *= 2) {
    const int across = WARPS / down;
    const int rows = (width(l) / 16 + down - 1) / down;
    const int columns = (width(l - 1) / 16 + across - 1) / across;
    const int cost = 64 * rows * columns + rows + columns;
    if (cost < least) best = {across, rows, columns}, least = cost;
  }
  return best;
}

template <int l>
struct Grads {
  static constexpr Share share = ::share(l);
  float W[share.rows][2 * share.columns][4] = {}, b[share.rows][2] = {};
  Grads<l + 1> above;

  // The first block of the warp.
  static DEVICE int row() { return warp() / share.across * share.rows; }
  static DEVICE int column() { return warp() % share.across * share.columns; }

  // Whether it has as many: the last warps may not.
  static DEVICE bool has_row(int m) {
    constexpr int all = width(l) / 16;
    return WARPS / share.across * share.rows == all || row() + m < all;
  }
  static DEVICE bool has_column(int n) {
    constexpr int all = width(l - 1) / 16;
    return share.across * share.columns == all || column() + n < all;
  }
};
template <>
struct Grads<L + 1> {};

// Equations (1) and (2) over the rows of the tile, slab by slab.
template <int l>
DEVICE void add_grads(Shared& shared, Grads<l>& grads) {
  using G = Grads<l>;
  const auto& D = layer<l>(shared).rows;
  const auto& H = layer<l - 1>(shared).rows;
  const unsigned ones = pack(1, 1);
#pragma unroll 1
  for (int slab = 0; slab < WARPS; ++slab) {
    const float D_scale = rows_scale(shared, l, slab);
    const float scale = D_scale * rows_scale(shared, l - 1, slab);
    unsigned A[ROW_TILES][G::share.rows][PARTS][4];
#pragma unroll
    for (int m = 0; m < G::share.rows; ++m) {
      if (!G::has_row(m)) continue;
#pragma unroll
      for (int k = 0; k < ROW_TILES; ++k) {
        load_block<true, ACROSS>(A[k][m], D, slab * SLAB_ROWS + 16 * k, 16 * (G::row() + m));
      }
    }
#pragma unroll
    for (int n = 0; n < G::share.columns; ++n) {
      if (!G::has_column(n)) continue;
      Block blocks[G::share.rows];
#pragma unroll
      for (int k = 0; k < ROW_TILES; ++k) {
        unsigned B[PARTS][4];
        load_block<true, DOWN>(B, H, slab * SLAB_ROWS + 16 * k, 16 * (G::column() + n));
#pragma unroll
        for (int m = 0; m < G::share.rows; ++m) {
          if (G::has_row(m)) blocks[m].add(A[k][m], B, k == 0);
        }
      }
#pragma unroll
      for (int m = 0; m < G::share.rows; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int q = 0; q < 4; ++q) grads.W[m][2 * n + j][q] += scale * blocks[m].sum(j, q);
    }
    if (G::column() > 0) continue;
#pragma unroll
    for (int m = 0; m < G::share.rows; ++m) {
      if (!G::has_row(m)) continue;
      float sum[4] = {};
#pragma unroll
      for (int k = 0; k < ROW_TILES; ++k)
#pragma unroll
        for (int p = PARTS - 1; p >= 0; --p) multiply_add(sum, A[k][m][p], ones, ones);
      grads.b[m][0] += D_scale * sum[0];
      grads.b[m][1] += D_scale * sum[2];
    }
  }
}

// Writes the sums of layers l ... L; tells whether all are finite.
template <int l>
DEVICE bool write(const Grads<l>& grads, float* sums) {
  constexpr int rows = sizes[l], columns = sizes[l - 1];
  float *W = sums + place(l), *b = W + rows * columns;
  bool all_finite = true;
#pragma unroll
  for (int m = 0; m < Grads<l>::share.rows; ++m)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int row = 16 * grads.row() + row_of(m, q);
      if (row >= rows) continue;
#pragma unroll
      for (int j = 0; j < 2 * Grads<l>::share.columns; ++j) {
        const int column = 16 * grads.column() + column_of(j, q);
        if (column >= columns) continue;
        W[row * columns + column] = grads.W[m][j][q];
        all_finite &= is_finite(grads.W[m][j][q]);
      }
      // Every lane of the four has the sum.
      if (grads.column() == 0 && q % 2 == 0 && lane() % 4 == 0) b[row] = grads.b[m][q / 2];
    }
  if constexpr (l < L) all_finite &= write<l + 1>(grads.above, sums);
  return all_finite;
}
