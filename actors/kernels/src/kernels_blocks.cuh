// Blocks on CUDA. Eight lanes share a block: lane t holds elements 8t to 8t + 7 and 64 + 8t to 64 + 8t + 7, sixteen in
// all, so that loads and stores are whole vectors and the byte of elements i and i + 64 is made in one lane.
#pragma once

#include "blocks.cuh"
#include "kernels_grid.cuh"

namespace isthmus {

constexpr int kLanesPerBlock = 8;
constexpr int kRun = 8;
constexpr int kPerLane = 2 * kRun;
// What a CTA takes at a time.
constexpr int kBlocksPerTile = kThreads / kLanesPerBlock;

using bfloat16_t = uint16_t;

ISTHMUS_DEVICE uint32_t lane_of_block() { return threadIdx.x % kLanesPerBlock; }

// Where in its block the value at `i` of a lane's sixteen lies.
ISTHMUS_DEVICE uint32_t element_of_block(uint32_t lane, int i) {
  return (i < kRun ? 0 : kBlock / 2) + kRun * lane + i % kRun;
}

// Source and target: runs of eight elements, in vectors where the run is whole.

ISTHMUS_DEVICE float as_float(float value) { return value; }
ISTHMUS_DEVICE float as_float(bfloat16_t bits) { return bfloat16_value(bits); }

ISTHMUS_DEVICE void load_run(const float* source, float* value) {
  const float4 low = reinterpret_cast<const float4*>(source)[0];
  const float4 high = reinterpret_cast<const float4*>(source)[1];
  value[0] = low.x, value[1] = low.y, value[2] = low.z, value[3] = low.w;
  value[4] = high.x, value[5] = high.y, value[6] = high.z, value[7] = high.w;
}

ISTHMUS_DEVICE void load_run(const bfloat16_t* source, float* value) {
  const uint4 pairs = *reinterpret_cast<const uint4*>(source);
  const uint32_t pair[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    value[2 * i] = float_of(pair[i] << 16);
    value[2 * i + 1] = float_of(pair[i] & 0xFFFF0000u);
  }
}

ISTHMUS_DEVICE void store_run(const float* value, float* target) {
  reinterpret_cast<float4*>(target)[0] = float4{value[0], value[1], value[2], value[3]};
  reinterpret_cast<float4*>(target)[1] = float4{value[4], value[5], value[6], value[7]};
}

// Two bfloat16 in a word, rounded as bfloat16_bits does: one instruction from sm_80 on.
ISTHMUS_DEVICE uint32_t bfloat16_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
#endif
}

ISTHMUS_DEVICE void store_run(const float* value, bfloat16_t* target) {
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; i++) pair[i] = bfloat16_pair(value[2 * i], value[2 * i + 1]);
  *reinterpret_cast<uint4*>(target) = uint4{pair[0], pair[1], pair[2], pair[3]};
}

ISTHMUS_DEVICE void store_element(float value, float* target) { *target = value; }
ISTHMUS_DEVICE void store_element(float value, bfloat16_t* target) {
  *target = static_cast<bfloat16_t>(bfloat16_bits(value));
}

// The run of elements from `first` on, with zeros behind the last one there is.
template <class Source>
ISTHMUS_DEVICE void load_padded_run(const Source* source, uint64_t first, uint64_t num_elements, float* value) {
  if (first + kRun <= num_elements) {
    load_run(source + first, value);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; i++) value[i] = first + i < num_elements ? as_float(source[first + i]) : 0.0f;
  }
}

template <bool kAdd, class Target>
ISTHMUS_DEVICE void store_cut_run(float* value, uint64_t first, uint64_t num_elements, Target* target) {
  if (kAdd) {
    float before[kRun];
    load_padded_run(target, first, num_elements, before);
#pragma unroll
    for (int i = 0; i < kRun; i++) value[i] = sum(before[i], value[i]);
  }
  if (first + kRun <= num_elements) {
    store_run(value, target + first);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      if (first + i < num_elements) store_element(value[i], target + first + i);
    }
  }
}

// Rotation

// Bit i: the sign of the value at i of this lane's sixteen.
ISTHMUS_DEVICE uint32_t hadamard_signs(uint32_t lane) {
  uint32_t signs = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; i++) signs |= hadamard_sign(element_of_block(lane, i)) >> (31 - i);
  return signs;
}

ISTHMUS_DEVICE float with_sign(float value, uint32_t signs, int i) {
  return float_of(bits_of(value) ^ ((signs << (31 - i)) & ~kAbs));
}

ISTHMUS_DEVICE void butterfly(float& low, float& high) {
  const float difference = sum(low, -high);
  low = sum(low, high);
  high = difference;
}

// Butterflies at distance 1, 2, 4 in the lane, 8, 16, 32 between lanes, 64 in the lane. To be called by whole warps.
ISTHMUS_DEVICE void walsh_hadamard(float* value, uint32_t lane) {
#pragma unroll
  for (int distance = 1; distance < kRun; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      if (!(i & distance)) butterfly(value[i], value[i + distance]);
    }
  }
