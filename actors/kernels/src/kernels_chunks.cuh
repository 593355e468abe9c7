// Chunks on CUDA. A CTA thins a chunk at a time: every thread holds sixteen of its elements in registers while the CTA
// looks for the k largest; then its first warp writes the record, and the others go on to the next chunk.
#pragma once

#include "chunks.cuh"
#include "kernels_grid.cuh"

namespace isthmus {

constexpr int kPerThread = kChunk / kThreads;
constexpr int kMapWords = kChunk / 32;
constexpr int kMapWordsPerLane = kMapWords / kWarpSize;
constexpr int kMaxRecordWords = (kMaxRecordBytes + 3) / 4;
// A thread's elements are quads of neighbours, so that they load as vectors.
constexpr int kQuad = 4;
constexpr int kQuads = kPerThread / kQuad;

ISTHMUS_DEVICE uint32_t element_of_chunk(int quad) { return quad * (kQuad * kThreads) + kQuad * threadIdx.x; }

// What the threads of a CTA tell one another about their chunk.
struct ChunkShared {
  // Two, used in turn, so that one barrier is enough for each sum.
  uint32_t of_warp[2][kWarps];
  // A bit an element: whether its key is above the threshold, or equal to it.
  uint32_t above[kMapWords];
  uint32_t equal[kMapWords];
  // Which elements are kept, and how many are before each word.
  uint32_t kept[kMapWords];
  uint32_t num_before[kMapWords];
  // The kept ones, by rank: the bits of their value, and where in the chunk they are.
  uint32_t bits[kMaxKept];
  uint32_t index[kMaxKept];
  uint32_t record[kMaxRecordWords];
};

// Which half of `of_warp` is next.
struct CtaReduction {
  ChunkShared* shared;
  int turn;
};

ISTHMUS_DEVICE const uint32_t* tell_warps(uint32_t warp_value, CtaReduction& reduction) {
  uint32_t* of_warp = reduction.shared->of_warp[reduction.turn];
  reduction.turn ^= 1;
  if (lane_of_warp() == 0) of_warp[warp_of_cta()] = warp_value;
  __syncthreads();
  return of_warp;
}

ISTHMUS_DEVICE uint32_t cta_sum(uint32_t value, CtaReduction& reduction) {
  const uint32_t* of_warp = tell_warps(warp_sum(value), reduction);
  uint32_t total = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; warp++) total += of_warp[warp];
  return total;
}

ISTHMUS_DEVICE uint32_t cta_max(uint32_t value, CtaReduction& reduction) {
  const uint32_t* of_warp = tell_warps(warp_max(value), reduction);
  uint32_t largest = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; warp++) largest = of_warp[warp] > largest ? of_warp[warp] : largest;
  return largest;
}

// Error feedback

ISTHMUS_DEVICE float fed_back(float residual, float delta, float beta) { return sum(product(residual, beta), delta); }

ISTHMUS_DEVICE void load_sum(const float* delta, const float* residual, uint64_t start, uint64_t num_elements,
                             float beta, float* value) {
#pragma unroll
  for (int quad = 0; quad < kQuads; quad++) {
    const uint64_t first = start + element_of_chunk(quad);
    float* at = value + kQuad * quad;
    if (first + kQuad <= num_elements) {
      const float4 d = *reinterpret_cast<const float4*>(delta + first);
      const float4 r = *reinterpret_cast<const float4*>(residual + first);
      at[0] = fed_back(r.x, d.x, beta), at[1] = fed_back(r.y, d.y, beta);
      at[2] = fed_back(r.z, d.z, beta), at[3] = fed_back(r.w, d.w, beta);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; i++) {
        at[i] = first + i < num_elements ? fed_back(residual[first + i], delta[first + i], beta) : 0.0f;
      }
    }
  }
}

ISTHMUS_DEVICE void store_sum(const float* value, uint64_t start, uint64_t num_elements, float* residual) {
#pragma unroll
  for (int quad = 0; quad < kQuads; quad++) {
    const uint64_t first = start + element_of_chunk(quad);
    const float* at = value + kQuad * quad;
    if (first + kQuad <= num_elements) {
      *reinterpret_cast<float4*>(residual + first) = float4{at[0], at[1], at[2], at[3]};
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; i++) {
        if (first + i < num_elements) residual[first + i] = at[i];
      }
    }
  }
}

// Selection

