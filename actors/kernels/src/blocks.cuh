// Blocks of 128 elements: one bfloat16 step each, and a code an element.
#pragma once

#include "arithmetic.cuh"

namespace isthmus {

// The random signs of the rotation: the sign bit of element i of a block.
ISTHMUS_BOTH uint32_t hadamard_sign(uint32_t element) {
  const uint32_t word = element < 32   ? 0x28AC2D84u
                        : element < 64 ? 0xD2B777FCu
                        : element < 96 ? 0x8B200BDEu
                                       : 0xCD2980FEu;
  return ((word >> (element & 31)) & 1u) << 31;
}

// A step covers this multiple of itself. To nearest: more than the largest code, less than half a step more, so that
// nothing need be clamped, and chosen so that encoding what was decoded finds the same step. Stochastic: just the code.
template <int kBits, bool kStochastic>
ISTHMUS_BOTH float step_reach() {
  if (kBits == 8) return kStochastic ? 127.0f : 127.4921875f;
  return kStochastic ? 7.0f : 7.0068359375f;
}

// No encoder makes a step from here on; what is decoded stays below 2^127.
template <int kBits>
ISTHMUS_BOTH uint32_t step_limit() {
  return kBits == 8 ? (127u + 120u) << 7 : (127u + 124u) << 7;
}

// The smallest bfloat16 whose reach covers the largest value. Its products with the reach are exact.
template <int kBits, bool kStochastic>
ISTHMUS_BOTH uint32_t block_step(float largest) {
  const float reach = step_reach<kBits, kStochastic>();
  if (largest < kTiny) return 0;
  const uint32_t below = bits_of(product(largest, 1.0f / reach)) >> 16;
  return product(bfloat16_value(below), reach) < largest ? below + 1 : below;
}

ISTHMUS_BOTH float inverse_step(uint32_t step) { return step ? quotient(1.0f, bfloat16_value(step)) : 0.0f; }

// The code of a value to nearest, ties to even: the magic number moves its whole part to the lowest bits. |value| is
// covered by the step, so no clamp.
ISTHMUS_BOTH int32_t nearest(float value, float inverse) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return static_cast<int32_t>(bits_of(sum(product(value, inverse), kMagic))) - static_cast<int32_t>(0x4B400000);
}

// Random bits of a pair of neighbouring elements: the lower half is for the even one, the upper for the odd one.
ISTHMUS_BOTH uint32_t pair_random(uint32_t pair, uint32_t seed) { return mix32(pair * 0x9E3779B9u ^ seed); }

// The code of a value, rounded up with the probability of its remainder; `random` has 16 bits. The inverse is rounded,
// so the product may pass the lowest code by a rounding: from there it only goes up.
template <int kBits>
ISTHMUS_BOTH int32_t stochastic(float value, float inverse, uint32_t random) {
  constexpr float kLargest = (1 << (kBits - 1)) - 1;
  const float scaled = product(value, inverse);
  const float below = larger(floorf(scaled), -kLargest);
  const uint32_t threshold = static_cast<uint32_t>(static_cast<int32_t>(product(sum(scaled, -below), 65536.0f)));
  return static_cast<int32_t>(below) + (threshold > random ? 1 : 0);
}

}  // namespace isthmus
