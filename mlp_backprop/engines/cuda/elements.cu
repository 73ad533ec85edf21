// Tier 4, wide nets: what lies between the products of the layers. cuda_layers.py calls it.
//
// Matrices are (rows, width) with `stride` elements from row to row. Compile-time constants:
//
//     ACTIVATION, LOSS   ids in formulas.cuh
//     REAL               float or double: parameters, targets and arithmetic
//     STORED             the same, or bfloat16: matrices that products read
//
// Rows are cut into slabs of SLAB: blockIdx.y is the slab. Sums over rows are formed in a fixed
// order, over a slab first; these lie in `partials` (slabs, n_sums), in double, and are added to
// what is there, so that chunks add up. sum_partials adds the slabs, once, at the end.

#include "formulas.cuh"

struct bfloat16 {
  unsigned short bits;
};

using Real = REAL;
using Stored = STORED;
using Function = Activation<ACTIVATION, Real>;

constexpr int LANES = 32, WARPS = 16, THREADS = LANES * WARPS;
constexpr int SLAB = 64;

DEVICE float load(float x) { return x; }
DEVICE double load(double x) { return x; }
DEVICE float load(bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

DEVICE void store(float& place, float x) { place = x; }
DEVICE void store(double& place, double x) { place = x; }

// To the nearest, ties to even; nan stays nan, whatever its bits.
DEVICE void store(bfloat16& place, float x) {
  const unsigned bits = __float_as_uint(x), half = 0x7fff + (bits >> 16 & 1);
  place.bits = x == x ? (bits + half) >> 16 : 0x7fff;
}

// The elements of one column in one slab that belong to a thread: none beyond the matrix. All are
// loaded before any is stored, so that the loads are under way together.
struct Elements {
  long long first, rows, column;

  DEVICE Elements(long long rows, long long width)
      : first(static_cast<long long>(blockIdx.y) * SLAB + threadIdx.y),
        rows(rows),
        column(static_cast<long long>(blockIdx.x) * LANES + threadIdx.x) {
    if (column >= width) first = rows;
  }
  DEVICE bool has(int k) const { return first + k * WARPS < rows; }
  DEVICE long long at(int k, long long stride) const {
    return (first + k * WARPS) * stride + column;
  }
};

constexpr int OWN = SLAB / WARPS;  // elements of a thread

// H holds H_{l-1} W_l^T and becomes H_l. Z_l is kept where f' needs it; elsewhere Z may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    activate(Stored* __restrict__ H, Stored* __restrict__ Z, const Real* __restrict__ b,
             long long rows, long long width, long long stride) {
  const Elements own(rows, width);
  const Real bias = own.has(0) ? b[own.column] : Real(0);
  Real z[OWN];
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    if (own.has(k)) z[k] = load(H[own.at(k, stride)]) + bias;
  }
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    if (!own.has(k)) continue;
    if constexpr (!Function::slope_from_output) store(Z[own.at(k, stride)], z[k]);
    store(H[own.at(k, stride)], Function::f(z[k]));
  }
}

// D holds dE/dH_l and becomes D_l; equation (3). Its column sums, equation (2), go to partials,
// which begins at the columns of this layer.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    delta(Stored* __restrict__ D, const Stored* __restrict__ H, const Stored* __restrict__ Z,
          long long rows, long long width, long long stride, double* __restrict__ partials,
          long long n_sums) {
  struct Sums {
    Real of[WARPS][LANES];
  };
  SHARED_STRUCT(Sums, sums);
  const Elements own(rows, width);
  Real d[OWN], slope[OWN], sum = 0;
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    if (!own.has(k)) continue;
    const long long i = own.at(k, stride);
    d[k] = load(D[i]);
    if constexpr (ACTIVATION != IDENTITY) {
      const Real h = load(H[i]);
      slope[k] = Function::df(Function::slope_from_output ? h : load(Z[i]), h);
    }
  }
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    if (!own.has(k)) continue;
    if constexpr (ACTIVATION != IDENTITY) {
      d[k] *= slope[k];
      store(D[own.at(k, stride)], d[k]);
    }
    sum += d[k];
  }
  sums.of[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && own.has(0)) {
    double total = 0;
    for (int warp = 0; warp < WARPS; ++warp) total += sums.of[warp][threadIdx.x];
    partials[blockIdx.y * n_sums + own.column] += total;
  }
}

// Loss and output gradient ----------------------------------------------------------------------

