// The checksum of a payload's words, a block or record at a time, and the trailer that holds it.
#pragma once

#include "cpu_vectors.h"

namespace isthmus {

// As `Fault` in layout.py.
enum Fault : int32_t { kNone = 0, kChecksum = 1, kNotFinite = 2, kGrammar = 3 };

// The keys of a block's words, padded to whole vectors.
template <int kNumWords>
struct ChecksumKeys {
  alignas(kVectorBytes) uint32_t of_word[kNumWords];

  ChecksumKeys() {
    for (int word = 0; word < kNumWords; word++) of_word[word] = checksum_key(static_cast<uint32_t>(word));
  }
};

// The sum over pairs of `checksum_pair`, a vector of pairs at a time: a pair is 64 bits, its even word the lower half.
template <int kNumBytes>
static inline uint64_t sum_of_pairs(const uint8_t* bytes, const ChecksumKeys<kNumBytes / 4>& keys) {
  static_assert(kNumBytes % kVectorBytes == 0, "whole vectors");
  Vector<uint64_t> sums = {};
  for (int offset = 0; offset < kNumBytes; offset += kVectorBytes) {
    const auto words = load<Vector<uint32_t>>(bytes + offset);
    const auto keyed = (Vector<uint64_t>)(words + load<Vector<uint32_t>>(keys.of_word + offset / 4));
    const auto pairs = (Vector<uint64_t>)words;
    sums += product_of_halves(keyed) + (pairs >> 32 | pairs << 32);
  }
  uint64_t sum = 0;
  for (int lane = 0; lane < kLanes<uint64_t>; lane++) sum += sums[lane];
  return sum;
}

static inline void write_trailer(uint8_t* trailer, uint64_t checksum, uint64_t num_bad) {
  memcpy(trailer, &checksum, 8);
  memcpy(trailer + 8, &num_bad, 8);
}

static inline Fault trailer_fault(const uint8_t* trailer, uint64_t checksum) {
  uint64_t said, num_bad;
  memcpy(&said, trailer, 8);
  memcpy(&num_bad, trailer + 8, 8);
  if (said != checksum) return kChecksum;
  return num_bad ? kNotFinite : kNone;
}

static inline int64_t to_8(int64_t size_bytes) { return (size_bytes + 7) / 8 * 8; }

static inline bool is_zero(const uint8_t* begin, const uint8_t* end) {
  uint8_t any = 0;
  for (; begin < end; begin++) any |= *begin;
  return !any;
}

}  // namespace isthmus