#pragma unroll
  for (int distance = 1; distance < kLanesPerBlock; distance *= 2) {
    // low + high in the lower lane, low - high in the upper: fused, yet exact to the bit, for the product is exact.
    const float own_sign = lane & distance ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      const float other = __shfl_xor_sync(kAllLanes, value[i], distance);
      value[i] = __fmaf_rn(value[i], own_sign, other);
    }
  }
#pragma unroll
  for (int i = 0; i < kRun; i++) butterfly(value[i], value[i + kRun]);
}

// Encoding

// The key of the block's largest value, or one beyond the limit where anything is infinite or NaN.
ISTHMUS_DEVICE uint32_t largest_key(const float* value) {
  // fmaxf passes NaN over; what shows it is a product with 0 that is not 0.
  float largest = 0.0f, poison = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    largest = fmaxf(largest, fabsf(value[i]));
    poison = __fmaf_rn(value[i], 0.0f, poison);
  }
  uint32_t key = poison == 0.0f ? bits_of(largest) : kAbs;
#pragma unroll
  for (int distance = 1; distance < kLanesPerBlock; distance *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, key, distance);
    key = other > key ? other : key;
  }
  return key;
}

// A byte of 4-bit codes holds elements i and i + 64, each plus 8. A sum packs them, for none overflows its place.
ISTHMUS_DEVICE void pack(const int32_t* code, uint32_t (&word)[2]) {
#pragma unroll
  for (int w = 0; w < 2; w++) {
    word[w] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      word[w] += static_cast<uint32_t>(code[4 * w + i] + 8) << (8 * i);
      word[w] += static_cast<uint32_t>(code[kRun + 4 * w + i] + 8) << (8 * i + 4);
    }
  }
}

// Four int8 a word: made as sums of bytes plus 128, whose highest bits are then turned back.
ISTHMUS_DEVICE void pack(const int32_t* code, uint32_t (&word)[4]) {
#pragma unroll
  for (int w = 0; w < 4; w++) {
    word[w] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) word[w] += static_cast<uint32_t>(code[4 * w + i] + 128) << (8 * i);
    word[w] ^= 0x80808080u;
  }
}

// The codes of a lane's sixteen values, whose first is the lower of pair `first_pair` of the whole source.
template <int kBits, bool kStochastic>
ISTHMUS_DEVICE void quantise(const float* value, float inverse, uint32_t first_pair, uint32_t seed, int32_t* code) {
#pragma unroll
  for (int i = 0; i < kPerLane; i += 2) {
    if (kStochastic) {
      const uint32_t pair = first_pair + (i < kRun ? i : kBlock / 2 + i - kRun) / 2;
      const uint32_t random = pair_random(pair, seed);
      code[i] = stochastic<kBits>(value[i], inverse, random & 0xFFFFu);
      code[i + 1] = stochastic<kBits>(value[i + 1], inverse, random >> 16);
    } else {
      code[i] = nearest(value[i], inverse);
      code[i + 1] = nearest(value[i + 1], inverse);
    }
  }
}

// A lane's codes: one pair of words of 4-bit codes, two of 8-bit codes, the second half a block behind the first.
template <int kBits>
constexpr int kPairs = kBits / 4;
constexpr int kPairStride = kLanesPerBlock;

template <int kBits>
ISTHMUS_DEVICE uint64_t first_pair_of_lane(uint64_t block, uint32_t lane) {
  return block * (kPairs<kBits> * kPairStride) + lane;
}

