// Tier 3, wide nets: what lies between the products of the layers. cuda/layers.py calls it.
//
//     activate       after H_{l-1} W_l^T of a hidden layer: H_l
//     output         after that of the last layer: loss, D_L and its column sums
//     delta          after D_{l+1} W_{l+1}: D_l and its column sums
//     sum_partials   once, at the end
//     to_stored      copies X and W where products read another type
//
// Matrices are (rows, width) with `stride` elements from row to row. Compile-time constants:
//
//     ACTIVATION, LOSS   ids in formulas.cuh
//     REAL               float or double: parameters, targets and arithmetic
//     STORED             the same, or bfloat16: matrices that products read
//
// Rows are cut into slabs of SLAB: blockIdx.y is the slab. Sums over rows are formed in a fixed
// order, over a slab first. These lie in `partials` (slabs, n_partials), in double; from the second
// chunk of rows on `accumulate` says that they are added to what is there. A row of partials has
// the columns of D_1, ..., D_L, and behind them the loss, in as many parts as `output` has blocks
// for a slab.

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

DEVICE long long minimum(long long a, long long b) { return a < b ? a : b; }

// Sums in a block -------------------------------------------------------------------------------

using PerThread = double[WARPS][LANES];  // in shared memory

// The sum of x over the warps of a block, for each lane; the first warp has it. `place` may be used
// again after another barrier.
DEVICE double over_warps(double x, PerThread& place) {
  place[threadIdx.y][threadIdx.x] = x;
  __syncthreads();
  double total = 0;
  if (threadIdx.y == 0) {
    for (int warp = 0; warp < WARPS; ++warp) total += place[warp][threadIdx.x];
  }
  return total;
}

// A sum over rows of this chunk, added to that of the chunks before.
DEVICE void put(double& place, double sum, bool accumulate) {
  place = accumulate ? place + sum : sum;
}

// Over the `size` neighbouring lanes of a group, a power of two; all of them have it.
template <class T, class Combine>
DEVICE T over_group(T x, int size, Combine combine) {
  for (int step = size / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

struct Add {
  template <class T>
  DEVICE T operator()(T a, T b) const { return a + b; }
};
struct Maximum {
  template <class T>
  DEVICE T operator()(T a, T b) const { return maximum(a, b); }
};

// Hidden layers ---------------------------------------------------------------------------------

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

// D holds dE/dH_l and becomes D_l; equation (3). Its column sums, equation (2), go to `partials`,
// which begins at the columns of this layer.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    delta(Stored* __restrict__ D, const Stored* __restrict__ H, const Stored* __restrict__ Z,
          long long rows, long long width, long long stride, double* __restrict__ partials,
          long long n_partials, bool accumulate) {
  struct Shared {
    PerThread sums;
  };
  SHARED_STRUCT(Shared, shared);
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
  const double total = over_warps(sum, shared.sums);
  if (threadIdx.y > 0 || !own.has(0)) return;
  put(partials[blockIdx.y * n_partials + own.column], total, accumulate);
}

// The output layer ------------------------------------------------------------------------------

// What `output` is given. One of Y (rows, width) and labels (rows,) is null; weight may be.
// `partials` begins at the columns of this layer, behind which there is the loss.
struct Output {
  Stored* D;
  const Real* b;
  const Real* Y;
  const long long* labels;
  const Real* weight;
  long long rows, width, stride;
  double* partials;
  long long n_partials;
  bool accumulate;

  DEVICE void put_column(long long column, double sum) const {
    put(partials[blockIdx.y * n_partials + column], sum, accumulate);
  }
  DEVICE void put_loss(double sum) const { put_column(width + blockIdx.x, sum); }
  DEVICE Real weight_of(long long row) const { return weight ? weight[row] : Real(1); }
};

struct Shared {
  PerThread sums, losses;
};

// A loss that is a sum over outputs: the block has the slab in LANES columns.
template <int id>
DEVICE void write_output(const Output& out, Shared& shared) {
  const Elements own(out.rows, out.width);
  const Real bias = own.has(0) ? out.b[own.column] : Real(0);
  Real z[OWN], y[OWN], weight[OWN], sum = 0, loss = 0;
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    if (!own.has(k)) continue;
    z[k] = load(out.D[own.at(k, out.stride)]) + bias;
    y[k] = out.Y[own.at(k, out.width)];
    weight[k] = out.weight_of(own.first + k * WARPS);
  }
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    if (!own.has(k)) continue;
    const Real h = Function::f(z[k]);
    Real slope;
    loss += weight[k] * Loss<id, Real>::value_and_grad(h, y[k], slope);
    const Real d = weight[k] * slope * Function::df(z[k], h);
    store(out.D[own.at(k, out.stride)], d);
    sum += d;
  }
  const double column_sum = over_warps(sum, shared.sums);
  double block_loss = over_warps(loss, shared.losses);
  if (threadIdx.y > 0) return;
  if (own.has(0)) out.put_column(own.column, column_sum);
  block_loss = over_group(block_loss, LANES, Add());
  if (threadIdx.x == 0) out.put_loss(block_loss);
}

