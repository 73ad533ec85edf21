// Nets up to 128 wide on tensor cores: loss and gradient sums in one pass over X.
//
// The derivation of backprop.py, its equations (1) to (3). A block walks over tiles of rows. Each
// of its warps takes 16 ROW_TILES of them, its slab, through the whole net: the result of a product
// is in registers of the warp, and what a layer makes of it goes to shared memory, rounded, as an
// operand of the next. H_l stays there until dE/dW_{l+1} has been added; then D_l takes its place.
// Only the products D_l^T H_{l-1} of (1) sum over the slabs of all warps: every warp keeps some
// 16 x 16 blocks of each dE/dW_l in registers until the rows are at an end. Then each block writes
// one row of sums, and add_rows adds these in their order. X, y and the weights of samples are read
// once; nothing else of size n exists; no order of blocks or warps changes a bit.
//
// Operands are rounded to 16 bits, or split into two such parts (operands.cuh). No sum in a tensor
// core is longer than a row of weights or a slab; longer ones are float32 additions.
//
// Where anything comes out inf or nan, `not_finite` is set, and exact_rows, launched behind this
// kernel, makes the same rows of sums again in float32, with the infs and nans that float32 has; it
// ends at once where nothing did.
//
// BLOCKS is how many blocks a multiprocessor shall hold; the other compile-time constants are those
// of net.cuh, operands.cuh, mma.cuh and tile.cuh.

#include "exact_rows.cuh"
#include "grads.cuh"

// Layers ----------------------------------------------------------------------------------------

// H_{l-1} W_l^T; where BACK, D_l W_l.
template <int l, bool BACK>
DEVICE Slab<width(BACK ? l - 1 : l)> times_W(Shared& shared) {
  constexpr int from = BACK ? l : l - 1, to = BACK ? l - 1 : l, N = width(to) / 16;
  const auto& rows = layer<from>(shared).rows;
  const auto& W = layer<l>(shared).W;
  Block blocks[ROW_TILES][N];
#pragma unroll(3 - PARTS)
  for (int k = 0; k < width(from) / 16; ++k) {
    unsigned A[ROW_TILES][PARTS][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      load_block<false, DOWN>(A[m], rows, warp() * SLAB_ROWS + 16 * m, 16 * k);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      unsigned B[PARTS][4];
      if constexpr (BACK) {
        load_block<true, DOWN>(B, W, 16 * k, 16 * n);
      } else {
        load_block<false, ACROSS>(B, W, 16 * n, 16 * k);
      }
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) blocks[m][n].add(A[m], B);
    }
  }
  const float scale = rows_scale(shared, from, warp()) * W_scale(shared, l);
  Slab<width(to)> product;
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int j = 0; j < 2 * N; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q) product.C[m][j][q] = scale * blocks[m][j / 2].sum(j % 2, q);
  return product;
}

// f(z), for a result that is going to be rounded.
template <int id>
DEVICE float rounded_f(float z) {
  if constexpr (id == TANH && !FLOAT16) return rough_tanh(z);
  return Activation<id, float>::f(z);
}

// H_l in the place of Z_l - b_l; f'_l is kept where it must be.
template <int l>
DEVICE void activate(Shared& shared, Slab<width(l)>& Z) {
  auto& own = layer<l>(shared);
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int j = 0; j < width(l) / 8; ++j) {
      float slope[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int k = column_of(j, q);
        const float z = Z.C[m][j][q] + own.b[k];
        const float h = k < sizes[l] ? rounded_f<activations[l - 1]>(z) : 0;
        slope[q] = Activated<l>::df(z, h);
        Z.C[m][j][q] = h;
      }
      if constexpr (keeps_slopes<l>()) {
        Slopes& kept = own.slopes[m][j][threadIdx.x];
        if constexpr (PARTS == 1) {
          kept = {pack(slope[0], slope[1]), pack(slope[2], slope[3])};
        } else {
#pragma unroll
          for (int q = 0; q < 4; ++q) kept.words[q] = __float_as_uint(slope[q]);
        }
      }
    }
}

