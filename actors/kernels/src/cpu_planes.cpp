// Words split into planes of bytes on the CPU, and merged again. `reference.py` specifies both.

#include "planes.cuh"

namespace isthmus {

// How many words are turned at a time, in an array of our own: a compiler then knows that no byte written is a word
// still to be read, and uses vectors.
constexpr int kTile = 256;

template <typename Word>
constexpr int kPlanes = static_cast<int>(sizeof(Word));

// How far down a word's byte of a plane lies.
template <typename Word>
static inline int shift_of(int plane) {
  return 8 * (kPlanes<Word> - 1 - plane);
}

// `planes` is where the tile's bytes of the first plane lie.
template <typename Word>
static inline void split_tile(const Word* words, const Word* base, int count, int64_t num_words, uint8_t* planes) {
  Word turned[kTile];
  for (int i = 0; i < count; i++) {
    turned[i] = base ? difference_code(words[i], base[i]) : sign_to_lowest(words[i]);
  }
  for (int plane = 0; plane < kPlanes<Word>; plane++) {
    uint8_t* bytes = planes + plane * num_words;
    for (int i = 0; i < count; i++) bytes[i] = static_cast<uint8_t>(turned[i] >> shift_of<Word>(plane));
  }
}

template <typename Word>
static inline void merge_tile(const uint8_t* planes, const Word* base, int count, int64_t num_words, Word* words) {
  Word turned[kTile] = {};
  for (int plane = 0; plane < kPlanes<Word>; plane++) {
    const uint8_t* bytes = planes + plane * num_words;
    for (int i = 0; i < count; i++) {
      turned[i] = static_cast<Word>(turned[i] | static_cast<uint32_t>(bytes[i]) << shift_of<Word>(plane));
    }
  }
  for (int i = 0; i < count; i++) {
    words[i] = base ? difference_undone(turned[i], base[i]) : sign_to_highest(turned[i]);
  }
}

static inline int tile_count(int64_t first, int64_t num_words) {
  return num_words - first < kTile ? static_cast<int>(num_words - first) : kTile;
}

template <typename Word>
static void split_planes(const void* all_words, const void* all_base, int64_t num_words, uint8_t* planes) {
  const Word* words = static_cast<const Word*>(all_words);
  const Word* base = static_cast<const Word*>(all_base);
  for (int64_t first = 0; first < num_words; first += kTile) {
    const int count = tile_count(first, num_words);
    split_tile(words + first, base ? base + first : nullptr, count, num_words, planes + first);
  }
}

template <typename Word>
static void merge_planes(const uint8_t* planes, const void* all_base, int64_t num_words, void* all_words) {
  const Word* base = static_cast<const Word*>(all_base);
  Word* words = static_cast<Word*>(all_words);
  for (int64_t first = 0; first < num_words; first += kTile) {
    const int count = tile_count(first, num_words);
    merge_tile(planes + first, base ? base + first : nullptr, count, num_words, words + first);
  }
}

}  // namespace isthmus

using namespace isthmus;

extern "C" void isthmus_split_planes(const void* words, const void* base, int64_t num_words, int32_t word_bytes,
                                     uint8_t* planes) {
  const auto split = word_bytes == 2 ? split_planes<uint16_t> : split_planes<uint32_t>;
  split(words, base, num_words, planes);
}

extern "C" void isthmus_merge_planes(const uint8_t* planes, const void* base, int64_t num_words, int32_t word_bytes,
                                     void* words) {
  const auto merge = word_bytes == 2 ? merge_planes<uint16_t> : merge_planes<uint32_t>;
  merge(planes, base, num_words, words);
}
