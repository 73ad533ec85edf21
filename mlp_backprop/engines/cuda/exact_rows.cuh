// The sums of warp_tiles.cu in float32 arithmetic, for when its operands would not do: the same
// rows of sums, with the infs and nans that float32 has. Simple, and as slow as that.

#pragma once

#include "net.cuh"

constexpr int EXACT_ROWS = 8;  // at a time: as many as a warp's add_loss takes

// H_l and D_l of these rows, in shared memory; f'_l stands in the place of D_l until it comes.
template <int l>
struct ExactLayer {
  float H[EXACT_ROWS][sizes[l]], D[EXACT_ROWS][sizes[l]];
  ExactLayer<l + 1> above;
};
template <>
struct ExactLayer<L + 1> {};

template <int l>
DEVICE void exact_pass(const Samples& samples, const Pointers& params, ExactLayer<l - 1>& below,
                       long long first, int n_rows, float* sums, Totals& totals) {
  constexpr int d = sizes[l], d_below = sizes[l - 1];
  const auto [W, b] = params.layers[l - 1];
  auto& layer = below.above;
  for (int i = threadIdx.x; i < n_rows * d; i += blockDim.x) {
    const int row = i / d, j = i % d;
    float z = 0;
#pragma unroll 4
    for (int k = 0; k < d_below; ++k) z = fmaf(below.H[row][k], W[j * d_below + k], z);
    z += b[j];
    layer.H[row][j] = Activated<l>::f(z);
    layer.D[row][j] = Activated<l>::df(z, layer.H[row][j]);
  }
  __syncthreads();
  if constexpr (l < L) {
    exact_pass<l + 1>(samples, params, layer, first, n_rows, sums, totals);
    const float* W_above = params.layers[l].W;
    for (int i = threadIdx.x; i < n_rows * d; i += blockDim.x) {
      const int row = i / d, j = i % d;
      float g = 0;
#pragma unroll 4
      for (int k = 0; k < sizes[l + 1]; ++k) g = fmaf(layer.above.D[row][k], W_above[k * d + j], g);
      layer.D[row][j] *= g;
    }
  } else if (warp() == 0) {
    const int row = lane() / 4;
    const bool inside = row < n_rows;
    float h[OUTPUTS];
    for (int i = 0; i < OUTPUTS; ++i) h[i] = inside && is_output(i) ? layer.H[row][output(i)] : 0;
    add_loss<LOSS>(samples, inside ? first + row : samples.n, h, totals);
    for (int i = 0; i < OUTPUTS; ++i) {
      if (inside && is_output(i)) layer.D[row][output(i)] *= h[i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < d * (d_below + 1); i += blockDim.x) {
    const bool is_W = i < d * d_below;
    const int j = is_W ? i / d_below : i - d * d_below, k = i % d_below;
    float sum = 0;
#pragma unroll 4
    for (int row = 0; row < n_rows; ++row) {
      sum = fmaf(layer.D[row][j], is_W ? below.H[row][k] : 1, sum);
    }
    sums[place(l) + i] += sum;
  }
}

// As many blocks as have written rows of sums, and as much shared memory as ExactLayer<0> takes.
extern "C" __global__ void __launch_bounds__(256, 2)
    exact_rows(const float* X, const TARGET* y, const float* weight, long long n, Pointers params,
               float* sums, const unsigned* not_finite) {
  if (*not_finite == 0) return;
  DYNAMIC_SHARED(bytes);
  ExactLayer<0>& input = *reinterpret_cast<ExactLayer<0>*>(bytes);
  const Samples samples = {X, y, weight, n};
  constexpr int d = sizes[0];
  sums += static_cast<long long>(blockIdx.x) * N_SUMS;
  for (int i = threadIdx.x; i < N_PARAMS; i += blockDim.x) sums[i] = 0;
  Totals totals;
  for (long long block = blockIdx.x; block * EXACT_ROWS < n; block += gridDim.x) {
    const long long first = block * EXACT_ROWS;
    const int n_rows = n - first < EXACT_ROWS ? int(n - first) : EXACT_ROWS;
    __syncthreads();
    for (int i = threadIdx.x; i < n_rows * d; i += blockDim.x) {
      input.H[i / d][i % d] = X[first * d + i];
    }
    __syncthreads();
    exact_pass<1>(samples, params, input, first, n_rows, sums, totals);
  }
  totals.loss = warp_sum(totals.loss);
  totals.weight = warp_sum(totals.weight);
  if (threadIdx.x == 0) {
    sums[N_PARAMS] = totals.loss;
    sums[N_PARAMS + 1] = totals.weight;
  }
}
