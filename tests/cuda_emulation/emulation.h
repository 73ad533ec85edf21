// CUDA on the host, as far as the package's kernels use it, so that whole kernels run in tests.
//
// Every thread of a block is a fiber with a stack of its own. Barriers, shuffles and votes are the
// points where a fiber waits; between them it runs alone, in the order of the threads or against
// it. A warp goes on when all lanes of the mask wait for the same; a block, when all threads that
// have not returned do. If nothing can go on, the launch fails and says who waits for what.
//
// Shared memory begins each block as NaN (all bits set) between guards that the kernel may not
// touch. Blocks run one after the other, so races between blocks do not show, nor does the order
// of memory; nor speed.

#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

constexpr int WARP = 32;
constexpr size_t STACK = 1 << 18;
constexpr size_t SHARED_LIMIT = 232448;  // bytes of a block on the largest device
constexpr size_t GUARD = 256;
constexpr size_t MESSAGE = 64;  // bytes that a lane can show to its warp

enum State { RUNNING, AT_BARRIER, IN_WARP, RETURNED };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t start;
  jmp_buf place;
  bool started;
  State state;
  const char* waits_for;  // name of the warp's operation
  unsigned mask;
  unsigned char message[MESSAGE];
};

inline std::vector<Fiber> fibers;
inline int current;
inline bool backward;  // threads and blocks from the last to the first
inline jmp_buf scheduler;
inline unsigned char released[WARP][MESSAGE];
inline char error[400];

inline void (*body)(void*);
inline void* body_data;

alignas(256) inline unsigned char shared[GUARD + SHARED_LIMIT + GUARD];
inline size_t shared_bytes;  // how much of it is the block's

// From the kernel's side ------------------------------------------------------------------------

[[noreturn]] inline void fail(const char* what) {
  snprintf(error, sizeof error, "block %u, thread %d: %s", blockIdx.x, current, what);
  _longjmp(scheduler, 1);
}

inline void wait() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

inline int lane() { return current % WARP; }

// What the lanes of the warp showed at the same operation.
template <class T>
struct Shown {
  unsigned mask;
  T operator[](int lane) const {
    if (lane < 0 || lane >= WARP || !(mask >> lane & 1)) fail("reads from a lane outside the mask");
    T value;
    memcpy(&value, released[lane], sizeof value);
    return value;
  }
};

// One operation of a warp: show a value, and go on when all lanes of the mask have done so. To be
// read before the next operation.
template <class T>
Shown<T> show(unsigned mask, const char* operation, const T& value) {
  static_assert(sizeof(T) <= MESSAGE && std::is_trivially_copyable_v<T>);
  Fiber& fiber = fibers[current];
  if (!(mask >> lane() & 1)) fail("takes part in an operation whose mask leaves it out");
  memcpy(fiber.message, &value, sizeof value);
  fiber.state = IN_WARP;
  fiber.waits_for = operation;
  fiber.mask = mask;
  wait();
  return {mask};
}

// Shared memory: a struct of static size, or as many bytes as the launch asks for.
template <class T>
T& shared_struct() {
  static_assert(sizeof(T) <= 49152, "more must be asked for at the launch");
  shared_bytes = sizeof(T);
  return *reinterpret_cast<T*>(shared + GUARD);
}

inline unsigned char* dynamic_shared() { return shared + GUARD; }

template <class T>
void check_aligned(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignof(T)) fail("a vector access is not aligned");
}

// The scheduler ---------------------------------------------------------------------------------

inline void run_fiber() {
  body(body_data);
  fibers[current].state = RETURNED;
  _longjmp(scheduler, 1);
}

// Runs a thread until it waits or returns.
inline void resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y,
               thread / (blockDim.x * blockDim.y)};
  fiber.state = RUNNING;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Resumes the lanes of a warp that wait for the same operation with the same mask, all being there.
