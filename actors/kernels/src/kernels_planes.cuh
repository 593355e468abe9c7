// Planes on CUDA: a thread turns four neighbouring words into four bytes of each plane, and back.
#pragma once

#include "kernels_grid.cuh"
#include "planes.cuh"

namespace isthmus {

constexpr int kFour = 4;

template <class Word>
struct alignas(kFour * sizeof(Word)) Four {
  Word at[kFour];
};

// Planes start at multiples of the number of words: vectors need that to be one of four.
ISTHMUS_DEVICE bool has_whole_fours(uint64_t num_words) { return num_words % kFour == 0; }

template <class Item>
ISTHMUS_DEVICE Four<Item> load_four(const Item* items, uint64_t first, uint64_t num_items) {
  if (has_whole_fours(num_items)) return *reinterpret_cast<const Four<Item>*>(items + first);
  Four<Item> four = {};
  for (int i = 0; i < kFour && first + i < num_items; i++) four.at[i] = items[first + i];
  return four;
}

template <class Item>
ISTHMUS_DEVICE void store_four(const Four<Item>& four, uint64_t first, uint64_t num_items, Item* items) {
  if (has_whole_fours(num_items)) {
    *reinterpret_cast<Four<Item>*>(items + first) = four;
  } else {
    for (int i = 0; i < kFour && first + i < num_items; i++) items[first + i] = four.at[i];
  }
}

ISTHMUS_DEVICE uint64_t first_word_of_thread() {
  return kFour * (static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

ISTHMUS_DEVICE uint64_t words_of_grid() { return static_cast<uint64_t>(gridDim.x) * kThreads * kFour; }

// Without a base (null) what is split are the words themselves, else their differences to it.
template <class Word>
ISTHMUS_DEVICE void split_planes(const Word* words, const Word* base, uint64_t num_words, uint8_t* planes) {
  for (uint64_t first = first_word_of_thread(); first < num_words; first += words_of_grid()) {
    Four<Word> code = load_four(words, first, num_words);
    const Four<Word> base_word = base ? load_four(base, first, num_words) : Four<Word>{};
#pragma unroll
    for (int i = 0; i < kFour; i++) {
      code.at[i] = base ? difference_code(code.at[i], base_word.at[i]) : sign_to_lowest(code.at[i]);
    }
#pragma unroll
    for (int plane = 0; plane < static_cast<int>(sizeof(Word)); plane++) {
      const int shift = 8 * (sizeof(Word) - 1 - plane);
      Four<uint8_t> bytes;
#pragma unroll
      for (int i = 0; i < kFour; i++) bytes.at[i] = static_cast<uint8_t>(code.at[i] >> shift);
      store_four(bytes, first, num_words, planes + plane * num_words);
    }
  }
}

template <class Word>
ISTHMUS_DEVICE void merge_planes(const uint8_t* planes, const Word* base, uint64_t num_words, Word* words) {
  for (uint64_t first = first_word_of_thread(); first < num_words; first += words_of_grid()) {
    Four<Word> word = {};
#pragma unroll
    for (int plane = 0; plane < static_cast<int>(sizeof(Word)); plane++) {
      const Four<uint8_t> bytes = load_four(planes + plane * num_words, first, num_words);
#pragma unroll
      for (int i = 0; i < kFour; i++) word.at[i] = static_cast<Word>(word.at[i] << 8 | bytes.at[i]);
    }
    const Four<Word> base_word = base ? load_four(base, first, num_words) : Four<Word>{};
#pragma unroll
    for (int i = 0; i < kFour; i++) {
      word.at[i] = base ? difference_undone(word.at[i], base_word.at[i]) : sign_to_highest(word.at[i]);
    }
    store_four(word, first, num_words, words);
  }
}

}  // namespace isthmus