// The largest threshold that at least `num_kept` keys reach, or any that just `num_kept` reach, by bisection.
ISTHMUS_DEVICE uint32_t find_threshold(const float* value, uint32_t largest, uint32_t num_kept,
                                       CtaReduction& reduction) {
  // Most often the k-th largest is within a factor of four of the largest.
  constexpr uint32_t kTwoOctaves = 2u << 23;
  uint32_t low = 0, high = largest + 1, num_reached = kChunk;
  uint32_t middle = largest > kTwoOctaves ? largest - kTwoOctaves : low + (high - low) / 2;
  while (high - low > 1 && num_reached != num_kept) {
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; i++) mine += key_of(value[i]) >= middle;
    const uint32_t num_at_least = cta_sum(mine, reduction);
    if (num_at_least >= num_kept) {
      low = middle;
      num_reached = num_at_least;
    } else {
      high = middle;
    }
    middle = low + (high - low) / 2;
  }
  return low;
}

// The word of the chunk's maps that holds a thread's quad, and where in it.
ISTHMUS_DEVICE uint32_t map_word(int quad) { return element_of_chunk(quad) / 32; }
ISTHMUS_DEVICE uint32_t map_shift() { return kQuad * threadIdx.x % 32; }

ISTHMUS_DEVICE void mark_elements(const float* value, uint32_t threshold, ChunkShared& shared) {
#pragma unroll
  for (int quad = 0; quad < kQuads; quad++) {
    uint32_t above = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < kQuad; i++) {
      const uint32_t key = key_of(value[kQuad * quad + i]);
      above |= static_cast<uint32_t>(key > threshold) << i;
      equal |= static_cast<uint32_t>(key == threshold) << i;
    }
    if (above) atomicOr(&shared.above[map_word(quad)], above << map_shift());
    if (equal) atomicOr(&shared.equal[map_word(quad)], equal << map_shift());
  }
}

ISTHMUS_DEVICE uint32_t lowest_set_bits(uint32_t word, uint32_t count) {
  while (__popc(word) > static_cast<int>(count)) word &= ~(0x80000000u >> __clz(word));
  return word;
}

// One warp: keeps all above the threshold and, of those equal to it, the first ones that are still wanted.
ISTHMUS_DEVICE void choose_kept(uint32_t num_kept, ChunkShared& shared) {
  const uint32_t lane = lane_of_warp();
  const uint32_t first_word = kMapWordsPerLane * lane;
  // Two counts in one word: of those above in the upper half, of those equal in the lower.
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < kMapWordsPerLane; i++) {
    mine += static_cast<uint32_t>(__popc(shared.above[first_word + i])) << 16;
    mine += static_cast<uint32_t>(__popc(shared.equal[first_word + i]));
  }
  uint32_t up_to_lane = mine;
#pragma unroll
  for (uint32_t distance = 1; distance < kWarpSize; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, up_to_lane, distance);
    if (lane >= distance) up_to_lane += before;
  }
  const uint32_t num_wanted = num_kept - (__shfl_sync(kAllLanes, up_to_lane, kWarpSize - 1) >> 16);
  uint32_t num_above = (up_to_lane - mine) >> 16, num_equal = (up_to_lane - mine) & 0xFFFFu;
#pragma unroll
  for (int i = 0; i < kMapWordsPerLane; i++) {
    const uint32_t above = shared.above[first_word + i], equal = shared.equal[first_word + i];
    const uint32_t num_taken = num_equal < num_wanted ? num_equal : num_wanted;
    shared.kept[first_word + i] = above | lowest_set_bits(equal, num_wanted - num_taken);
    shared.num_before[first_word + i] = num_above + num_taken;
    num_above += __popc(above);
    num_equal += __popc(equal);
  }
}

ISTHMUS_DEVICE void list_kept(const float* value, ChunkShared& shared) {
#pragma unroll
  for (int quad = 0; quad < kQuads; quad++) {
    const uint32_t kept = shared.kept[map_word(quad)];
    if (!(kept >> map_shift() & 0xFu)) continue;
#pragma unroll
    for (int i = 0; i < kQuad; i++) {
      const uint32_t bit = 1u << (map_shift() + i);
      if (!(kept & bit)) continue;
      const uint32_t rank = shared.num_before[map_word(quad)] + __popc(kept & (bit - 1));
      shared.bits[rank] = bits_of(value[kQuad * quad + i]);
      shared.index[rank] = element_of_chunk(quad) + i;
    }
  }
}

// The record, by one warp

struct LevelGroup {
  uint32_t total, count, smallest, greatest;
};

