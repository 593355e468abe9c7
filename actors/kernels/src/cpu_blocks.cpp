// Blocks of 128 elements on the CPU: encode, verify, decode. `reference.py` specifies each; layout.py has the layout.

#include "cpu_checksum.h"
#include "cpu_hadamard.h"

namespace isthmus {

template <int kBits>
constexpr int kCodesBytes = kBlock * kBits / 8;

// Where a payload's sections start.
struct BlocksLayout {
  int64_t num_blocks, steps, steps_end, trailer;
};

static BlocksLayout blocks_layout(int64_t num_elements, int bits) {
  const int64_t num_blocks = (num_elements + kBlock - 1) / kBlock;
  const int64_t steps = num_blocks * (kBlock * bits / 8);
  return {num_blocks, steps, steps + 2 * num_blocks, steps + to_8(2 * num_blocks)};
}

template <int kBits>
static const ChecksumKeys<kCodesBytes<kBits> / 4> kKeys;

template <int kBits>
static inline uint64_t block_checksum(const uint8_t* codes, uint32_t step, int64_t block) {
  const uint64_t sum = sum_of_pairs<kCodesBytes<kBits>>(codes, kKeys<kBits>) + checksum_step(step);
  return sum * checksum_weight(static_cast<uint32_t>(block));
}

static inline float float32_of(float stored) { return stored; }
static inline float float32_of(uint16_t stored) { return bfloat16_value(stored); }

// The last block may have fewer than 128 elements; the rest are 0.
template <typename Source>
static inline void load_block(const Source* source, int64_t num_left, float* values) {
  if (num_left >= kBlock) {
    for (int i = 0; i < kBlock; i++) values[i] = float32_of(source[i]);
    return;
  }
  for (int i = 0; i < kBlock; i++) values[i] = i < num_left ? float32_of(source[i]) : 0.0f;
}

static inline uint32_t largest_key(const float* values) {
  uint32_t largest = 0;
  for (int i = 0; i < kBlock; i++) {
    const uint32_t key = key_of(values[i]);
    largest = key > largest ? key : largest;
  }
  return largest;
}

static inline void round_to_nearest(const float* values, float inverse, int8_t* quantised) {
  for (int i = 0; i < kBlock; i++) quantised[i] = static_cast<int8_t>(nearest(values[i], inverse));
}

template <int kBits>
static inline void round_stochastically(const float* values, float inverse, int64_t block, uint32_t seed,
                                        int8_t* quantised) {
  const uint32_t first_pair = static_cast<uint32_t>(block) * (kBlock / 2);
  uint32_t random[kBlock];
  for (uint32_t pair = 0; pair < kBlock / 2; pair++) {
    const uint32_t both = pair_random(first_pair + pair, seed);
    random[2 * pair] = both & 0xFFFFu;
    random[2 * pair + 1] = both >> 16;
  }
  for (int i = 0; i < kBlock; i++) {
    quantised[i] = static_cast<int8_t>(stochastic<kBits>(values[i], inverse, random[i]));
  }
}

template <int kBits>
static inline void pack(const int8_t* quantised, uint8_t* codes) {
  for (int i = 0; i < kCodesBytes<kBits>; i++) {
    if (kBits == 8) {
      codes[i] = static_cast<uint8_t>(quantised[i]);
    } else {
      codes[i] = static_cast<uint8_t>((quantised[i] + 8) | (quantised[i + kBlock / 2] + 8) << 4);
    }
  }
}

struct Rounding {
  bool hadamard, stochastic;
  uint32_t seed;
};

// Write a block's codes and return its step. False where it cannot be encoded: codes and step are 0.
template <int kBits>
static inline bool encode_block(float* values, const Rounding& rounding, int64_t block, uint8_t* codes,
                                uint32_t* step) {
  if (rounding.hadamard) {
    flip_signs(values);
    walsh_hadamard(values);
  }
  const uint32_t largest = largest_key(values);
  if (largest >= kKeyLimit) {
    memset(codes, 0, kCodesBytes<kBits>);
    *step = 0;
    return false;
  }
  alignas(kVectorBytes) int8_t quantised[kBlock];
  if (rounding.stochastic) {
    *step = block_step<kBits, true>(float_of(largest));
    round_stochastically<kBits>(values, inverse_step(*step), block, rounding.seed, quantised);
  } else {
    *step = block_step<kBits, false>(float_of(largest));
    round_to_nearest(values, inverse_step(*step), quantised);
  }
  pack<kBits>(quantised, codes);
  return true;
}

template <int kBits, typename Source>
static void encode_blocks(const Source* source, int64_t num_elements, const Rounding& rounding, uint8_t* payload) {
  const BlocksLayout layout = blocks_layout(num_elements, kBits);
  uint64_t checksum = 0, num_bad = 0;
  for (int64_t block = 0; block < layout.num_blocks; block++) {
    alignas(kVectorBytes) float values[kBlock];
    alignas(kVectorBytes) uint8_t codes[kCodesBytes<kBits>];
    uint32_t step;
    load_block(source + block * kBlock, num_elements - block * kBlock, values);
    num_bad += !encode_block<kBits>(values, rounding, block, codes, &step);
    checksum += block_checksum<kBits>(codes, step, block);
    memcpy(payload + block * kCodesBytes<kBits>, codes, sizeof codes);
    const uint16_t stored_step = static_cast<uint16_t>(step);
    memcpy(payload + layout.steps + 2 * block, &stored_step, 2);
  }
  memset(payload + layout.steps_end, 0, static_cast<size_t>(layout.trailer - layout.steps_end));
  write_trailer(payload + layout.trailer, checksum, num_bad);
}

// Codes are symmetric: their lowest value is never made.
template <int kBits>
static inline bool has_lowest_code(const uint8_t* codes) {
  uint8_t found = 0;
  for (int i = 0; i < kCodesBytes<kBits>; i++) {
    found |= kBits == 8 ? codes[i] == 0x80 : ((codes[i] & 0x0F) == 0) | ((codes[i] & 0xF0) == 0);
  }
  return found;
}

static inline uint32_t step_at(const uint8_t* steps, int64_t block) {
  uint16_t step;
  memcpy(&step, steps + 2 * block, 2);
  return step;
}

template <int kBits>
static Fault verify_blocks(const uint8_t* payload, int64_t num_elements) {
  const BlocksLayout layout = blocks_layout(num_elements, kBits);
  uint64_t checksum = 0;
  bool is_made = is_zero(payload + layout.steps_end, payload + layout.trailer);
  for (int64_t block = 0; block < layout.num_blocks; block++) {
    const uint8_t* codes = payload + block * kCodesBytes<kBits>;
    const uint32_t step = step_at(payload + layout.steps, block);
    checksum += block_checksum<kBits>(codes, step, block);
    is_made &= step < step_limit<kBits>() && !has_lowest_code<kBits>(codes);
  }
  const Fault fault = trailer_fault(payload + layout.trailer, checksum);
  return fault != kNone || is_made ? fault : kGrammar;
}

template <int kBits>
static inline void unpack(const uint8_t* codes, int16_t* quantised) {
  for (int i = 0; i < kCodesBytes<kBits>; i++) {
    if (kBits == 8) {
      quantised[i] = static_cast<int8_t>(codes[i]);
    } else {
      quantised[i] = static_cast<int16_t>((codes[i] & 0x0F) - 8);
      quantised[i + kBlock / 2] = static_cast<int16_t>((codes[i] >> 4) - 8);
    }
  }
}

// A rotated block is sums of at most 128 codes: exact in 16 bits.
template <int kBits>
static inline void decode_block(const uint8_t* codes, uint32_t step, bool hadamard, float* values) {
  alignas(kVectorBytes) int16_t quantised[kBlock];
  unpack<kBits>(codes, quantised);
  if (!hadamard) {
    for (int i = 0; i < kBlock; i++) values[i] = product(quantised[i], bfloat16_value(step));
    return;
  }
  walsh_hadamard(quantised);
  const float scale = product(bfloat16_value(step), 1.0f / kBlock);
  for (int i = 0; i < kBlock; i++) values[i] = product(quantised[i], scale);
  flip_signs(values);
}

// What becomes of the decoded elements.
enum class Into : int32_t { kFloat32 = 0, kBfloat16 = 1, kAddFloat32 = 2 };

// A result of this size does not stay in the caches, and a load of each line only to overwrite it would cost a third.
constexpr int64_t kPastCachesBytes = 8 << 20;

static inline void write_past_caches(const float* values, float* into) {
  for (int i = 0; i < kBlock; i += kLanes<float>) store_past_caches(into + i, load<Vector<float>>(values + i));
}

static inline void put_block(const float* values, int count, Into how, void* into, int64_t first) {
  float* floats = static_cast<float*>(into) + first;
  uint16_t* halves = static_cast<uint16_t*>(into) + first;
  switch (how) {
    case Into::kFloat32:
      memcpy(floats, values, static_cast<size_t>(count) * sizeof(float));
      break;
    case Into::kAddFloat32:
      for (int i = 0; i < count; i++) floats[i] = sum(floats[i], values[i]);
      break;
    case Into::kBfloat16:
      for (int i = 0; i < count; i++) halves[i] = static_cast<uint16_t>(bfloat16_bits(values[i]));
      break;
  }
}

template <int kBits>
static void decode_blocks(const uint8_t* payload, int64_t num_elements, bool hadamard, Into how, void* into) {
  const BlocksLayout layout = blocks_layout(num_elements, kBits);
  const bool past_caches = how == Into::kFloat32 && num_elements * 4 >= kPastCachesBytes &&
                           reinterpret_cast<uintptr_t>(into) % kVectorBytes == 0;
  for (int64_t block = 0; block < layout.num_blocks; block++) {
    alignas(kVectorBytes) float values[kBlock];
    decode_block<kBits>(payload + block * kCodesBytes<kBits>, step_at(payload + layout.steps, block), hadamard, values);
    const int64_t first = block * kBlock, num_left = num_elements - first;
    if (num_left < kBlock) {
      put_block(values, static_cast<int>(num_left), how, into, first);
    } else if (past_caches) {
      write_past_caches(values, static_cast<float*>(into) + first);
    } else {
      put_block(values, kBlock, how, into, first);
    }
  }
  if (past_caches) finish_stores();
}

template <int kBits>
static void encode_blocks_of(const void* source, int32_t is_bfloat16, int64_t num_elements, const Rounding& rounding,
                             uint8_t* payload) {
  if (is_bfloat16) {
    encode_blocks<kBits>(static_cast<const uint16_t*>(source), num_elements, rounding, payload);
  } else {
    encode_blocks<kBits>(static_cast<const float*>(source), num_elements, rounding, payload);
  }
}

}  // namespace isthmus

using namespace isthmus;

extern "C" void isthmus_encode_blocks(const void* source, int32_t is_bfloat16, int64_t num_elements, int32_t bits,
                                      int32_t hadamard, int32_t stochastic, uint32_t seed, uint8_t* payload) {
  const Rounding rounding = {hadamard != 0, stochastic != 0, seed};
  if (bits == 8) {
    encode_blocks_of<8>(source, is_bfloat16, num_elements, rounding, payload);
  } else {
    encode_blocks_of<4>(source, is_bfloat16, num_elements, rounding, payload);
  }
}

extern "C" int32_t isthmus_verify_blocks(const uint8_t* payload, int64_t num_elements, int32_t bits) {
  return bits == 8 ? verify_blocks<8>(payload, num_elements) : verify_blocks<4>(payload, num_elements);
}

extern "C" void isthmus_decode_blocks(const uint8_t* payload, int64_t num_elements, int32_t bits, int32_t hadamard,
                                      int32_t how, void* into) {
  if (bits == 8) {
    decode_blocks<8>(payload, num_elements, hadamard != 0, static_cast<Into>(how), into);
  } else {
    decode_blocks<4>(payload, num_elements, hadamard != 0, static_cast<Into>(how), into);
  }
}