// D_l in the place of D_{l+1} W_{l+1}.
template <int l>
DEVICE void times_slopes(Shared& shared, Slab<width(l)>& D) {
  const auto& own = layer<l>(shared);
  const float scale = rows_scale(shared, l, warp());
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int j = 0; j < width(l) / 8; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        float slope;
        if constexpr (!keeps_slopes<l>()) {
          const int row = warp() * SLAB_ROWS + row_of(m, q);
          const unsigned word = load(own.rows, row, column_of(j, 0));
          const float h = scale * half_of(word, q % 2);
          slope = Activated<l>::df(h, h);
        } else if constexpr (PARTS == 1) {
          slope = half_of(own.slopes[m][j][threadIdx.x].words[q / 2], q % 2);
        } else {
          slope = __uint_as_float(own.slopes[m][j][threadIdx.x].words[q]);
        }
        D.C[m][j][q] *= slope;
      }
}

// D_L in the place of Z_L - b_L.
DEVICE void output_deltas(const Samples& samples, Shared& shared, long long first,
                          Slab<width(L)>& Z, Totals& totals) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int below = 0; below < 4; below += 2) {
      float h[OUTPUTS], slope[OUTPUTS];
#pragma unroll
      for (int i = 0; i < OUTPUTS; ++i) {
        const float z = Z.C[m][i / 2][below + i % 2] + layer<L>(shared).b[output(i)];
        h[i] = Activated<L>::f(z);
        slope[i] = Activated<L>::df(z, h[i]);
      }
      add_loss<LOSS>(samples, first + row_of(m, below), h, totals);
#pragma unroll
      for (int i = 0; i < OUTPUTS; ++i) Z.C[m][i / 2][below + i % 2] = h[i] * slope[i];
    }
}

// The kernel ------------------------------------------------------------------------------------

// Rows from n on are zero; in their place the last row is read, for nothing.
DEVICE Slab<width(0)> load_slab(const Samples& samples, long long first) {
  constexpr int d = sizes[0];
  Slab<width(0)> X = {};
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int below = 0; below < 4; below += 2) {
      const long long row = first + row_of(m, below), last = samples.n - 1;
      const float* from = samples.X + (row < last ? row : last) * d;
#pragma unroll
      for (int j = 0; j < width(0) / 8; ++j) {
        const int k = column_of(j, 0);
        float* to = &X.C[m][j][below];
        if constexpr (d % 2 == 0) {
          float2 pair = {0, 0};
          if (k < d) pair = __ldg(reinterpret_cast<const float2*>(from + k));
          to[0] = row <= last ? pair.x : 0;
          to[1] = row <= last ? pair.y : 0;
        } else {
          to[0] = k < d && row <= last ? __ldg(from + k) : 0;
          to[1] = k + 1 < d && row <= last ? __ldg(from + k + 1) : 0;
        }
      }
    }
  return X;
}

// Whether the next tile's X is on its way while gradients are added: where no other block hides the
// time that it takes, and a thread has no more than 32 numbers of it to keep.
constexpr bool LOADS_AHEAD = BLOCKS == 1 && ROW_TILES * width(0) <= 64;

// The parameters of layers l ... L into shared memory.
template <int l>
DEVICE void stage_params(Shared& shared, const Pointers& params) {
  constexpr int rows = sizes[l], columns = sizes[l - 1];
  const float *W = params.layers[l - 1].W, *b = params.layers[l - 1].b;
  auto& to = layer<l>(shared);
  Scale scale = {1, 1};
  if constexpr (FLOAT16) {
    unsigned largest = 0;
    for (int i = threadIdx.x; i < rows * columns; i += THREADS) {
      largest = larger(largest, magnitude(W[i]));
    }
    float* const of_warps = shared.rows_scale[l];  // not needed yet
    largest = warp_maximum(largest);
    if (lane() == 0) of_warps[warp()] = __uint_as_float(largest);
    __syncthreads();
    for (int k = 0; k < WARPS; ++k) largest = larger(largest, magnitude(of_warps[k]));
    scale = scale_of(largest);
  }
  if (FLOAT16 && threadIdx.x == 0) shared.W_scale[l] = scale.back;
  for (int i = 2 * threadIdx.x; i < width(l) * width(l - 1); i += 2 * THREADS) {
    const int j = i / width(l - 1), k = i % width(l - 1);
    auto number = [&](int k) {
      return j < rows && k < columns ? W[j * columns + k] * scale.there : 0;
    };
    unsigned words[PARTS];
    split(number(k), number(k + 1), words);
    store(to.W, j, k, words);
  }
  for (int j = threadIdx.x; j < width(l); j += THREADS) to.b[j] = j < rows ? b[j] : 0;
  if constexpr (l < L) stage_params<l + 1>(shared, params);
}

