// Chunks of 4096 elements on the CPU: verify, and add to a tensor. `reference.py` specifies both.

#include "cpu_chunks.h"

namespace isthmus {

// Of 64 bits, in the longest unary section.
constexpr int kUnaryWords = 4;

static inline void read_record(const uint8_t* payload, int64_t chunk, int size_bytes, Record* record) {
  memcpy(record->bytes, payload + chunk * size_bytes, static_cast<size_t>(size_bytes));
}

static inline uint32_t levels_of(const Record& record) {
  uint32_t levels;
  memcpy(&levels, record.bytes, 4);
  return levels;
}

static inline void unary_words(const Record& record, const RecordLayout& layout, uint64_t* words) {
  memset(words, 0, kUnaryWords * sizeof(uint64_t));
  memcpy(words, record.bytes + high_start(layout) / 8, static_cast<size_t>(layout.high_bits) / 8);
}

// The indices of at most `kept` bits of the unary section; returns how many there were. Those of any bytes are below
// twice a chunk.
static inline int read_indices(const Record& record, const RecordLayout& layout, uint32_t* indices) {
  uint64_t words[kUnaryWords];
  unary_words(record, layout, words);
  int rank = 0;
  for (int at = 0; at < kUnaryWords; at++) {
    for (uint64_t word = words[at]; word && rank < layout.kept; word &= word - 1, rank++) {
      const int low_start = kLowStart + rank * layout.low_bits;
      uint64_t low;
      memcpy(&low, record.bytes + low_start / 8, 8);
      const uint32_t low_part = static_cast<uint32_t>(low >> (low_start % 8)) & ((1u << layout.low_bits) - 1);
      const uint32_t high_part = static_cast<uint32_t>(64 * at + __builtin_ctzll(word) - rank);
      indices[rank] = high_part << layout.low_bits | low_part;
    }
  }
  return rank;
}

// Whether the unary section has just `kept` bits, its last one not among them.
static inline bool has_all_kept(const Record& record, const RecordLayout& layout) {
  uint64_t words[kUnaryWords];
  unary_words(record, layout, words);
  int count = 0;
  for (int at = 0; at < kUnaryWords; at++) count += __builtin_popcountll(words[at]);
  const int last = layout.high_bits - 1;
  return count == layout.kept && !(words[last / 64] >> (last % 64) & 1);
}

// Whether an encoder can have made the record.
static inline bool is_made(const Record& record, const RecordLayout& layout) {
  const uint32_t levels = levels_of(record), low = levels & 0xFFFFu, high = levels >> 16;
  if (low >= kLevelLimit || high >= (layout.value_bits == 2 ? kLevelLimit : 1)) return false;
  if (!has_all_kept(record, layout)) return false;
  uint32_t indices[kMaxKept];
  read_indices(record, layout, indices);
  bool ascends = true;
  for (int rank = 1; rank < layout.kept; rank++) ascends &= indices[rank - 1] < indices[rank];
  return ascends;
}

static Fault verify_chunks(const uint8_t* payload, const ChunksLayout& layout) {
  uint64_t checksum = 0;
  bool all_made = is_zero(payload + layout.records_end, payload + layout.trailer);
  Record record;
  for (int64_t chunk = 0; chunk < layout.num_chunks; chunk++) {
    read_record(payload, chunk, layout.record_bytes, &record);
    checksum += record_checksum(record, layout.record_bytes, chunk);
    all_made = all_made && is_made(record, layout.record);
  }
  const Fault fault = trailer_fault(payload + layout.trailer, checksum);
  return fault != kNone || all_made ? fault : kGrammar;
}

static void add_chunks(const uint8_t* payload, const ChunksLayout& layout, int64_t num_elements, float* into) {
  Record record;
  uint32_t indices[kMaxKept];
  for (int64_t chunk = 0; chunk < layout.num_chunks; chunk++) {
    read_record(payload, chunk, layout.record_bytes, &record);
    const uint32_t both = levels_of(record);
    const float levels[2] = {bfloat16_value(both & 0xFFFFu), bfloat16_value(both >> 16)};
    const uint8_t* values = record.bytes + values_start(layout.record) / 8;
    const int count = read_indices(record, layout.record, indices);
    for (int rank = 0; rank < count; rank++) {
      const int bit = rank * layout.record.value_bits;
      const int value = values[bit / 8] >> (bit % 8);
      const float level = levels[layout.record.value_bits == 2 ? value >> 1 & 1 : 0];
      const int64_t index = chunk * kChunk + indices[rank];
      if (index < num_elements) into[index] = sum(into[index], value & 1 ? -level : level);
    }
  }
}

}  // namespace isthmus

using namespace isthmus;

extern "C" int32_t isthmus_verify_chunks(const uint8_t* payload, int64_t num_elements, int32_t kept,
                                         int32_t value_bits) {
  return verify_chunks(payload, chunks_layout(num_elements, kept, value_bits));
}

extern "C" void isthmus_add_chunks(const uint8_t* payload, int64_t num_elements, int32_t kept, int32_t value_bits,
                                   float* into) {
  add_chunks(payload, chunks_layout(num_elements, kept, value_bits), num_elements, into);
}
