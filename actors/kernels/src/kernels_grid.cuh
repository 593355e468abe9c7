// What the CUDA kernels share: the shape of their grid, sums over a warp, and the trailer that ends a payload.
#pragma once

#include "arithmetic.cuh"

#define ISTHMUS_DEVICE static __device__ __forceinline__

namespace isthmus {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

ISTHMUS_DEVICE int lane_of_warp() { return threadIdx.x % kWarpSize; }
ISTHMUS_DEVICE int warp_of_cta() { return threadIdx.x / kWarpSize; }

// Sums and bounds over a warp, told to every lane. One instruction from sm_80 on, else five shuffles.
#if (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800) || defined(ISTHMUS_SHUFFLES_ONLY)
ISTHMUS_DEVICE uint32_t warp_sum(uint32_t value) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}
ISTHMUS_DEVICE uint32_t warp_max(uint32_t value) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value ? other : value;
  }
  return value;
}
#else
ISTHMUS_DEVICE uint32_t warp_sum(uint32_t value) { return __reduce_add_sync(kAllLanes, value); }
ISTHMUS_DEVICE uint32_t warp_max(uint32_t value) { return __reduce_max_sync(kAllLanes, value); }
#endif

ISTHMUS_DEVICE uint32_t warp_min(uint32_t value) { return ~warp_max(~value); }

ISTHMUS_DEVICE unsigned long long warp_sum_64(unsigned long long value) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// What the CTAs of one launch add up. Zero before the first launch on a stream; each launch leaves it zero.
struct Scratch {
  unsigned long long checksum;
  unsigned long long num_bad;
  unsigned int arrivals;
};

// Ends a payload: each thread brings its share of the checksum and of the bad blocks; the last CTA to arrive writes
// zeros from `padding` on, and the trailer. To be called by every thread, once.
ISTHMUS_DEVICE void finish_payload(uint64_t checksum, uint32_t num_bad, uint8_t* padding, uint8_t* trailer,
                                   Scratch* scratch) {
  __shared__ unsigned long long checksum_of_warp[kWarps];
  __shared__ uint32_t num_bad_of_warp[kWarps];
  const unsigned long long warp_checksum = warp_sum_64(checksum);
  const uint32_t warp_num_bad = warp_sum(num_bad);
  if (lane_of_warp() == 0) {
    checksum_of_warp[warp_of_cta()] = warp_checksum;
    num_bad_of_warp[warp_of_cta()] = warp_num_bad;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;

  unsigned long long cta_checksum = 0;
  uint32_t cta_num_bad = 0;
  for (int warp = 0; warp < kWarps; warp++) {
    cta_checksum += checksum_of_warp[warp];
    cta_num_bad += num_bad_of_warp[warp];
  }
  atomicAdd(&scratch->checksum, cta_checksum);
  if (cta_num_bad) atomicAdd(&scratch->num_bad, static_cast<unsigned long long>(cta_num_bad));
  // Whoever sees this CTA's arrival sees its sums.
  __threadfence();
  if (atomicAdd(&scratch->arrivals, 1u) != gridDim.x - 1) return;
  __threadfence();
  unsigned long long* words = reinterpret_cast<unsigned long long*>(trailer);
  words[0] = atomicExch(&scratch->checksum, 0ull);
  words[1] = atomicExch(&scratch->num_bad, 0ull);
  atomicExch(&scratch->arrivals, 0u);
  for (; padding < trailer; padding++) *padding = 0;
}

ISTHMUS_DEVICE uint64_t up_to_8(uint64_t size_bytes) { return (size_bytes + 7) / 8 * 8; }

}  // namespace isthmus