inline bool release(int first, int n_lanes) {
  for (int leader = 0; leader < n_lanes; ++leader) {
    const Fiber& chosen = fibers[first + leader];
    if (chosen.state != IN_WARP) continue;
    unsigned there = 0;
    for (int lane = 0; lane < n_lanes; ++lane) {
      const Fiber& fiber = fibers[first + lane];
      if (fiber.state == IN_WARP && fiber.mask == chosen.mask &&
          strcmp(fiber.waits_for, chosen.waits_for) == 0) {
        there |= 1u << lane;
      }
    }
    if (there != chosen.mask) continue;
    for (int lane = 0; lane < n_lanes; ++lane) {
      memcpy(released[lane], fibers[first + lane].message, MESSAGE);
    }
    for (int k = 0; k < n_lanes && !*error; ++k) {
      const int lane = backward ? n_lanes - 1 - k : k;
      if (there >> lane & 1) resume(first + lane);
    }
    return true;
  }
  return false;
}

inline bool open_barrier() {
  bool any = false;
  for (const Fiber& fiber : fibers) {
    if (fiber.state == IN_WARP) return false;
    any |= fiber.state == AT_BARRIER;
  }
  for (size_t k = 0; k < fibers.size() && !*error; ++k) {
    const int thread = backward ? fibers.size() - 1 - k : k;
    if (fibers[thread].state == AT_BARRIER) resume(thread);
  }
  return any;
}

inline void describe_deadlock() {
  int length = snprintf(error, sizeof error, "block %u: nothing can go on;", blockIdx.x);
  const Fiber* said = nullptr;
  for (size_t thread = 0; thread < fibers.size() && length < 300; ++thread) {
    const Fiber& fiber = fibers[thread];
    const bool same = said && said->state == fiber.state &&
                      (fiber.state != IN_WARP ||
                       (said->mask == fiber.mask && said->waits_for == fiber.waits_for));
    if (same) continue;
    said = &fiber;
    length += snprintf(error + length, sizeof error - length, " from thread %zu: ", thread);
    if (fiber.state == IN_WARP) {
      length += snprintf(error + length, sizeof error - length, "%s of mask %08x;",
                         fiber.waits_for, fiber.mask);
    } else {
      length += snprintf(error + length, sizeof error - length, "%s;",
                         fiber.state == AT_BARRIER ? "__syncthreads" : "has returned");
    }
  }
}

inline void check_guards() {
  const unsigned char* end = shared + GUARD + shared_bytes;
  for (size_t k = 0; k < GUARD; ++k) {
    if (shared[k] != 0xff || end[k] != 0xff) {
      snprintf(error, sizeof error, "block %u wrote outside its shared memory", blockIdx.x);
      return;
    }
  }
}

inline void run_block() {
  memset(shared + GUARD, 0xff, shared_bytes);
  const int n_threads = fibers.size();
  for (Fiber& fiber : fibers) {
    fiber.started = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
  for (int k = 0; k < n_threads && !*error; ++k) resume(backward ? n_threads - 1 - k : k);
  for (bool moved = true; moved && !*error;) {
    moved = false;
    for (int first = 0; first < n_threads && !*error; first += WARP) {
      const int n_lanes = n_threads - first < WARP ? n_threads - first : WARP;
      while (!*error && release(first, n_lanes)) moved = true;
    }
    if (!*error && !moved) moved = open_barrier();
  }
  if (*error) return;
  for (const Fiber& fiber : fibers) {
    if (fiber.state != RETURNED) return describe_deadlock();
  }
  check_guards();
}

// Like cuLaunchKernel: `arguments` are pointers to the kernel's arguments. Returns what went wrong,
// or null.
template <class... A, size_t... k>
const char* launch(void (*kernel)(A...), std::index_sequence<k...>, const unsigned* grid,
                   const unsigned* block, size_t dynamic_bytes, bool from_the_end,
                   void** arguments) {
  auto call = [&] { kernel(*static_cast<std::remove_reference_t<A>*>(arguments[k])...); };
  body = [](void* data) { (*static_cast<decltype(call)*>(data))(); };
  body_data = &call;
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  backward = from_the_end;
  *error = 0;
  memset(shared, 0xff, sizeof shared);
  shared_bytes = dynamic_bytes;
  const size_t n_threads = size_t(block[0]) * block[1] * block[2];
  if (fibers.size() != n_threads) fibers = std::vector<Fiber>(n_threads);
  const size_t n_blocks = size_t(grid[0]) * grid[1] * grid[2];
  for (size_t b = 0; b < n_blocks && !*error; ++b) {
    const size_t index = backward ? n_blocks - 1 - b : b;
    blockIdx = {unsigned(index % grid[0]), unsigned(index / grid[0] % grid[1]),
                unsigned(index / grid[0] / grid[1])};
    run_block();
  }
  return *error ? error : nullptr;
}

template <class... A>
const char* launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block,
                   size_t dynamic_bytes, bool from_the_end, void** arguments) {
  return launch(kernel, std::index_sequence_for<A...>(), grid, block, dynamic_bytes, from_the_end,
                arguments);
}

