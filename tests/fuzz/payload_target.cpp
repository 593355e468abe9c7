// The fuzz target of the CPU library: payloads that may come from anyone, verified, and decoded where that lets them
// pass. Any fuzzer with libFuzzer's entry drives it: driver.cpp, or clang's -fsanitize=fuzzer.
//
// An input: form, options, number of elements (uint16) | payload, cut or filled with zeros to its form's size
// options: bits 0-2 where the payload starts within 8 bytes | 3 make its checksum right | 4 hadamard | 5 with base

#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "chunks.cuh"

extern "C" {
int32_t isthmus_verify_blocks(const uint8_t* payload, int64_t num_elements, int32_t bits);
void isthmus_decode_blocks(const uint8_t* payload, int64_t num_elements, int32_t bits, int32_t hadamard, int32_t how,
                           void* into);
int32_t isthmus_verify_chunks(const uint8_t* payload, int64_t num_elements, int32_t kept, int32_t value_bits);
void isthmus_add_chunks(const uint8_t* payload, int64_t num_elements, int32_t kept, int32_t value_bits, float* into);
void isthmus_split_planes(const void* words, const void* base, int64_t num_words, int32_t word_bytes, uint8_t* planes);
void isthmus_merge_planes(const uint8_t* planes, const void* base, int64_t num_words, int32_t word_bytes, void* words);
}

namespace {

using namespace isthmus;

enum Kind { kBlocks, kChunks, kPlanes };

// `bits` of a block's code, of a kept value, or of a plane's words.
struct Form {
  Kind kind;
  int bits, kept;
};

constexpr Form kForms[] = {{kBlocks, 8, 0},  {kBlocks, 4, 0},  {kChunks, 2, 32},  {kChunks, 2, 64}, {kChunks, 2, 128},
                           {kChunks, 1, 32}, {kChunks, 1, 64}, {kChunks, 1, 128}, {kPlanes, 16, 0}, {kPlanes, 32, 0}};
constexpr size_t kControlBytes = 4;
// Up to three chunks.
constexpr int64_t kMaxElements = 2 * kChunk + 300;

enum Fault : int32_t { kNone = 0, kChecksum = 1 };
enum Into : int32_t { kFloat32 = 0, kBfloat16 = 1, kAddFloat32 = 2 };

void require(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "this does not hold: %s\n", what);
  abort();
}

int64_t whole_units(int64_t num_elements, int64_t unit) { return (num_elements + unit - 1) / unit; }

int64_t to_8(int64_t size_bytes) { return (size_bytes + 7) / 8 * 8; }

// Where a payload of blocks or chunks has what. `unit_bytes`: the codes of a block, or a record.
struct Layout {
  int64_t num_units, unit_bytes, trailer;
  bool has_steps;

  int64_t payload_bytes() const { return trailer + 16; }
};

Layout layout_of(const Form& form, int64_t num_elements) {
  if (form.kind == kBlocks) {
    const int64_t num_blocks = whole_units(num_elements, kBlock), codes_bytes = kBlock * form.bits / 8;
    return {num_blocks, codes_bytes, num_blocks * codes_bytes + to_8(2 * num_blocks), true};
  }
  const int64_t num_chunks = whole_units(num_elements, kChunk);
  const int64_t record = record_bytes(record_layout(form.kept, form.bits));
  return {num_chunks, record, to_8(num_chunks * record), false};
}

uint32_t word_at(const uint8_t* bytes, int64_t word) {
  uint32_t value;
  memcpy(&value, bytes + 4 * word, 4);
  return value;
}

// The checksum as the specification has it, pair by pair.
uint64_t right_checksum(const uint8_t* payload, const Layout& layout) {
  uint64_t total = 0;
  for (int64_t unit = 0; unit < layout.num_units; unit++) {
    const uint8_t* bytes = payload + unit * layout.unit_bytes;
    const int64_t num_words = layout.unit_bytes / 4;
    uint64_t sum = 0;
    for (int64_t even = 0; even < num_words; even += 2) {
      const uint32_t odd = even + 1 < num_words ? word_at(bytes, even + 1) : 0;
      const uint32_t key = static_cast<uint32_t>(even);
      sum += checksum_pair(word_at(bytes, even), odd, checksum_key(key), checksum_key(key + 1));
    }
    if (layout.has_steps) {
      uint16_t step;
      memcpy(&step, payload + layout.num_units * layout.unit_bytes + 2 * unit, 2);
      sum += checksum_step(step);
    }
    total += sum * checksum_weight(static_cast<uint32_t>(unit));
  }
  return total;
}

bool all_finite(const std::vector<float>& values) {
  for (float value : values) {
    if (key_of(value) > 0x7F7FFFFFu) return false;
  }
  return true;
}