// Layer l forward, given H_{l-1}; the layers above it, and their gradients; then D_l, in all slabs.
template <int l>
DEVICE void pass(const Samples& samples, Shared& shared, long long first, Grads<l>& grads,
                 Totals& totals) {
  Slab<width(l)> slab = times_W<l, false>(shared);
  if constexpr (l < L) {
    activate<l>(shared, slab);
    stage<l>(shared, slab);
    pass<l + 1>(samples, shared, first, grads.above, totals);
    add_grads<l + 1>(shared, grads.above);
    __syncthreads();  // H_l may go
    slab = times_W<l + 1, true>(shared);
    times_slopes<l>(shared, slab);
  } else {
    output_deltas(samples, shared, first, slab, totals);
  }
  stage<l>(shared, slab);
  __syncthreads();  // every slab of D_l is there
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    warp_tiles(const float* X, const TARGET* y, const float* weight, long long n, Pointers params,
               float* sums, unsigned* not_finite) {
  DYNAMIC_SHARED(bytes);
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  const Samples samples = {X, y, weight, n};
  stage_params<1>(shared, params);
  __syncthreads();
  Grads<1> grads;
  Totals totals;
  const long long tiles_apart = gridDim.x;
  Slab<width(0)> slab;
  for (long long tile = blockIdx.x; tile * TILE_ROWS < n; tile += tiles_apart) {
    const long long first = tile * TILE_ROWS + warp() * SLAB_ROWS;
    if (!LOADS_AHEAD || tile == blockIdx.x) slab = load_slab(samples, first);
    stage<0>(shared, slab);
    pass<1>(samples, shared, first, grads, totals);
    if (LOADS_AHEAD) slab = load_slab(samples, first + tiles_apart * TILE_ROWS);
    add_grads<1>(shared, grads);
    __syncthreads();  // X may go
  }
  sums += static_cast<long long>(blockIdx.x) * N_SUMS;
  if (!write<1>(grads, sums)) *not_finite = 1;
  totals.loss = warp_sum(totals.loss);
  totals.weight = warp_sum(totals.weight);
  if (lane() == 0) {
    shared.scratch[0][warp()] = totals.loss;
    shared.scratch[1][warp()] = totals.weight;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    float sum = 0;
    for (int k = 0; k < WARPS; ++k) sum += shared.scratch[threadIdx.x][k];
    sums[N_PARAMS + threadIdx.x] = sum;
    if (!is_finite(sum)) *not_finite = 1;
  }
}

// Where a number of layer l or above belongs, by its column in a row of sums.
template <int l>
DEVICE float* place_of(int column, const Results& results) {
  const auto [W, b] = results.layers[l - 1];
  constexpr int first_W = place(l), first_b = first_W + sizes[l] * sizes[l - 1];
  if (column < first_b) return W + (column - first_W);
  if (column < place(l + 1)) return b + (column - first_b);
  if constexpr (l < L) {
    return place_of<l + 1>(column, results);
  } else {
    return results.loss;
  }
}

// Adds the rows of sums in float64, eight threads to a column, and clears the flag. For a mean every
// block adds up the weights as well, whose column is the last, and divides by them.
extern "C" __global__ void __launch_bounds__(256)
    add_rows(const float* sums, long long n_rows, long long mean, Results results,
             unsigned* not_finite) {
  struct Columns {
    double sums[8][32], weights[8];
  };
  SHARED_STRUCT(Columns, shared);
  const int part = warp(), column = blockIdx.x * 32 + lane();
  double sum = 0, weights = 0;
  for (long long row = part; column < N_SUMS && row < n_rows; row += 8) {
    sum += sums[row * N_SUMS + column];
  }
  for (long long row = part; mean && row < n_rows; row += 8) {
    weights += sums[row * N_SUMS + N_SUMS - 1];
  }
  shared.sums[part][lane()] = sum;
  if (lane() == 0) shared.weights[part] = weights;
  __syncthreads();
  if (part == 0 && column < N_SUMS - 1) {
    for (int k = 1; k < 8; ++k) sum += shared.sums[k][lane()];
    for (int k = 1; k < 8; ++k) weights += shared.weights[k];
    *place_of<1>(column, results) = sum / (mean ? weights : 1);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *not_finite = 0;
}
