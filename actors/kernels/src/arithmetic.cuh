// What decides a wire byte, in one place for every compiler: g++ (the CPU library and the tests' emulator), NVRTC and
// nvcc. `reference.py` is the specification. Build with -ffp-contract=off, --fmad=false, and no fast-math or ftz.
#pragma once

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <math.h>
#include <stdint.h>
#include <string.h>
#endif

#if defined(__CUDACC__)
#define ISTHMUS_BOTH __host__ __device__ __forceinline__
#else
#define ISTHMUS_BOTH static inline __attribute__((always_inline))
#endif

namespace isthmus {

constexpr int kBlock = 128;
constexpr int kChunk = 4096;

// A value of 2^126 or more, an infinity or NaN has a key (its bits without the sign) from here on: not encodable.
constexpr uint32_t kKeyLimit = 0x7E800000u;
constexpr uint32_t kAbs = 0x7FFFFFFFu;
// Where the largest value is below this, the step or level is 0.
constexpr float kTiny = 1e-30f;

ISTHMUS_BOTH uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
#endif
}

ISTHMUS_BOTH float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, 4);
  return value;
#endif
}

ISTHMUS_BOTH uint32_t key_of(float value) { return bits_of(value) & kAbs; }

// Each of these is rounded once, and never contracted with its neighbour.
ISTHMUS_BOTH float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

ISTHMUS_BOTH float sum(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

ISTHMUS_BOTH float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// The larger of two numbers that are not both 0; `b` where `a` is NaN. Of fmaxf g++ makes a call an element.
ISTHMUS_BOTH float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}

ISTHMUS_BOTH float bfloat16_value(uint32_t bits) { return float_of(bits << 16); }

// To nearest, ties to even; of finite values.
ISTHMUS_BOTH uint32_t bfloat16_bits(float value) {
  const uint32_t bits = bits_of(value);
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

// 32 well-mixed bits of 32: a bijection of xor-shifts and odd multipliers.
ISTHMUS_BOTH uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The checksum: a sum modulo 2^64 over blocks, so that any order of adding them gives the same.
//   sum over blocks of checksum_weight(block) * (sum over pairs of checksum_pair + checksum_step)

ISTHMUS_BOTH uint32_t checksum_key(uint32_t word) { return mix32(0x49535448u + word); }

ISTHMUS_BOTH uint64_t checksum_pair(uint32_t even, uint32_t odd, uint32_t even_key, uint32_t odd_key) {
  const uint64_t keyed = static_cast<uint64_t>(even + even_key) * static_cast<uint64_t>(odd + odd_key);
  return keyed + odd + (static_cast<uint64_t>(even) << 32);
}

ISTHMUS_BOTH uint64_t checksum_step(uint32_t step) { return step * 0x9E3779B97F4A7C15ull; }

ISTHMUS_BOTH uint64_t checksum_weight(uint32_t block) { return 2 * static_cast<uint64_t>(mix32(block)) + 1; }

}  // namespace isthmus
