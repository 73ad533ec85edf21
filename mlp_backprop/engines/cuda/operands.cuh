// Matrices in 16-bit parts, and products of 16 x 16 blocks of them by a warp.
//
//     PARTS = 1   a number is rounded
//     PARTS = 2   a number is high + low, and of a product's four terms low * low is left out
//
// In float16 a matrix is first multiplied by the power of two that brings its largest number to
// 2^14 ... 2^15, and products are multiplied by the inverse. A number is then off by up to 2^-11
// (one part) or 2^-22 (two) of itself, or by 2^-40 of the matrix's largest where that is more. The
// one part has the 11 bits of tf32.

#pragma once

#include "mma.cuh"

// What brings numbers up to `largest` into the range, and back. bfloat16 has that of float32.
struct Scale {
  float there, back;
};
DEVICE Scale scale_of(unsigned largest) {
  const unsigned exponent = largest >> 23 > 27 ? largest >> 23 : 27;  // 0 has none
  return {__uint_as_float((268 - exponent) << 23), __uint_as_float((exponent - 14) << 23)};
}

DEVICE float half_of(unsigned word, int i) { return i == 0 ? low_half(word) : high_half(word); }

// Two neighbours, a word for each part.
DEVICE void split(float a, float b, unsigned (&words)[PARTS]) {
  words[0] = pack(a, b);
  if constexpr (PARTS == 2) words[1] = pack(a - low_half(words[0]), b - high_half(words[0]));
}

template <int rows, int columns>
using Parts = Half[PARTS][rows][columns];

template <int rows, int columns>
DEVICE void store(Parts<rows, columns>& matrix, int row, int column,
                  const unsigned (&words)[PARTS]) {
#pragma unroll
  for (int p = 0; p < PARTS; ++p) {
    *reinterpret_cast<unsigned*>(&matrix[p][row][column]) = words[p];
  }
}

template <int rows, int columns>
DEVICE unsigned load(const Parts<rows, columns>& matrix, int row, int column) {
  return *reinterpret_cast<const unsigned*>(&matrix[0][row][column]);
}

// The four 8 x 8 matrices of a block in shared memory, counted across or down. The words are an A,
// if it is stored by columns (transposed, across); or two B side by side, stored by columns (as it
// is, across) or by rows (transposed, down).
enum Count { ACROSS, DOWN };
template <bool TRANSPOSED, Count COUNT, int rows, int columns>
DEVICE void load_block(unsigned (&words)[PARTS][4], const Parts<rows, columns>& matrix, int row,
                       int column) {
  const int lane = threadIdx.x % 32, eighth = lane / 8;
  row += COUNT == ACROSS ? eighth / 2 * 8 + lane % 8 : lane % 16;
  column += COUNT == ACROSS ? eighth % 2 * 8 : eighth / 2 * 8;
#pragma unroll
  for (int p = 0; p < PARTS; ++p) load_matrices<TRANSPOSED>(words[p], &matrix[p][row][column]);
}

// A sum of products of blocks: two C side by side.
//
// Tensor cores cut off what does not fit into a sum. With split operands, therefore, every product
// of high parts is added in float32; the small products are summed apart, where little is cut; and
// half a unit in the last place, what is cut on average, is put back: 0.72 2^-24, for mantissas
// that are evenly distributed over the logarithm.
struct Block {
  float C[2][4] = {}, small[2][4] = {};

  // `first` spares the additions to 0, where it is known at compile time.
  DEVICE void add(const unsigned (&A)[PARTS][4], const unsigned (&B)[PARTS][4],
                  bool first = false) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (PARTS == 1 || first) {
        multiply_add(C[j], A[0], B[0][2 * j], B[0][2 * j + 1]);
      } else {
        float product[4] = {};
        multiply_add(product, A[0], B[0][2 * j], B[0][2 * j + 1]);
#pragma unroll
        for (int q = 0; q < 4; ++q) C[j][q] += product[q];
      }
      if constexpr (PARTS == 2) {
        multiply_add(small[j], A[1], B[0][2 * j], B[0][2 * j + 1]);
        multiply_add(small[j], A[0], B[1][2 * j], B[1][2 * j + 1]);
      }
    }
  }

  DEVICE float sum(int j, int q) const {
    return PARTS == 1 ? C[j][q] : C[j][q] + fmaf(C[j][q], 4.3e-8f, small[j][q]);
  }
};
