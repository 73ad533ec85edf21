// What the kernels need of the machine, by names of our own.
//
//     SHARED_STRUCT(Type, name)    a struct in the shared memory of a block, of static size
//     DYNAMIC_SHARED(name)         as many bytes of it as the launch asks for
//     KEEP_IN_MEMORY               what is in memory is read again behind this, not kept in registers
//     ex2, rcp, maximum            single instructions; maximum from compute capability 8.0 on
//
// Nothing of the toolkit is included, so that NVRTC alone compiles the kernels. The tests compile
// the same files for the host: emulation.h then stands for CUDA.

#pragma once

#define DEVICE __device__ __forceinline__

#ifdef EMULATION

#include "emulation.h"

#define SHARED_STRUCT(Type, name) Type& name = emulation::shared_struct<Type>()
#define DYNAMIC_SHARED(name) unsigned char* const name = emulation::dynamic_shared()
#define KEEP_IN_MEMORY

#else

#define SHARED_STRUCT(Type, name) __shared__ Type name
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define KEEP_IN_MEMORY asm volatile("" ::: "memory")

// 2^x, off by up to 2 units in the last place; subnormal results are 0.
DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1/x, off by up to 1 unit in the last place; subnormal results are 0.
DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

// The larger; nan where either is nan.
#if !defined(EMULATION) && __CUDA_ARCH__ >= 800
DEVICE float maximum(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
#else
DEVICE float maximum(float a, float b) { return a != a || a > b ? a : b; }
#endif
DEVICE double maximum(double a, double b) { return a != a || a > b ? a : b; }
