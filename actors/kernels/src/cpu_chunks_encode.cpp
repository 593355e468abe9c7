// Chunks of 4096 elements on the CPU: encode the largest, with error feedback. `reference.py` specifies it.
//
// The largest are found by bisection over keys, among candidates that a guess from the chunk before has thinned out.
// The loops over what is kept do without branches: signs and levels are as good as random.

#include "cpu_chunks.h"

namespace isthmus {

// How far below the last chunk's threshold the next one's is looked for first: a quarter of its power of two.
constexpr uint32_t kGuessMargin = 1u << 21;

// Room for positions in a chunk, as `positions_of` wants it.
constexpr int kPositionRoom = kChunk + kAtOnce;

// beta * residual + delta as bits, filled with zeros to a chunk. Returns the largest key. Of a last chunk only: a whole
// one is added up while it is searched.
static inline uint32_t add_feedback(const float* delta, const float* residual, int count, float beta, uint32_t* sums) {
  uint32_t largest = 0;
  for (int i = 0; i < count; i++) {
    sums[i] = bits_of(sum(product(residual[i], beta), delta[i]));
    const uint32_t key = sums[i] & kAbs;
    largest = key > largest ? key : largest;
  }
  memset(sums + count, 0, static_cast<size_t>(kChunk - count) * sizeof(uint32_t));
  return largest;
}

// The same of kAtOnce elements of a whole chunk, and their largest keys, lane by lane.
struct LargestKeys {
  static constexpr int kVectors = kAtOnce / kLanes<uint32_t>;
  Vector<uint32_t> of_lane[kVectors] = {};

  void add_feedback(const float* delta, const float* residual, float beta, uint32_t* sums) {
#pragma GCC unroll 4
    for (int at = 0; at < kVectors; at++) {
      const int first = at * kLanes<uint32_t>;
      const auto bits =
          (Vector<uint32_t>)(load<Vector<float>>(residual + first) * beta + load<Vector<float>>(delta + first));
      store(sums + first, bits);
      const Vector<uint32_t> keys = bits & kAbs;
      of_lane[at] = keys > of_lane[at] ? keys : of_lane[at];
    }
  }

  uint32_t largest() const {
    uint32_t found = 0;
    for (const auto& lanes : of_lane) {
      for (int lane = 0; lane < kLanes<uint32_t>; lane++) found = lanes[lane] > found ? lanes[lane] : found;
    }
    return found;
  }
};

// The elements of a chunk that may be among its largest, ascending; their keys are filled up with zeros.
struct Candidates {
  int count;
  uint32_t at_least;
  uint32_t positions[kPositionRoom], keys[kPositionRoom];