ISTHMUS_DEVICE void add_to_group(bool is_in, uint32_t fixed, uint32_t key, LevelGroup& group) {
  if (!is_in) return;
  group.total += fixed;
  group.count++;
  if (key && key < group.smallest) group.smallest = key;
  if (key > group.greatest) group.greatest = key;
}

ISTHMUS_DEVICE uint32_t level_of_warp(const LevelGroup& group, float largest) {
  return group_level(warp_sum(group.total), warp_sum(group.count), warp_min(group.smallest),
                     warp_max(group.greatest), largest);
}

ISTHMUS_DEVICE void set_bits(uint32_t bits, uint32_t num_bits, uint32_t start, uint32_t* words) {
  atomicOr(&words[start / 32], bits << (start % 32));
  if (start % 32 + num_bits > 32) atomicOr(&words[start / 32 + 1], bits >> (32 - start % 32));
}

// Makes the record of the chunk at `start`, whose words are zero, and takes from the residual what it carries.
ISTHMUS_DEVICE void make_record(const RecordLayout& layout, uint32_t largest_key, uint64_t start,
                                uint64_t num_elements, float* residual, ChunkShared& shared) {
  const uint32_t num_kept = layout.kept;
  const float largest = float_of(largest_key);
  const float inverse = inverse_largest(largest);
  uint32_t total = 0;
  for (uint32_t rank = lane_of_warp(); rank < num_kept; rank += kWarpSize) {
    total += fixed_point(float_of(shared.bits[rank] & kAbs), inverse);
  }
  // With one bit a value all are low.
  const uint32_t split = layout.value_bits == 2 ? warp_sum(total) / num_kept : 0xFFFFFFFFu;
  LevelGroup low = {0, 0, kAbs, 0}, high = {0, 0, kAbs, 0};
  for (uint32_t rank = lane_of_warp(); rank < num_kept; rank += kWarpSize) {
    const uint32_t key = shared.bits[rank] & kAbs;
    const uint32_t fixed = fixed_point(float_of(key), inverse);
    add_to_group(fixed < split, fixed, key, low);
    add_to_group(fixed >= split, fixed, key, high);
  }
  const uint32_t low_level = level_of_warp(low, largest), high_level = level_of_warp(high, largest);
  if (lane_of_warp() == 0) shared.record[0] = low_level | high_level << 16;

  for (uint32_t rank = lane_of_warp(); rank < num_kept; rank += kWarpSize) {
    const float value = float_of(shared.bits[rank]);
    const uint32_t index = shared.index[rank];
    const uint32_t is_negative = shared.bits[rank] >> 31;
    const uint32_t is_high = fixed_point(float_of(shared.bits[rank] & kAbs), inverse) >= split;
    const uint32_t low_bits = index & ((1u << layout.low_bits) - 1);
    set_bits(low_bits, layout.low_bits, kLowStart + rank * layout.low_bits, shared.record);
    set_bits(1, 1, high_start(layout) + (index >> layout.low_bits) + rank, shared.record);
    set_bits(is_negative | is_high << 1, layout.value_bits, values_start(layout) + rank * layout.value_bits,
             shared.record);
    const float level = bfloat16_value(is_high ? high_level : low_level);
    if (start + index < num_elements) residual[start + index] = sum(value, is_negative ? level : -level);
  }
}

// Writes the record and returns this lane's part of its checksum.
ISTHMUS_DEVICE uint64_t store_record(uint32_t num_words, uint32_t* target, const ChunkShared& shared) {
  uint64_t part = 0;
  for (uint32_t even = 2 * lane_of_warp(); even < num_words; even += 2 * kWarpSize) {
    const bool has_odd = even + 1 < num_words;
    const uint32_t odd_word = has_odd ? shared.record[even + 1] : 0;
    target[even] = shared.record[even];
    if (has_odd) target[even + 1] = odd_word;
    part += checksum_pair(shared.record[even], odd_word, checksum_key(even), checksum_key(even + 1));
  }
  return part;
}

