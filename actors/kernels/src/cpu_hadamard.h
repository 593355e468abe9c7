// The Walsh-Hadamard transform of a block, in vectors.
#pragma once

#include "blocks.cuh"
#include "cpu_vectors.h"

namespace isthmus {

template <typename Element>
struct IndexOf;
template <>
struct IndexOf<float> {
  typedef int32_t type;
};
template <>
struct IndexOf<int16_t> {
  typedef int16_t type;
};

// Each lane meets the one at `kDistance`: the lower gets their sum, the upper their difference. A product with 1 or -1
// is exact, so each result is rounded once.
template <int kDistance, typename Element, int... kLane>
static inline Vector<Element> butterflies(Vector<Element> lanes, std::integer_sequence<int, kLane...>) {
  const Vector<typename IndexOf<Element>::type> partners = {(kLane ^ kDistance)...};
  const Vector<Element> signs = {static_cast<Element>(kLane & kDistance ? -1 : 1)...};
  return __builtin_shuffle(lanes, partners) + lanes * signs;
}

// The stages at distances from kDistance up that stay inside a vector.
template <int kDistance, typename Element>
static inline Vector<Element> stages_within(Vector<Element> lanes) {
  if constexpr (kDistance < kLanes<Element>) {
    lanes = butterflies<kDistance, Element>(lanes, std::make_integer_sequence<int, kLanes<Element>>());
    return stages_within<2 * kDistance, Element>(lanes);
  }
  return lanes;
}

// In place and unnormalised: butterflies at distance 1, 2, 4, ... 64, in this order. `block` lies on kVectorBytes.
template <typename Element>
static inline void walsh_hadamard(Element* block) {
  constexpr int kVectors = kBlock / kLanes<Element>;
  Vector<Element> vectors[kVectors];
#pragma GCC unroll 32
  for (int at = 0; at < kVectors; at++) {
    vectors[at] = stages_within<1, Element>(load<Vector<Element>>(block + at * kLanes<Element>));
  }
#pragma GCC unroll 6
  for (int distance = 1; distance < kVectors; distance *= 2) {
#pragma GCC unroll 32
    for (int at = 0; at < kVectors; at++) {
      if (at & distance) continue;
      const Vector<Element> low = vectors[at], high = vectors[at + distance];
      vectors[at] = low + high;
      vectors[at + distance] = low - high;
    }
  }
#pragma GCC unroll 32
  for (int at = 0; at < kVectors; at++) store(block + at * kLanes<Element>, vectors[at]);
}

// The sign bit that the rotation gives each element.
struct HadamardSigns {
  alignas(kVectorBytes) uint32_t of_element[kBlock];

  HadamardSigns() {
    for (int element = 0; element < kBlock; element++) {
      of_element[element] = hadamard_sign(static_cast<uint32_t>(element));
    }
  }
};

static const HadamardSigns kSigns;

static inline void flip_signs(float* block) {
  for (int element = 0; element < kBlock; element++) {
    block[element] = float_of(bits_of(block[element]) ^ kSigns.of_element[element]);
  }
}

}  // namespace isthmus
