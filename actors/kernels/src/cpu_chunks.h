// What encoding and decoding chunks on the CPU share: the payload's layout, a record's bytes and its checksum.
#pragma once

#include "chunks.cuh"
#include "cpu_checksum.h"

namespace isthmus {

// A record's bytes, with room to load or store 8 bytes at any place.
constexpr int kRecordRoom = (kMaxRecordBytes + 15) / 8 * 8;

// Where a payload's sections start.
struct ChunksLayout {
  RecordLayout record;
  int record_bytes;
  int64_t num_chunks, records_end, trailer;
};

static ChunksLayout chunks_layout(int64_t num_elements, int kept, int value_bits) {
  const RecordLayout record = record_layout(kept, value_bits);
  const int64_t num_chunks = (num_elements + kChunk - 1) / kChunk;
  const int64_t records_end = num_chunks * record_bytes(record);
  return {record, record_bytes(record), num_chunks, records_end, to_8(records_end)};
}

// A record as it is built or read. What lies behind its bytes is 0.
struct Record {
  uint8_t bytes[kRecordRoom] = {};
};

static const ChecksumKeys<kRecordRoom / 4> kKeys;

// Pair by pair, because a vector of pairs would count the keys of words behind the record's last.
static inline uint64_t record_checksum(const Record& record, int size_bytes, int64_t chunk) {
  uint64_t sum = 0;
  uint32_t words[kRecordRoom / 4];
  memcpy(words, record.bytes, kRecordRoom);
  for (int word = 0; word < size_bytes / 4; word += 2) {
    sum += checksum_pair(words[word], words[word + 1], kKeys.of_word[word], kKeys.of_word[word + 1]);
  }
  return sum * checksum_weight(static_cast<uint32_t>(chunk));
}

}  // namespace isthmus