template <int kKept, int kValueBits>
ISTHMUS_DEVICE void encode_chunks(const float* delta, float* residual, uint64_t num_elements, float beta,
                                  uint8_t* payload, Scratch* scratch, ChunkShared& shared) {
  const RecordLayout layout = record_layout(kKept, kValueBits);
  const uint64_t num_chunks = (num_elements + kChunk - 1) / kChunk;
  const uint32_t num_words = record_bytes(layout) / 4;
  const bool is_first_warp = warp_of_cta() == 0;
  CtaReduction reduction = {&shared, 0};
  uint64_t checksum = 0;
  uint32_t num_bad = 0;

  // Every branch with a barrier in it is taken, or not, by the whole CTA.
  for (uint64_t chunk = blockIdx.x; chunk < num_chunks; chunk += gridDim.x) {
    const uint64_t start = chunk * kChunk;
    float value[kPerThread];
    load_sum(delta, residual, start, num_elements, beta, value);
    if (threadIdx.x < kMapWords) shared.above[threadIdx.x] = shared.equal[threadIdx.x] = 0;
    if (is_first_warp) {
      for (uint32_t word = lane_of_warp(); word < num_words; word += kWarpSize) shared.record[word] = 0;
    }
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; i++) largest = key_of(value[i]) > largest ? key_of(value[i]) : largest;
    largest = cta_max(largest, reduction);

    const bool is_bad = largest >= kKeyLimit;
    if (!is_bad) {
      const uint32_t threshold = find_threshold(value, largest, layout.kept, reduction);
      mark_elements(value, threshold, shared);
      store_sum(value, start, num_elements, residual);
      __syncthreads();
      if (is_first_warp) choose_kept(layout.kept, shared);
      __syncthreads();
      list_kept(value, shared);
      __syncthreads();
      if (is_first_warp) make_record(layout, largest, start, num_elements, residual, shared);
    }
    if (!is_first_warp) continue;
    __syncwarp();
    uint32_t* target = reinterpret_cast<uint32_t*>(payload) + chunk * num_words;
    checksum += store_record(num_words, target, shared) * checksum_weight(static_cast<uint32_t>(chunk));
    num_bad += is_bad && lane_of_warp() == 0;
    // The next chunk's zeros may not overtake these reads.
    __syncwarp();
  }
  uint8_t* padding = payload + 4 * num_chunks * num_words;
  finish_payload(checksum, num_bad, padding, payload + up_to_8(padding - payload), scratch);
}

// The `rank`th of fields that are `width` bits wide.
ISTHMUS_DEVICE uint32_t field_at(const uint32_t* words, uint32_t rank, uint32_t width) {
  const uint32_t start = rank * width;
  uint32_t bits = words[start / 32] >> (start % 32);
  if (start % 32 + width > 32) bits |= words[start / 32 + 1] << (32 - start % 32);
  return bits & ((1u << width) - 1);
}

// Decoding: a warp a chunk, a lane a bit of the unary section. The payload must have been verified; whatever it holds,
// no element beyond the last is touched.
template <int kKept, int kValueBits>
ISTHMUS_DEVICE void add_chunks(const uint8_t* payload, uint64_t num_elements, float* into) {
  const RecordLayout layout = record_layout(kKept, kValueBits);
  const uint64_t num_chunks = (num_elements + kChunk - 1) / kChunk;
  const uint32_t num_words = record_bytes(layout) / 4;
  const uint32_t lane = lane_of_warp();
  for (uint64_t chunk = static_cast<uint64_t>(blockIdx.x) * kWarps + warp_of_cta(); chunk < num_chunks;
       chunk += static_cast<uint64_t>(gridDim.x) * kWarps) {
    const uint32_t* record = reinterpret_cast<const uint32_t*>(payload) + chunk * num_words;
    const uint32_t* low = record + kLowStart / 32;
    const uint32_t* values = record + values_start(layout) / 32;
    const float low_level = bfloat16_value(record[0] & 0xFFFFu), high_level = bfloat16_value(record[0] >> 16);
    uint32_t num_before = 0;
    for (int start = 0; start < layout.high_bits; start += 32) {
      const uint32_t unary = record[(high_start(layout) + start) / 32];
      const uint32_t rank = num_before + __popc(unary & ((1u << lane) - 1));
      num_before += __popc(unary);
      // Of what verify let pass, there are just as many set bits as kept elements.
      if (!(unary >> lane & 1u) || rank >= static_cast<uint32_t>(layout.kept)) continue;
      const uint32_t high_part = start + lane - rank;
      const uint64_t index = chunk * kChunk + (high_part << layout.low_bits | field_at(low, rank, layout.low_bits));
      const uint32_t value = field_at(values, rank, layout.value_bits);
      const float level = value >> 1 ? high_level : low_level;
      if (index < num_elements) into[index] = sum(into[index], value & 1u ? -level : level);
    }
  }
}

}  // namespace isthmus