// Over the `size` neighbouring lanes that share a row, a power of two.
template <class Combine>
DEVICE Real over_group(Real x, int size, Combine combine) {
  for (int step = size / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

struct Add {
  DEVICE Real operator()(Real a, Real b) const { return a + b; }
};
struct Maximum {
  DEVICE Real operator()(Real a, Real b) const { return maximum(a, b); }
};

// One row of outputs and targets, of which a lane has every `size`-th column from `lane` on. Lanes
// that are left without a row take part with another's, but none of its columns.
struct Row {
  const Stored* h;
  const Real* y;  // null: `label` stands for it
  long long label;
  Stored* g;
  Real weight;
  int width, lane, size, end;  // columns from lane to end

  DEVICE Real target(int k) const { return y ? y[k] : class_weight<Real>(label, k, width); }

  // This lane's share of the loss; G gets the row's dE/dH_L.
  template <int id>
  DEVICE Real value_and_grad() const {
    Real value = 0;
    for (int k = lane; k < end; k += size) {
      Real slope;
      value += weight * Loss<id, Real>::value_and_grad(load(h[k]), target(k), slope);
      store(g[k], weight * slope);
    }
    return value;
  }
};

template <>
DEVICE Real Row::value_and_grad<SOFTMAX_CROSS_ENTROPY>() const {
  Real largest = load(h[0]), total = 0, y_sum = 0, value = 0;
  for (int k = lane; k < end; k += size) largest = maximum(largest, load(h[k]));
  largest = over_group(largest, size, Maximum());
  for (int k = lane; k < end; k += size) {
    total += exp(load(h[k]) - largest);
    y_sum += target(k);
  }
  total = over_group(total, size, Add());
  y_sum = over_group(y_sum, size, Add());
  for (int k = lane; k < end; k += size) {
    const Real hk = load(h[k]), yk = target(k);
    value += weight * SoftmaxCrossEntropy::value(hk, yk, largest, total);
    store(g[k], weight * SoftmaxCrossEntropy::grad(hk, yk, largest, total, y_sum));
  }
  return value;
}

// G becomes dE/dH_L; the loss of the slab goes to the last column of partials. One of Y (rows,
// width) and labels (rows,) is null; weight may be. A row has a lane per column, up to 32.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    loss(const Stored* __restrict__ H, const Real* __restrict__ Y,
         const long long* __restrict__ labels, const Real* __restrict__ weight,
         Stored* __restrict__ G, long long rows, long long width, long long stride,
         double* __restrict__ partials, long long n_sums) {
  struct Sums {
    double of[THREADS];
  };
  SHARED_STRUCT(Sums, sums);
  int size = 1;
  while (size < width && size < LANES) size *= 2;
  const int thread = threadIdx.y * LANES + threadIdx.x;
  const long long begin = static_cast<long long>(blockIdx.y) * SLAB;
  const long long end = begin + SLAB < rows ? begin + SLAB : rows;
  Real sum = 0;
  for (long long first = begin; first < end; first += THREADS / size) {
    const long long row = first + thread / size;
    const bool is_row = row < end;
    const long long r = is_row ? row : begin;
    const Row mine = {H + r * stride,
                      Y ? Y + r * width : nullptr,
                      labels ? labels[r] : 0,
                      G + r * stride,
                      weight ? weight[r] : Real(1),
                      static_cast<int>(width),
                      thread % size,
                      size,
                      is_row ? static_cast<int>(width) : 0};
    sum += mine.value_and_grad<LOSS>();
  }
  sums.of[thread] = sum;
  for (int step = THREADS / 2; step > 0; step /= 2) {
    __syncthreads();
    if (thread < step) sums.of[thread] += sums.of[thread + step];
  }
  if (thread == 0) partials[(blockIdx.y + 1) * n_sums - 1] += sums.of[0];
}

// sums = partials summed over slabs.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    sum_partials(const double* __restrict__ partials, long long slabs, long long n_sums,
                 Real* __restrict__ sums) {
  struct Totals {
    double of[WARPS][LANES];
  };
  SHARED_STRUCT(Totals, totals);
  const long long column = static_cast<long long>(blockIdx.x) * LANES + threadIdx.x;
  double total = 0;
  if (column < n_sums) {
    for (long long slab = threadIdx.y; slab < slabs; slab += WARPS) {
      total += partials[slab * n_sums + column];
    }
  }
  totals.of[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && column < n_sums) {
    for (int warp = 1; warp < WARPS; ++warp) total += totals.of[warp][threadIdx.x];
    sums[column] = total;
  }
}

// B, with its stride, is A, whose rows are contiguous.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    to_stored(const Real* __restrict__ A, Stored* __restrict__ B, long long rows,
              long long width, long long stride) {
  const Elements own(rows, width);
  Real a[OWN];
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    if (own.has(k)) a[k] = A[own.at(k, width)];
  }
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    if (own.has(k)) store(B[own.at(k, stride)], a[k]);
  }
}