void check_decoded_blocks(const uint8_t* payload, int64_t num_elements, const Form& form, bool hadamard) {
  const size_t size = static_cast<size_t>(num_elements);
  std::vector<float> written(size, NAN), added(size, 0.0f);
  std::vector<uint16_t> halves(size, 0xFFFF);
  isthmus_decode_blocks(payload, num_elements, form.bits, hadamard, kFloat32, written.data());
  isthmus_decode_blocks(payload, num_elements, form.bits, hadamard, kBfloat16, halves.data());
  isthmus_decode_blocks(payload, num_elements, form.bits, hadamard, kAddFloat32, added.data());
  require(all_finite(written), "a payload that verify lets pass decodes to finite values");
  for (size_t at = 0; at < size; at++) {
    require(added[at] == written[at], "adding to zeros gives what writing gives");
    require(halves[at] == bfloat16_bits(written[at]), "bfloat16 results are the float32 ones, rounded");
  }
}

void check_added_chunks(const uint8_t* payload, int64_t num_elements, const Form& form) {
  std::vector<float> sums(static_cast<size_t>(num_elements), 0.0f);
  isthmus_add_chunks(payload, num_elements, form.kept, form.bits, sums.data());
  require(all_finite(sums), "a payload that verify lets pass adds finite values");
  for (int64_t first = 0; first < num_elements; first += kChunk) {
    int count = 0;
    for (int64_t at = first; at < num_elements && at < first + kChunk; at++) {
      count += sums[static_cast<size_t>(at)] != 0;
    }
    require(count <= form.kept, "a chunk changes no more elements than it keeps");
  }
}

void check_payload(uint8_t* payload, int64_t num_elements, const Form& form, bool reseal, bool hadamard) {
  const Layout layout = layout_of(form, num_elements);
  if (reseal) {
    const uint64_t checksum = right_checksum(payload, layout);
    memcpy(payload + layout.trailer, &checksum, 8);
  }
  const std::vector<uint8_t> before(payload, payload + layout.payload_bytes());
  const int32_t fault = form.kind == kBlocks ? isthmus_verify_blocks(payload, num_elements, form.bits)
                                             : isthmus_verify_chunks(payload, num_elements, form.kept, form.bits);
  require(!reseal || fault != kChecksum, "a right checksum is found right");
  if (fault == kNone && form.kind == kBlocks) check_decoded_blocks(payload, num_elements, form, hadamard);
  if (fault == kNone && form.kind == kChunks) check_added_chunks(payload, num_elements, form);
  require(!memcmp(payload, before.data(), before.size()), "a payload is only read");
}

template <typename Word>
void check_planes(const uint8_t* planes, int64_t num_words, bool with_base) {
  std::vector<Word> words(static_cast<size_t>(num_words)), base(words.size());
  for (size_t at = 0; at < base.size(); at++) base[at] = static_cast<Word>(checksum_key(static_cast<uint32_t>(at)));
  const Word* base_words = with_base ? base.data() : nullptr;
  std::vector<uint8_t> again(words.size() * sizeof(Word));
  isthmus_merge_planes(planes, base_words, num_words, sizeof(Word), words.data());
  isthmus_split_planes(words.data(), base_words, num_words, sizeof(Word), again.data());
  require(again.empty() || !memcmp(again.data(), planes, again.size()), "split planes are those that were merged");
}

size_t input_bytes(const Form& form, int64_t num_elements) {
  if (form.kind == kPlanes) return static_cast<size_t>(num_elements * form.bits / 8);
  return static_cast<size_t>(layout_of(form, num_elements).payload_bytes());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < kControlBytes) return 0;
  const Form& form = kForms[data[0] % (sizeof kForms / sizeof kForms[0])];
  const uint8_t options = data[1];
  const int64_t num_elements = (data[2] | data[3] << 8) % kMaxElements;
  const size_t shift = options & 7, payload_bytes = input_bytes(form, num_elements);
  // No byte more than the payload's, so that a read behind its end is seen.
  std::vector<uint8_t> room(shift + payload_bytes);
  const size_t given = size - kControlBytes;
  if (payload_bytes) memcpy(room.data() + shift, data + kControlBytes, given < payload_bytes ? given : payload_bytes);

  uint8_t* payload = room.data() + shift;
  const bool reseal = options & 8, hadamard = options & 16, with_base = options & 32;
  if (form.kind != kPlanes) {
    check_payload(payload, num_elements, form, reseal, hadamard);
  } else if (form.bits == 16) {
    check_planes<uint16_t>(payload, num_elements, with_base);
  } else {
    check_planes<uint32_t>(payload, num_elements, with_base);
  }
  return 0;
}