  int padded_count() const { return (count + kAtOnce - 1) / kAtOnce * kAtOnce; }
};

// All with keys from `guess` up, or from as much less as it takes to have `kept` of them. `before` is called as
// `positions_of` says, the first time that all are searched.
template <typename Before>
static inline void find_candidates(const uint32_t* sums, int kept, uint32_t guess, Before before, Candidates* found) {
  found->at_least = guess;
  found->count = positions_of(sums, kChunk, guess, found->positions, before);
  for (uint32_t less = kGuessMargin; found->count < kept; less *= 2) {
    found->at_least = found->at_least > less ? found->at_least - less : 0;
    found->count = positions_of(sums, kChunk, found->at_least, found->positions, [](int) {});
  }
  for (int i = 0; i < found->count; i++) found->keys[i] = sums[found->positions[i]] & kAbs;
  memset(found->keys + found->count, 0, kAtOnce * sizeof(uint32_t));
}

static inline int count_at_least(const uint32_t* keys, int num_keys, uint32_t at_least) {
  int count = 0;
  // Keys are positive as signed numbers too, which older processors compare faster.
  for (int i = 0; i < num_keys; i++) count += static_cast<int32_t>(keys[i]) >= static_cast<int32_t>(at_least);
  return count;
}

// The largest threshold that at least `kept` candidates reach, or any that just `kept` of them reach.
static inline uint32_t find_threshold(const Candidates& candidates, int kept, uint32_t largest) {
  uint32_t low = candidates.at_least, beyond = largest + 1;
  int reached = candidates.count;
  while (reached != kept && beyond - low > 1) {
    const uint32_t middle = low + (beyond - low) / 2;
    const int count = count_at_least(candidates.keys, candidates.padded_count(), middle);
    if (count >= kept) {
      low = middle;
      reached = count;
    } else {
      beyond = middle;
    }
  }
  return low;
}

// What is kept of a chunk, ascending by index: float bits, and which go to the high level.
struct Kept {
  uint32_t index[kMaxKept], value[kMaxKept], is_high[kMaxKept];
};

// Those above the threshold, and of those on it the first ones: from the last one back, tied ones are passed over.
static inline void keep(const uint32_t* sums, const Candidates& candidates, uint32_t threshold, int kept,
                        Kept* chosen) {
  uint32_t places[kPositionRoom];
  // None is a filled-up zero: at a threshold of 0 the whole chunk is candidates, and nothing is filled up.
  int at = positions_of(candidates.keys, candidates.padded_count(), threshold, places, [](int) {});
  int to_drop = at - kept;
  for (int rank = kept; rank > 0;) {
    const uint32_t place = places[--at];
    if (to_drop > 0 && candidates.keys[place] == threshold) {
      to_drop--;
    } else {
      chosen->index[--rank] = candidates.positions[place];
    }
  }
  for (int rank = 0; rank < kept; rank++) chosen->value[rank] = sums[chosen->index[rank]];
}

struct Levels {
  uint32_t of_low, of_high;
};

// The level of those kept whose `is_high` is `which`.
static inline uint32_t level_of(const Kept& chosen, const uint32_t* fixed, uint32_t which, int kept, float largest) {
  uint32_t total = 0, count = 0, smallest = kAbs, greatest = 0;
  for (int rank = 0; rank < kept; rank++) {
    const bool is_in = chosen.is_high[rank] == which;
    const uint32_t key = is_in ? chosen.value[rank] & kAbs : 0;
    const uint32_t key_or_most = key ? key : kAbs;
    total += is_in ? fixed[rank] : 0;
    count += is_in;
    smallest = key_or_most < smallest ? key_or_most : smallest;
    greatest = key > greatest ? key : greatest;
  }
  return group_level(total, count, smallest, greatest, largest);
}

// Those at least as large as the mean go to the high level, unless there is only one.
static inline Levels choose_levels(const RecordLayout& layout, float largest, Kept* chosen) {
  const float inverse = inverse_largest(largest);
  uint32_t fixed[kMaxKept], total = 0;
  for (int rank = 0; rank < layout.kept; rank++) {
    fixed[rank] = fixed_point(float_of(chosen->value[rank] & kAbs), inverse);
    total += fixed[rank];
  }
  const uint32_t high_from = layout.value_bits == 2 ? total / static_cast<uint32_t>(layout.kept) : ~0u;
  for (int rank = 0; rank < layout.kept; rank++) chosen->is_high[rank] = fixed[rank] >= high_from;
  return {level_of(*chosen, fixed, 0, layout.kept, largest), level_of(*chosen, fixed, 1, layout.kept, largest)};
}

// Eight indices' low bits fill as many bytes as each has bits. Eight bytes are stored at once: what comes next
// overwrites those that were too many.
static inline void write_low_bits(const Kept& chosen, const RecordLayout& layout, uint8_t* bytes) {
  for (int first = 0; first < layout.kept; first += 8, bytes += layout.low_bits) {
    uint64_t eight = 0;
    for (int i = 0; i < 8; i++) {
      const uint64_t low = chosen.index[first + i] & ((1u << layout.low_bits) - 1);
      eight |= low << (i * layout.low_bits);
    }
    memcpy(bytes, &eight, 8);
  }
}

static inline void write_unary(const Kept& chosen, const RecordLayout& layout, uint8_t* bytes) {
  for (int first_bit = 0; first_bit < layout.high_bits; first_bit += 64, bytes += 8) {
    uint64_t word = 0;
    for (int rank = 0; rank < layout.kept; rank++) {
      // Wraps around, and so is no place in this word, where the bit lies before it.
      const uint32_t place = (chosen.index[rank] >> layout.low_bits) + static_cast<uint32_t>(rank - first_bit);
      word |= static_cast<uint64_t>(place < 64) << (place & 63);
    }
    memcpy(bytes, &word, 8);
  }
}

static inline void write_values(const Kept& chosen, const RecordLayout& layout, uint8_t* bytes) {
  const int values_in_word = 32 / layout.value_bits;
  for (int first = 0; first < layout.kept; first += values_in_word, bytes += 4) {
    uint32_t word = 0;
    for (int i = 0; i < values_in_word; i++) {
      const uint32_t value = chosen.value[first + i] >> 31 | chosen.is_high[first + i] << 1;
      word |= value << (i * layout.value_bits);
    }
    memcpy(bytes, &word, 4);
  }
}

static inline void write_record(const Kept& chosen, const Levels& levels, const RecordLayout& layout, uint8_t* bytes) {
  const uint32_t both = levels.of_low | levels.of_high << 16;
  memcpy(bytes, &both, 4);
  write_low_bits(chosen, layout, bytes + kLowStart / 8);
  write_unary(chosen, layout, bytes + high_start(layout) / 8);
  write_values(chosen, layout, bytes + values_start(layout) / 8);
}

static inline void take_out_sent(const Kept& chosen, const Levels& levels, int kept, uint32_t* sums) {
  const float low = bfloat16_value(levels.of_low), high = bfloat16_value(levels.of_high);
  uint32_t left[kMaxKept];
  for (int rank = 0; rank < kept; rank++) {
    const uint32_t value = chosen.value[rank];
    // The level with the opposite sign.
    const uint32_t taken = bits_of(chosen.is_high[rank] ? high : low) | (~value & ~kAbs);
    left[rank] = bits_of(sum(float_of(value), float_of(taken)));
  }
  for (int rank = 0; rank < kept; rank++) sums[chosen.index[rank]] = left[rank];
}

// Encodes one chunk after the other: room for one, and where the last one's threshold lay.
struct ChunkEncoder {
  RecordLayout layout;
  float beta;
  uint32_t guess = 0;
  alignas(kVectorBytes) uint32_t sums[kChunk];
  Candidates candidates;

