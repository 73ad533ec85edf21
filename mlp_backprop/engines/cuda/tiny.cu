// Tiny nets: every thread takes a sample through the whole net, forward and back, in registers.
//
// The derivation of backprop.py, its equations (1) to (3), in one launch. A thread walks over the
// samples with a stride of the whole grid, and every sum over samples has a register in every
// thread. At the end the sums are added up over the lanes of a warp, over the warps of a block, and
// by the block that finishes last over all blocks, always in the same order. X, y and the weights
// are read once; nothing else of size n exists.
//
// Compile-time constants:
//
//     SIZES, ACTIVATIONS    d_0, ..., d_L; L ids of formulas.cuh
//     LOSS                  an id of formulas.cuh
//     TARGET                type of y: float, (n, d_L); or of labels, int or long long, (n,)
//     WEIGHTED              1: samples have weights
//     PARAMS_IN_REGISTERS   1: there is room; 0: they stay in shared memory
//     BLOCK, BLOCKS         threads of a block; blocks that a multiprocessor shall hold
//
// Sums are laid out as the parameters are, W_1, b_1, W_2, ...; then the loss, then the weights. For a
// mean they are divided by the sum of the weights, or by n, where they are written at last.

#include "layers.cuh"

constexpr int N_INPUTS = sizes[0], N_OUTPUTS = sizes[L];

template <int l>
struct Layer {
  static constexpr int n_in = sizes[l - 1], n_out = sizes[l];
  static constexpr int W = place(l), b = W + n_out * n_in;
  using F = Activated<l>;
};

constexpr int N_SUMS = N_PARAMS + 1 + WEIGHTED;
constexpr int LOSS_SUM = N_PARAMS, WEIGHT_SUM = N_PARAMS + 1;

constexpr bool LABELS = (TARGET)0.5f == 0;  // an integer
constexpr int N_TARGETS = LABELS ? 1 : N_OUTPUTS;

// In the sums over lanes every lane ends with the same number of them.
constexpr int WARP = 32, WARPS = BLOCK / WARP;
constexpr int PER_LANE = (N_SUMS + WARP - 1) / WARP, PADDED = PER_LANE * WARP;

// The block that adds up the rows of partial sums takes four columns per thread.
constexpr int COLUMNS = PADDED / 4, GROUPS = BLOCK / COLUMNS;
static_assert(GROUPS > 0, "more sums than a block has threads for");

using Params = float[N_PARAMS];
using Sums = float[PADDED];

struct alignas(16) Shared {
  float params[N_PARAMS];
  float warps[WARPS][PADDED];
  double groups[GROUPS][PADDED];
  double totals[PADDED];
  bool last;
};

struct Row {
  float X[N_INPUTS];
  TARGET y[N_TARGETS];
  float weight[1];
};

// Data ------------------------------------------------------------------------------------------

// `from` is aligned to the vectors of 16 or 8 bytes that divide a row.
template <int count>
DEVICE void load(const float* from, float* to) {
  if constexpr (count % 4 == 0) {
#pragma unroll
    for (int k = 0; k < count; k += 4) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(from + k));
      to[k] = v.x, to[k + 1] = v.y, to[k + 2] = v.z, to[k + 3] = v.w;
    }
  } else if constexpr (count % 2 == 0) {
#pragma unroll
    for (int k = 0; k < count; k += 2) {
      const float2 v = __ldg(reinterpret_cast<const float2*>(from + k));
      to[k] = v.x, to[k + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k) to[k] = __ldg(from + k);
  }
}

template <int count, class Label>
DEVICE void load(const Label* from, Label* to) {
#pragma unroll
  for (int k = 0; k < count; ++k) to[k] = __ldg(from + k);
}

DEVICE void load(Row& row, const float* X, const TARGET* y, const float* weight, long long r) {
  load<N_INPUTS>(X + r * N_INPUTS, row.X);
  load<N_TARGETS>(y + r * N_TARGETS, row.y);
  if constexpr (WEIGHTED) load<1>(weight + r, row.weight);
}

// Where number i of all parameters, or of their gradients, lies: in layer l or above it.
template <int l, class Arrays>
DEVICE auto place_of(const Arrays& arrays, int i) {
  using A = Layer<l>;
  const auto [W, b] = arrays.layers[l - 1];
  if (i < A::b) return W + (i - A::W);
  if constexpr (l < L) {
    if (i >= Layer<l + 1>::W) return place_of<l + 1>(arrays, i);
  }
  return b + (i - A::b);
}

// The derivation --------------------------------------------------------------------------------

DEVICE float target_of(const float (&y)[N_OUTPUTS], int k) { return y[k]; }