template <class Source, int kBits, bool kHadamard, bool kStochastic>
ISTHMUS_DEVICE void encode_blocks(const Source* source, uint64_t num_elements, uint32_t seed, uint8_t* payload,
                                  Scratch* scratch) {
  const uint32_t lane = lane_of_block();
  const uint32_t signs = kHadamard ? hadamard_signs(lane) : 0;
  uint32_t keys[2 * kPairs<kBits>];
#pragma unroll
  for (int w = 0; w < 2 * kPairs<kBits>; w++) {
    keys[w] = checksum_key(2 * (lane + w / 2 * kPairStride) + w % 2);
  }
  const uint64_t num_blocks = (num_elements + kBlock - 1) / kBlock;
  uint16_t* steps = reinterpret_cast<uint16_t*>(payload + num_blocks * (kBlock * kBits / 8));
  uint64_t checksum = 0;
  uint32_t num_bad = 0;

  // The bounds are the same for the whole CTA, so that every lane takes part in every shuffle.
  for (uint64_t first = static_cast<uint64_t>(blockIdx.x) * kBlocksPerTile; first < num_blocks;
       first += static_cast<uint64_t>(gridDim.x) * kBlocksPerTile) {
    const uint64_t block = first + threadIdx.x / kLanesPerBlock;
    float value[kPerLane];
    load_padded_run(source, block * kBlock + kRun * lane, num_elements, value);
    load_padded_run(source, block * kBlock + kBlock / 2 + kRun * lane, num_elements, value + kRun);
    if (kHadamard) {
#pragma unroll
      for (int i = 0; i < kPerLane; i++) value[i] = with_sign(value[i], signs, i);
      walsh_hadamard(value, lane);
    }
    const uint32_t key = largest_key(value);
    const bool is_bad = key >= kKeyLimit;
    const uint32_t step = is_bad ? 0 : block_step<kBits, kStochastic>(float_of(key));
    int32_t code[kPerLane];
    const uint32_t first_pair = static_cast<uint32_t>(block) * (kBlock / 2) + kRun / 2 * lane;
    quantise<kBits, kStochastic>(value, inverse_step(step), first_pair, seed, code);
    uint32_t word[2 * kPairs<kBits>];
    pack(code, word);
    if (block >= num_blocks) continue;

    uint64_t part = lane == 0 ? checksum_step(step) : 0;
    uint2* pairs = reinterpret_cast<uint2*>(payload) + first_pair_of_lane<kBits>(block, lane);
#pragma unroll
    for (int p = 0; p < kPairs<kBits>; p++) {
      const uint2 pair = is_bad ? uint2{0, 0} : uint2{word[2 * p], word[2 * p + 1]};
      pairs[p * kPairStride] = pair;
      part += checksum_pair(pair.x, pair.y, keys[2 * p], keys[2 * p + 1]);
    }
    checksum += part * checksum_weight(static_cast<uint32_t>(block));
    if (lane == 0) {
      steps[block] = static_cast<uint16_t>(step);
      num_bad += is_bad;
    }
  }
  uint8_t* padding = reinterpret_cast<uint8_t*>(steps + num_blocks);
  finish_payload(checksum, num_bad, padding, payload + up_to_8(padding - payload), scratch);
}

// Decoding

// The byte at `place` of a word as a float: it becomes the lowest byte of 2^23's fraction.
ISTHMUS_DEVICE float byte_less(uint32_t word, int place, float offset) {
  return sum(float_of(__byte_perm(word, 0x4B000000u, 0x7440 | place)), -(8388608.0f + offset));
}

ISTHMUS_DEVICE void unpack(const uint32_t (&word)[2], float* value) {
#pragma unroll
  for (int i = 0; i < kRun; i++) {
    value[i] = byte_less(word[i / 4] & 0x0F0F0F0Fu, i % 4, 8.0f);
    value[kRun + i] = byte_less((word[i / 4] >> 4) & 0x0F0F0F0Fu, i % 4, 8.0f);
  }
}

ISTHMUS_DEVICE void unpack(const uint32_t (&word)[4], float* value) {
#pragma unroll
  for (int i = 0; i < kPerLane; i++) value[i] = byte_less(word[i / 4] ^ 0x80808080u, i % 4, 128.0f);
}

// The payload must have been verified.
template <class Target, int kBits, bool kHadamard, bool kAdd>
ISTHMUS_DEVICE void decode_blocks(const uint8_t* payload, uint64_t num_elements, Target* into) {
  const uint32_t lane = lane_of_block();
  const uint32_t signs = kHadamard ? hadamard_signs(lane) : 0;
  const uint64_t num_blocks = (num_elements + kBlock - 1) / kBlock;
  const uint16_t* steps = reinterpret_cast<const uint16_t*>(payload + num_blocks * (kBlock * kBits / 8));

  for (uint64_t first = static_cast<uint64_t>(blockIdx.x) * kBlocksPerTile; first < num_blocks;
       first += static_cast<uint64_t>(gridDim.x) * kBlocksPerTile) {
    const uint64_t block = first + threadIdx.x / kLanesPerBlock;
    const bool is_block = block < num_blocks;
    const uint2* pairs = reinterpret_cast<const uint2*>(payload) + first_pair_of_lane<kBits>(block, lane);
    uint32_t word[2 * kPairs<kBits>];
#pragma unroll
    for (int p = 0; p < kPairs<kBits>; p++) {
      const uint2 pair = is_block ? pairs[p * kPairStride] : uint2{0, 0};
      word[2 * p] = pair.x;
      word[2 * p + 1] = pair.y;
    }
    float step = bfloat16_value(is_block ? steps[block] : 0);
    float value[kPerLane];
    unpack(word, value);
    if (kHadamard) {
      walsh_hadamard(value, lane);
      step = product(step, 1.0f / kBlock);
    }
    if (!is_block) continue;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      value[i] = product(value[i], step);
      if (kHadamard) value[i] = with_sign(value[i], signs, i);
    }
    const uint64_t element = block * kBlock + kRun * lane;
    store_cut_run<kAdd>(value, element, num_elements, into);
    store_cut_run<kAdd>(value + kRun, element + kBlock / 2, num_elements, into);
  }
}

}  // namespace isthmus
