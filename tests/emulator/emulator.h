// CUDA on the CPU, for tests: lets g++ compile unmodified kernel source, and runs it one fibre a thread.
//
// All CTAs are resident. Which fibre goes on, at every barrier, shuffle and atomic, is drawn from a seeded generator.
// Barriers that not all threads of a warp or CTA reach at the same place, and threads that leave others waiting, are
// reported. Shared memory starts as noise. Not modelled: the order in which global memory is seen, and alignment.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// In a section of its own, so that each CTA can be given its own copy.
#define __shared__ __attribute__((section("emulated_shared"))) static

struct EmulatedIndex {
  unsigned x;
};
// Of the fibre that runs.
extern EmulatedIndex threadIdx, blockIdx, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulator {

constexpr int kWarpSize = 32;

// A place in the source: barriers must be met by all at the same one.
struct Site {
  const char* file;
  int line;
};

// Runs a kernel on `num_ctas` CTAs of `num_threads`. Returns null, or what went wrong.
const char* launch(unsigned num_ctas, unsigned num_threads, uint64_t schedule, const std::function<void()>& kernel);

void sync_cta(Site site);
void sync_warp(Site site);
// Gives the values that all 32 lanes brought; they stay until the lane's next exchange but one.
const uint64_t* exchange(uint64_t value, Site site);
// Lets others run first, or not.
void maybe_yield();
unsigned lane();

template <class Value>
Value value_of_lane(Value value, unsigned source, Site site) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  memcpy(&value, &exchange(bits, site)[source], sizeof(value));
  return value;
}

template <class Combine>
uint32_t reduce(uint32_t value, Combine combine, Site site) {
  const uint64_t* values = exchange(value, site);
  uint32_t result = static_cast<uint32_t>(values[0]);
  for (int i = 1; i < kWarpSize; i++) result = combine(result, static_cast<uint32_t>(values[i]));
  return result;
}

template <class Value, class Change>
Value change_atomically(Value* at, Change change) {
  maybe_yield();
  const Value before = *at;
  *at = change(before);
  maybe_yield();
  return before;
}

}  // namespace emulator

#define EMULATED_SITE (emulator::Site{__FILE__, __LINE__})
#define __syncthreads() emulator::sync_cta(EMULATED_SITE)
#define __syncwarp() emulator::sync_warp(EMULATED_SITE)
// The mask is always that of all lanes.
#define __shfl_sync(mask, value, source) emulator::value_of_lane(value, source, EMULATED_SITE)
#define __shfl_xor_sync(mask, value, distance) \
  emulator::value_of_lane(value, emulator::lane() ^ static_cast<unsigned>(distance), EMULATED_SITE)
#define __shfl_up_sync(mask, value, distance)                                                                     \
  emulator::value_of_lane(                                                                                        \
      value, emulator::lane() < static_cast<unsigned>(distance) ? emulator::lane() : emulator::lane() - distance, \
      EMULATED_SITE)
#define __reduce_add_sync(mask, value) \
  emulator::reduce(value, [](uint32_t a, uint32_t b) { return a + b; }, EMULATED_SITE)
#define __reduce_max_sync(mask, value) \
  emulator::reduce(value, [](uint32_t a, uint32_t b) { return a > b ? a : b; }, EMULATED_SITE)
#define __threadfence() emulator::maybe_yield()

template <class Value>
Value atomicAdd(Value* at, Value added) {
  return emulator::change_atomically(at, [=](Value before) { return before + added; });
}
template <class Value>
Value atomicOr(Value* at, Value bits) {
  return emulator::change_atomically(at, [=](Value before) { return before | bits; });
}
template <class Value>
Value atomicExch(Value* at, Value value) {
  return emulator::change_atomically(at, [=](Value) { return value; });
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __clz(uint32_t bits) { return bits ? __builtin_clz(bits) : 32; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// Byte i of the result is the one of low (0 to 3) or high (4 to 7) that nibble i of the selector names.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  }
  return result;
}