  ChunkEncoder(const RecordLayout& of_record, float of_feedback) : layout(of_record), beta(of_feedback) {}

  // Write a record, and to the residual what it does not carry. False where the chunk cannot be encoded: neither is.
  bool encode(const float* delta, float* residual, int count, uint8_t* record) {
    const uint32_t largest = count == kChunk ? add_and_search(delta, residual)
                                             : add_feedback(delta, residual, count, beta, sums);
    if (largest >= kKeyLimit) return false;
    if (count < kChunk) find_candidates(sums, layout.kept, guess, [](int) {}, &candidates);
    const uint32_t threshold = find_threshold(candidates, layout.kept, largest);
    guess = threshold > kGuessMargin ? threshold - kGuessMargin : 0;
    Kept chosen;
    keep(sums, candidates, threshold, layout.kept, &chosen);
    const Levels levels = choose_levels(layout, float_of(largest), &chosen);
    write_record(chosen, levels, layout, record);
    take_out_sent(chosen, levels, layout.kept, sums);
    memcpy(residual, sums, static_cast<size_t>(count) * sizeof(float));
    return true;
  }

 private:
  // In one pass over a whole chunk, and return its largest key.
  uint32_t add_and_search(const float* delta, const float* residual) {
    LargestKeys keys;
    // A copy: what is written to the sums might else be it.
    const float factor = beta;
    const auto add_next = [&, factor](int at) {
      // The next chunk is fetched, to the second cache, meanwhile. A hint only: it may lie past the end.
      __builtin_prefetch(delta + kChunk + at, 0, 2);
      __builtin_prefetch(residual + kChunk + at, 0, 2);
      keys.add_feedback(delta + at, residual + at, factor, sums + at);
    };
    find_candidates(sums, layout.kept, guess, add_next, &candidates);
    return keys.largest();
  }
};

static void encode_chunks(const float* delta, float* residual, int64_t num_elements, float beta,
                          const ChunksLayout& layout, uint8_t* payload) {
  ChunkEncoder encoder(layout.record, beta);
  uint64_t checksum = 0, num_bad = 0;
  for (int64_t chunk = 0; chunk < layout.num_chunks; chunk++) {
    const int64_t first = chunk * kChunk, num_left = num_elements - first;
    const int count = num_left < kChunk ? static_cast<int>(num_left) : kChunk;
    Record record;
    num_bad += !encoder.encode(delta + first, residual + first, count, record.bytes);
    checksum += record_checksum(record, layout.record_bytes, chunk);
    memcpy(payload + chunk * layout.record_bytes, record.bytes, static_cast<size_t>(layout.record_bytes));
  }
  memset(payload + layout.records_end, 0, static_cast<size_t>(layout.trailer - layout.records_end));
  write_trailer(payload + layout.trailer, checksum, num_bad);
}

}  // namespace isthmus

using namespace isthmus;

extern "C" void isthmus_encode_chunks(const float* delta, float* residual, int64_t num_elements, float beta,
                                      int32_t kept, int32_t value_bits, uint8_t* payload) {
  encode_chunks(delta, residual, num_elements, beta, chunks_layout(num_elements, kept, value_bits), payload);
}
