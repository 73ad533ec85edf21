// Products of matrices in 16-bit numbers by the tensor cores of one warp: m16n8k16.
//
// A lane is 4 g + t, with g = 0 ... 7 and t = 0 ... 3. A word holds two neighbours, the first in
// its low half. The lane's words of A (16 x 16) and B (16 x 8), and its numbers of C (16 x 8), in
// rows and columns:
//
//     A[0] (g, 2t)      A[1] (g + 8, 2t)      A[2] (g, 2t + 8)      A[3] (g + 8, 2t + 8)
//     B[0] (2t, g)      B[1] (2t + 8, g)      neighbours are below each other
//     C[0], C[1] (g, 2t), (g, 2t + 1)         C[2], C[3] the same 8 rows below
//
// FLOAT16 chooses the numbers: 1 for float16 (11 bits, range 2^-24 ... 2^16), 0 for bfloat16 (8
// bits, the range of float32). Needs compute capability 8.0.

#pragma once

#include "device.cuh"

typedef unsigned short Half;

#ifdef EMULATION

#include "mma.h"

#else

#if FLOAT16
#define HALF "f16"
#else
#define HALF "bf16"
#endif

// Two numbers, rounded to nearest, in one word.
DEVICE unsigned pack(float low, float high) {
  unsigned word;
  asm("cvt.rn." HALF "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

DEVICE float low_half(unsigned word) {
#if FLOAT16
  float x;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(x) : "r"(word));
  return x;
#else
  return __uint_as_float(word << 16);
#endif
}

DEVICE float high_half(unsigned word) {
#if FLOAT16
  float x;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(word));
  return x;
#else
  return __uint_as_float(word & 0xffff0000u);
#endif
}

// tanh(x), off by up to 2^-11 of itself.
DEVICE float rough_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four 8 x 8 matrices of shared memory: lane 8 i + r names the first of 8 numbers of matrix i's
// row r, at an address that 16 divides. Word i is matrix i's (g, 2t), (g, 2t + 1), or of its
// transpose.
template <bool TRANSPOSED>
DEVICE void load_matrices(unsigned (&words)[4], const Half* row) {
  const unsigned address = unsigned(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

// C += A B, in float32; what does not fit into its bits is cut off, not rounded.
DEVICE void multiply_add(float (&C)[4], const unsigned (&A)[4], unsigned B_0, unsigned B_1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." HALF "." HALF ".f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(C[0]), "+f"(C[1]), "+f"(C[2]), "+f"(C[3])
      : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B_0), "r"(B_1));
}

// The largest number that a lane of the warp gives.
DEVICE unsigned warp_maximum(unsigned x) {
  unsigned largest;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(largest) : "r"(x));
  return largest;
}

#endif
