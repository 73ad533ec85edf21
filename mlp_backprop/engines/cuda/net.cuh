// The net and its samples, as the kernels of warp_tiles.cu know them at compile time:
//
//     SIZES, ACTIVATIONS    those of layers.cuh
//     LOSS                  an id of formulas.cuh
//     TARGET                type of y: float, (n, d_L); or of labels, int or long long, (n,)
//
// Sums are laid out as the parameters are, W_1, b_1, W_2, ...; then the loss, then the weights.

#pragma once

#include "layers.cuh"

constexpr int N_SUMS = N_PARAMS + 2;

// d_l in whole 16 x 16 tiles. The padding is zero throughout.
DEVICE constexpr int width(int l) { return (sizes[l] + 15) / 16 * 16; }

struct Samples {
  const float* X;
  const TARGET* y;
  const float* weight;  // or null: all 1
  long long n;
};

// Of the samples that a thread has seen.
struct Totals {
  float loss = 0, weight = 0;
};

DEVICE int lane() { return threadIdx.x % 32; }
DEVICE int warp() { return threadIdx.x / 32; }

DEVICE unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

// |x| as bits, which are ordered as the numbers are; inf and nan come last.
DEVICE unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }
DEVICE bool is_finite(float x) { return magnitude(x) < 0x7f800000; }

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) x += __shfl_xor_sync(~0u, x, bit);
  return x;
}

// Over four neighbouring lanes.
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
DEVICE float quad_maximum(float x) {
  x = maximum(x, __shfl_xor_sync(~0u, x, 1));
  return maximum(x, __shfl_xor_sync(~0u, x, 2));
}

DEVICE float target(const float* y, long long row, int k) { return y[row * sizes[L] + k]; }
template <class Label>
DEVICE float target(const Label* labels, long long row, int k) {
  return class_weight<float>(labels[row], k, sizes[L]);
}

// A row of outputs, as four lanes share a row of a product (mma.cuh): the lane's number i is output
constexpr int OUTPUTS = width(L) / 4;
DEVICE int output(int i) { return i / 2 * 8 + lane() % 4 * 2 + i % 2; }
DEVICE bool is_output(int i) { return output(i) < sizes[L]; }

// Adds a sample's loss, given H_L; each h becomes dE/dh: 0 in the padding, and from row n on.
template <int loss>
DEVICE void add_loss(const Samples& samples, long long row, float (&h)[OUTPUTS], Totals& totals) {
  const bool inside = row < samples.n;
  const float weight = inside && samples.weight ? __ldg(samples.weight + row) : 1;
  float y[OUTPUTS], value = 0;
#pragma unroll
  for (int i = 0; i < OUTPUTS; ++i) {
    y[i] = inside && is_output(i) ? target(samples.y, row, output(i)) : 0;
  }
  if constexpr (loss == SOFTMAX_CROSS_ENTROPY) {
    float m = __uint_as_float(0xff800000), total = 0, y_sum = 0;  // -inf
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) {
      if (is_output(i)) m = maximum(m, h[i]);
    }
    m = quad_maximum(m);
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) {
      if (is_output(i)) total += exp(h[i] - m);
      y_sum += y[i];
    }
    total = quad_sum(total);
    y_sum = quad_sum(y_sum);
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) {
      if (is_output(i)) value += SoftmaxCrossEntropy::value(h[i], y[i], m, total);
      h[i] = SoftmaxCrossEntropy::grad(h[i], y[i], m, total, y_sum);
    }
  } else {
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) {
      float G = 0;
      if (is_output(i)) value += Loss<loss, float>::value_and_grad(h[i], y[i], G);
      h[i] = G;
    }
  }
#pragma unroll
  for (int i = 0; i < OUTPUTS; ++i) h[i] = inside && is_output(i) ? weight * h[i] : 0;
  if (inside) totals.loss += weight * value;
  if (inside && lane() % 4 == 0) totals.weight += weight;
}