// A row of logits under softmax cross entropy, and its target: a lane has every `size`-th column
// from `lane` on. Lanes that are left without a row take part in the sums of a group without one.
struct Row {
  Stored* D;
  const Real* b;
  const Real* y;  // null: `label` stands for it
  long long label;
  Real weight;
  int width, lane, size, end;  // columns from lane to end

  DEVICE Real logit(int k) const { return load(D[k]) + b[k]; }
  DEVICE Real target(int k) const { return y ? y[k] : class_weight<Real>(label, k, width); }

  // D gets the row of D_L; this lane's share of the loss. Only a lane itself reads what it writes.
  DEVICE Real write() const {
    Real largest = __uint_as_float(0xff800000);  // -inf
    Real total = 0, y_sum = 0, loss = 0;
    for (int k = lane; k < end; k += size) largest = maximum(largest, logit(k));
    largest = over_group(largest, size, Maximum());
    for (int k = lane; k < end; k += size) {
      total += exp(logit(k) - largest);
      y_sum += target(k);
    }
    total = over_group(total, size, Add());
    y_sum = over_group(y_sum, size, Add());
    for (int k = lane; k < end; k += size) {
      const Real z = logit(k), yk = target(k);
      loss += weight * SoftmaxCrossEntropy::value(z, yk, largest, total);
      store(D[k], weight * SoftmaxCrossEntropy::grad(z, yk, largest, total, y_sum));
    }
    return loss;
  }
};

// From `least` to `most`, the first power of two that is `width` or more.
DEVICE int power_of_two(long long width, int least, int most) {
  int size = least;
  while (size < width && size < most) size *= 2;
  return size;
}

// Softmax cross entropy, whose activation is the identity: the block has the slab in all columns,
// and a row a lane for each of them, up to 32.
template <>
DEVICE void write_output<SOFTMAX_CROSS_ENTROPY>(const Output& out, Shared& shared) {
  const int thread = threadIdx.y * LANES + threadIdx.x, width = static_cast<int>(out.width);
  const long long begin = static_cast<long long>(blockIdx.y) * SLAB;
  const long long end = minimum(begin + SLAB, out.rows);
  const int size = power_of_two(width, 1, LANES);
  Real loss = 0;
  for (long long first = begin; first < end; first += THREADS / size) {
    const long long row = first + thread / size;
    const bool is_row = row < end;
    const long long r = is_row ? row : begin;
    loss += Row{out.D + r * out.stride,
                out.b,
                out.Y ? out.Y + r * width : nullptr,
                out.labels ? out.labels[r] : 0,
                out.weight_of(r),
                width,
                thread % size,
                size,
                is_row ? width : 0}
                .write();
  }
  double block_loss = over_warps(loss, shared.losses);  // behind its barrier D is written
  if (threadIdx.y == 0) block_loss = over_group(block_loss, LANES, Add());
  if (thread == 0) out.put_loss(block_loss);

  // As many columns at a time: threads that lie so far apart share one, and its rows.
  const int columns = power_of_two(width, LANES, THREADS);
  double* const sums = &shared.sums[0][0];
  for (long long column = thread % columns; column - thread % columns < width; column += columns) {
    double sum = 0;
    if (column < width) {
      for (long long row = begin + thread / columns; row < end; row += THREADS / columns) {
        sum += load(out.D[row * out.stride + column]);
      }
    }
    sums[thread] = sum;
    __syncthreads();
    if (thread < columns && column < width) {
      for (int other = thread + columns; other < THREADS; other += columns) sum += sums[other];
      out.put_column(column, sum);
    }
    __syncthreads();
  }
}

// D holds H_{L-1} W_L^T and becomes D_L; its column sums and the loss go to `partials`.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    output(Stored* __restrict__ D, const Real* __restrict__ b, const Real* __restrict__ Y,
           const long long* __restrict__ labels, const Real* __restrict__ weight, long long rows,
           long long width, long long stride, double* __restrict__ partials,
           long long n_partials, bool accumulate) {
  SHARED_STRUCT(Shared, shared);
  write_output<LOSS>(
      {D, b, Y, labels, weight, rows, width, stride, partials, n_partials, accumulate}, shared);
}

// At the end and at the start -------------------------------------------------------------------

// sums = partials summed over slabs, and divided. The last block has the loss, all that stands
// behind the n_columns of the layers; the others have LANES columns each.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    sum_partials(const double* __restrict__ partials, long long slabs, long long n_partials,
                 long long n_columns, double divisor, Real* __restrict__ sums) {
  struct Shared {
    PerThread totals;
  };
  SHARED_STRUCT(Shared, shared);
  const bool is_loss = blockIdx.x == gridDim.x - 1;
  const long long begin = is_loss ? n_columns : static_cast<long long>(blockIdx.x) * LANES;
  const long long column = begin + threadIdx.x;
  const long long end = is_loss ? n_partials : minimum(n_columns, begin + LANES);
  double total = 0;
  for (long long k = column; k < end; k += LANES) {
    for (long long slab = threadIdx.y; slab < slabs; slab += WARPS) {
      total += partials[slab * n_partials + k];
    }
  }
  total = over_warps(total, shared.totals);
  if (threadIdx.y > 0) return;
  if (is_loss) total = over_group(total, LANES, Add());
  if (is_loss ? threadIdx.x == 0 : column < end) sums[column] = total / divisor;
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
