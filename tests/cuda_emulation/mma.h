// What mma.cuh makes of PTX instructions, lane by lane; the layouts are described there.

#pragma once

#include "emulation.h"

namespace emulation {

#if FLOAT16

// Rounds to nearest, to even between two.
inline Half to_half(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;           // nan
  if (magnitude >= 0x477ff000) return sign | 0x7c00;          // from 65520 on: inf
  if (magnitude < 0x38800000) return sign | Half(nearbyintf(fabsf(x) * 0x1p24f));  // subnormal
  return sign | Half((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline float exact_to_float(Half half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return copysignf(mantissa * 0x1p-24f, __uint_as_float(sign));
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

#else

inline Half to_half(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float exact_to_float(Half half) { return __uint_as_float(uint32_t(half) << 16); }

#endif

// static: an inline variable would be one for all libraries of the process, whatever FLOAT16.
static const std::vector<float> floats = [] {
  std::vector<float> all(1 << 16);
  for (int half = 0; half < 1 << 16; ++half) all[half] = exact_to_float(half);
  return all;
}();

inline float to_float(Half half) { return floats[half]; }

// The float32 next to x on the side of zero.
inline float truncated(double x) {
  const float nearest = float(x);
  return fabs(double(nearest)) > fabs(x) ? nextafterf(nearest, 0) : nearest;
}

struct Fragments {
  unsigned A[4], B[2];
};

}  // namespace emulation

inline unsigned pack(float low, float high) {
  return emulation::to_half(low) | unsigned(emulation::to_half(high)) << 16;
}

inline float low_half(unsigned word) { return emulation::to_float(word & 0xffff); }
inline float high_half(unsigned word) { return emulation::to_float(word >> 16); }

// Off by up to 2^-11, either way.
inline float rough_tanh(float x) {
  const int thousandths = int(__float_as_uint(x) * 2654435761u >> 16) % 2001 - 1000;
  return tanhf(x) * (1 + thousandths * 0x1p-11f / 1000);
}

template <bool TRANSPOSED>
void load_matrices(unsigned (&words)[4], const Half* row) {
  const unsigned char *address = reinterpret_cast<const unsigned char*>(row),
                      *shared = emulation::shared + emulation::GUARD;
  if (uintptr_t(row) % 16) emulation::fail("ldmatrix: an address that 16 does not divide");
  if (address < shared || address + 16 > shared + emulation::shared_bytes) {
    emulation::fail("ldmatrix: an address outside shared memory");
  }
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  const auto rows = emulation::show(~0u, TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", row);
  for (int i = 0; i < 4; ++i) {
    const Half low = TRANSPOSED ? rows[8 * i + 2 * t][g] : rows[8 * i + g][2 * t];
    const Half high = TRANSPOSED ? rows[8 * i + 2 * t + 1][g] : rows[8 * i + g][2 * t + 1];
    words[i] = low | unsigned(high) << 16;
  }
}

inline void multiply_add(float (&C)[4], const unsigned (&A)[4], unsigned B_0, unsigned B_1) {
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  const emulation::Fragments own = {{A[0], A[1], A[2], A[3]}, {B_0, B_1}};
  const auto lanes = emulation::show(~0u, "mma", own);
  double sum[4] = {C[0], C[1], C[2], C[3]};
  for (int pair = 0; pair < 4; ++pair) {  // columns k = 2 pair, + 1, + 8, + 9
    const auto upper = lanes[4 * g + pair];
    for (int column = 0; column < 2; ++column) {
      const auto right = lanes[4 * (2 * t + column) + pair];
      for (int half = 0; half < 2; ++half) {
        const double low = low_half(right.B[half]), high = high_half(right.B[half]);
        for (int below = 0; below < 2; ++below) {
          const unsigned left = upper.A[2 * half + below];
          sum[2 * below + column] += low_half(left) * low + high_half(left) * high;
        }
      }
    }
  }
  for (int q = 0; q < 4; ++q) C[q] = emulation::truncated(sum[q]);
}

inline unsigned warp_maximum(unsigned x) {
  const auto shown = emulation::show(~0u, "redux.max", x);
  unsigned largest = 0;
  for (int lane = 0; lane < 32; ++lane) largest = shown[lane] > largest ? shown[lane] : largest;
  return largest;
}