template <class Label>
DEVICE float target_of(const Label (&label)[1], int k) {
  return class_weight<float>(label[0], k, N_OUTPUTS);
}

// The loss of a sample, and G = dE/dH_L.
template <int loss>
DEVICE float loss_and_output_grad(const float (&H)[N_OUTPUTS], const TARGET (&y)[N_TARGETS],
                                  float (&G)[N_OUTPUTS]) {
  float value = 0;
  if constexpr (loss == SOFTMAX_CROSS_ENTROPY) {
    float Y[N_OUTPUTS], m = H[0], total = 0, y_sum = 0;
#pragma unroll
    for (int k = 0; k < N_OUTPUTS; ++k) {
      Y[k] = target_of(y, k);
      y_sum += Y[k];
      m = maximum(m, H[k]);
    }
#pragma unroll
    for (int k = 0; k < N_OUTPUTS; ++k) total += exp(H[k] - m);
#pragma unroll
    for (int k = 0; k < N_OUTPUTS; ++k) {
      value += SoftmaxCrossEntropy::value(H[k], Y[k], m, total);
      G[k] = SoftmaxCrossEntropy::grad(H[k], Y[k], m, total, y_sum);
    }
  } else {
#pragma unroll
    for (int k = 0; k < N_OUTPUTS; ++k) {
      value += Loss<loss, float>::value_and_grad(H[k], y[k], G[k]);
    }
  }
  return value;
}

// Given H_{l-1}: adds to the sums of layer l and of all above it, and finds G = dE/dH_{l-1}. The
// layers above come between this one's way forward and its way back, for which half of W_l is read
// from `again`.
template <int l>
DEVICE void pass(const Params& params, const Params& again, const Row& row,
                 const float (&H_below)[Layer<l>::n_in], Sums& sums,
                 float (&G_below)[Layer<l>::n_in]) {
  using A = Layer<l>;
  using F = typename A::F;
  float H[A::n_out], slope[A::n_out], G[A::n_out];
#pragma unroll
  for (int o = 0; o < A::n_out; ++o) {
    float z = params[A::b + o];
#pragma unroll
    for (int i = 0; i < A::n_in; ++i) z += params[A::W + o * A::n_in + i] * H_below[i];
    H[o] = F::f(z);
    if constexpr (!F::slope_from_output) slope[o] = F::df(z, H[o]);
  }

  if constexpr (l < L) {
    pass<l + 1>(params, again, row, H, sums, G);
  } else {
    const float value = loss_and_output_grad<LOSS>(H, row.y, G);
    const float weight = WEIGHTED ? row.weight[0] : 1;
    sums[LOSS_SUM] += weight * value;
    if constexpr (WEIGHTED) sums[WEIGHT_SUM] += weight;
#pragma unroll
    for (int o = 0; o < A::n_out; ++o) G[o] *= weight;
  }

  float D[A::n_out];
#pragma unroll
  for (int o = 0; o < A::n_out; ++o) {
    if constexpr (F::slope_from_output) slope[o] = F::df(0, H[o]);
    D[o] = G[o] * slope[o];
#pragma unroll
    for (int i = 0; i < A::n_in; ++i) sums[A::W + o * A::n_in + i] += D[o] * H_below[i];  // (1)
    sums[A::b + o] += D[o];                                                               // (2)
  }

  if constexpr (l > 1) {
    KEEP_IN_MEMORY;
#pragma unroll
    for (int i = 0; i < A::n_in; ++i) {
      G_below[i] = 0;
#pragma unroll
      for (int o = 0; o < A::n_out; ++o) {
        const Params& from = 2 * o < A::n_out ? params : again;
        G_below[i] += from[A::W + o * A::n_in + i] * D[o];  // (3)
      }
    }
  }
}

// Sums over samples, lanes, warps and blocks -----------------------------------------------------

// Rows of a thread that are on their way while one is worked on. Where a row is short and takes few
// instructions, one per thread is less than memory can deliver meanwhile.
constexpr int ROWS_AHEAD = BLOCKS > 3 && N_INPUTS + N_OUTPUTS < 8 ? 2 : 1;