// The exact number, off by up to `ulps` units in the last place, either way: the approximate
// instructions of a device promise no more.
inline float off_by(double exact, int ulps) {
  const float smallest = 1.17549435e-38f, nearest = float(exact);
  if (fabsf(nearest) < smallest) return copysignf(0, nearest);  // subnormal numbers are flushed
  uint32_t bits;
  memcpy(&bits, &nearest, 4);
  bits += int(bits * 2654435761u >> 16) % (2 * ulps + 1) - ulps;
  float off;
  memcpy(&off, &bits, 4);
  return isfinite(nearest) && isfinite(off) && fabsf(off) >= smallest ? off : nearest;
}

}  // namespace emulation

// The names of CUDA -----------------------------------------------------------------------------

inline void __syncthreads() {
  emulation::fibers[emulation::current].state = emulation::AT_BARRIER;
  emulation::wait();
}

inline void __syncwarp(unsigned mask = ~0u) { emulation::show(mask, "__syncwarp", 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulation::show(mask, "__shfl_sync", value)[from & 31];
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulation::show(mask, "__shfl_xor_sync", value)[emulation::lane() ^ bits];
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int from = emulation::lane() + distance;
  return emulation::show(mask, "__shfl_down_sync", value)[from < 32 ? from : emulation::lane()];
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto shown = emulation::show(mask, "__ballot_sync", predicate);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) votes |= unsigned(shown[lane] != 0) << lane;
  }
  return votes;
}

inline bool __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate); }
inline bool __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

template <class T>
T atomicAdd(T* place, T value) {
  const T old = *place;
  *place += value;
  return old;
}

inline unsigned atomicInc(unsigned* place, unsigned last) {
  const unsigned old = *place;
  *place = old >= last ? 0 : old + 1;
  return old;
}

inline unsigned atomicOr(unsigned* place, unsigned bits) {
  const unsigned old = *place;
  *place |= bits;
  return old;
}

template <class T>
T __ldg(const T* place) {
  emulation::check_aligned(place);
  return *place;
}

template <class T>
T __ldcg(const T* place) {
  return __ldg(place);
}

template <class T>
void __stcg(T* place, T value) {
  emulation::check_aligned(place);
  *place = value;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// What device.cuh makes of PTX instructions -----------------------------------------------------

inline float ex2(float x) { return emulation::off_by(exp2(double(x)), 2); }
inline float rcp(float x) { return emulation::off_by(1 / double(x), 1); }

// The entry of a kernel for emulation.py.
#define EMULATED(kernel)                                                                     \
  extern "C" const char* emulated_##kernel(const unsigned* grid, const unsigned* block,      \
                                           size_t dynamic_bytes, bool backward,              \
                                           void** arguments) {                               \
    return emulation::launch(kernel, grid, block, dynamic_bytes, backward, arguments);       \
  }
