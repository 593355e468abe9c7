// Words of 16 or 32 bits, turned so that their highest bytes are alike before they are split into planes.
#pragma once

#include "arithmetic.cuh"

namespace isthmus {

// A float's sign goes to the lowest bit, so that the highest byte is its exponent.
template <class Word>
ISTHMUS_BOTH Word sign_to_lowest(Word word) {
  constexpr int kTop = 8 * sizeof(Word) - 1;
  return static_cast<Word>(static_cast<Word>(word << 1) | (word >> kTop));
}

template <class Word>
ISTHMUS_BOTH Word sign_to_highest(Word word) {
  constexpr int kTop = 8 * sizeof(Word) - 1;
  return static_cast<Word>((word >> 1) | static_cast<Word>(word << kTop));
}

// The difference to a base, modulo the word's range, zigzag-coded: small where the two are close, either way.
template <class Word>
ISTHMUS_BOTH Word difference_code(Word word, Word base) {
  constexpr int kTop = 8 * sizeof(Word) - 1;
  const Word difference = static_cast<Word>(word - base);
  const Word is_negative = static_cast<Word>(difference >> kTop);
  return static_cast<Word>(static_cast<Word>(difference << 1) ^ static_cast<Word>(0u - is_negative));
}

template <class Word>
ISTHMUS_BOTH Word difference_undone(Word code, Word base) {
  const Word is_negative = static_cast<Word>(code & 1u);
  return static_cast<Word>(static_cast<Word>((code >> 1) ^ static_cast<Word>(0u - is_negative)) + base);
}

}  // namespace isthmus