// The thread's share of the samples.
DEVICE void add_samples(const Params& params, const Params& again, const float* X, const TARGET* y,
                        const float* weight, long long n, Sums& sums) {
  const long long stride = (long long)gridDim.x * BLOCK;
  long long r = (long long)blockIdx.x * BLOCK + threadIdx.x;
  Row ahead[ROWS_AHEAD];
#pragma unroll
  for (int k = 0; k < ROWS_AHEAD; ++k) {
    if (r + k * stride < n) load(ahead[k], X, y, weight, r + k * stride);
  }
  for (; r < n; r += stride) {
    const Row row = ahead[0];
    if constexpr (ROWS_AHEAD == 2) ahead[0] = ahead[1];
    const long long next = r + ROWS_AHEAD * stride;
    if (next < n) load(ahead[ROWS_AHEAD - 1], X, y, weight, next);
    KEEP_IN_MEMORY;
    float dX[N_INPUTS];  // never formed: equation (4) is not asked for
    pass<1>(params, again, row, row.X, sums, dX);
  }
}

// Adds up `count` sums over the lanes of a warp, each lane giving one half of them away for the
// other half of its partner's: at the end lane k has the sums from k * PER_LANE on.
template <int count>
DEVICE void add_lanes(Sums& sums) {
  constexpr int half = count / 2, distance = half / PER_LANE;
  const bool upper = threadIdx.x & distance;
#pragma unroll
  for (int k = 0; k < half; ++k) {
    const float mine = upper ? sums[half + k] : sums[k];
    const float other = upper ? sums[k] : sums[half + k];
    sums[k] = mine + __shfl_xor_sync(~0u, other, distance);
  }
  if constexpr (distance > 1) add_lanes<half>(sums);
}

// The rows of `partials`, one per block, in the same order whichever block comes last.
DEVICE void add_blocks(const float* partials, double (&groups)[GROUPS][PADDED],
                       double (&totals)[PADDED]) {
  const int column = 4 * (threadIdx.x % COLUMNS), group = threadIdx.x / COLUMNS;
  if (group < GROUPS) {
    double x = 0, y = 0, z = 0, w = 0;
#pragma unroll 8
    for (unsigned row = group; row < gridDim.x; row += GROUPS) {
      const float* place = partials + (long long)row * PADDED + column;
      const float4 v = __ldcg(reinterpret_cast<const float4*>(place));
      x += v.x, y += v.y, z += v.z, w += v.w;
    }
    double* sums = groups[group] + column;
    sums[0] = x, sums[1] = y, sums[2] = z, sums[3] = w;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < N_SUMS; i += BLOCK) {
    double sum = 0;
    for (int group = 0; group < GROUPS; ++group) sum += groups[group][i];
    totals[i] = sum;
  }
}

// `partials` has a row of PADDED numbers per block, `ticket` is 0, before and after.
extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS)
    tiny(const Pointers pointers, const float* X, const TARGET* y, const float* weight,
         const long long n, const long long mean, float* partials, unsigned* ticket,
         const Results results) {
  SHARED_STRUCT(Shared, shared);
  for (int i = threadIdx.x; i < N_PARAMS; i += BLOCK) {
    shared.params[i] = *place_of<1>(pointers, i);
  }
  __syncthreads();

  Sums sums = {};
  if constexpr (PARAMS_IN_REGISTERS) {
    Params params;
#pragma unroll
    for (int i = 0; i < N_PARAMS; ++i) params[i] = shared.params[i];
    add_samples(params, params, X, y, weight, n, sums);
  } else {
    // The same place, as y is 0; the compiler does not know it, and loads again on the way back what
    // it would have no registers to keep. Half of W_l is enough, and each load takes its time.
    const float* again = shared.params + (BLOCKS > 2 ? 4 * threadIdx.y : 0);
    add_samples(shared.params, *reinterpret_cast<const Params*>(again), X, y, weight, n, sums);
  }

  add_lanes<PADDED>(sums);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (int k = 0; k < PER_LANE; ++k) shared.warps[warp][lane * PER_LANE + k] = sums[k];
  __syncthreads();
  const bool alone = gridDim.x == 1;
  for (int i = threadIdx.x; i < PADDED; i += BLOCK) {
    float sum = 0;
    for (int warp = 0; warp < WARPS; ++warp) sum += shared.warps[warp][i];
    if (alone) {
      shared.totals[i] = sum;
    } else {
      __stcg(partials + (long long)blockIdx.x * PADDED + i, sum);
    }
  }

  if (!alone) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    if (!shared.last) return;
    __threadfence();
    add_blocks(partials, shared.groups, shared.totals);
  }
  __syncthreads();
  double divisor = 1;
  if (mean) divisor = WEIGHTED ? shared.totals[N_SUMS - 1] : n;
  for (int i = threadIdx.x; i < N_PARAMS; i += BLOCK) {
    *place_of<1>(results, i) = shared.totals[i] / divisor;
  }
  if (threadIdx.x == 0) *results.loss = shared.totals[LOSS_SUM] / divisor;
}
