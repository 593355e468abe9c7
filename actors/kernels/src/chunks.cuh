// Chunks of 4096 elements, thinned to their k largest: the levels' rule, and where a record's bits lie.
#pragma once

#include "arithmetic.cuh"

namespace isthmus {

// No encoder makes a level from here on.
constexpr uint32_t kLevelLimit = kKeyLimit >> 16;
constexpr int kMaxKept = 128;
// Of the largest record: k = 128, two bits.
constexpr int kMaxRecordBytes = 148;

// The sections of a record, in bits from its start.
struct RecordLayout {
  int kept, value_bits, low_bits, high_bits;
};

ISTHMUS_BOTH RecordLayout record_layout(int kept, int value_bits) {
  int low_bits = 0;
  while ((kChunk >> (low_bits + 1)) >= kept) low_bits++;
  return {kept, value_bits, low_bits, kept + (kChunk >> low_bits)};
}

constexpr int kLowStart = 32;

ISTHMUS_BOTH int high_start(const RecordLayout& layout) { return kLowStart + layout.kept * layout.low_bits; }

ISTHMUS_BOTH int values_start(const RecordLayout& layout) { return high_start(layout) + layout.high_bits; }

ISTHMUS_BOTH int record_bytes(const RecordLayout& layout) {
  return (values_start(layout) + layout.kept * layout.value_bits) / 8;
}

// A magnitude in units of the chunk's largest over 2^20, so that means are sums of integers.
ISTHMUS_BOTH uint32_t fixed_point(float magnitude, float inverse_largest) {
  return static_cast<uint32_t>(static_cast<int32_t>(product(product(magnitude, inverse_largest), 1048576.0f)));
}

ISTHMUS_BOTH float inverse_largest(float largest) { return largest < kTiny ? 0.0f : quotient(1.0f, largest); }

ISTHMUS_BOTH uint32_t exponent_of_key(uint32_t key) { return key >> 23 ? key >> 23 : 1; }

// The level of a group of values: their mean, made such that value - level is exact. `smallest` and `greatest` are
// keys over the group, `smallest` of those that are not 0, or kAbs where there is none.
ISTHMUS_BOTH uint32_t group_level(uint32_t total, uint32_t count, uint32_t smallest, uint32_t greatest, float largest) {
  if (count == 0 || smallest == kAbs) return 0;
  const float mean = product(static_cast<float>(total / count), 1.0f / 1048576.0f);
  uint32_t level = bfloat16_bits(product(mean, largest));
  // Below twice the power of two in the smallest value.
  const uint32_t most = (exponent_of_key(smallest) << 7) | 0x7Fu;
  if (level > most) level = most;
  const uint32_t level_exponent = level >> 7 ? level >> 7 : 1;
  return exponent_of_key(greatest) > level_exponent + 16 ? 0 : level;
}

}  // namespace isthmus
