// Vectors as wide as this processor's registers, in GCC's vector extensions; intrinsics where those have no words.
#pragma once

#include <stddef.h>

#include <utility>

#include "arithmetic.cuh"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace isthmus {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename Element>
struct VectorOf {
  typedef Element type __attribute__((vector_size(kVectorBytes)));
};

template <typename Element>
using Vector = typename VectorOf<Element>::type;

template <typename Element>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Element));

template <typename Lanes>
static inline Lanes load(const void* from) {
  Lanes lanes;
  memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

template <typename Lanes>
static inline void store(void* to, Lanes lanes) {
  memcpy(to, &lanes, sizeof lanes);
}

// Past the caches, for what is too large to stay in them; `to` lies on kVectorBytes.
static inline void store_past_caches(float* to, Vector<float> lanes) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, lanes);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, lanes);
#elif defined(__SSE2__)
  _mm_stream_ps(to, lanes);
#else
  store(to, lanes);
#endif
}

// After the last store past the caches: other threads may look from here on.
static inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Of each 64-bit lane, the product of its halves.
static inline Vector<uint64_t> product_of_halves(Vector<uint64_t> lanes) {
#if defined(__AVX512F__)
  return (Vector<uint64_t>)_mm512_mul_epu32((__m512i)lanes, (__m512i)(lanes >> 32));
#elif defined(__AVX2__)
  return (Vector<uint64_t>)_mm256_mul_epu32((__m256i)lanes, (__m256i)(lanes >> 32));
#elif defined(__SSE2__)
  return (Vector<uint64_t>)_mm_mul_epu32((__m128i)lanes, (__m128i)(lanes >> 32));
#else
  return (lanes & 0xFFFFFFFFu) * (lanes >> 32);
#endif
}

// How many keys are searched at once, whatever the processor.
constexpr int kAtOnce = 16;

#if defined(__AVX2__) && !defined(__AVX512F__)
// Of each byte, where its set bits are: a byte for each place, ascending, the rest zeros.
struct PlacesOfBits {
  uint64_t of_mask[256];

  PlacesOfBits() {
    for (uint32_t mask = 0; mask < 256; mask++) {
      of_mask[mask] = 0;
      for (uint32_t place = 0, rank = 0; place < 8; place++) {
        if (mask >> place & 1) of_mask[mask] |= static_cast<uint64_t>(place) << (8 * rank++);
      }
    }
  }
};

static const PlacesOfBits kPlaces;
#endif

// Write, ascending, the positions of the floats whose key is `at_least`, and return how many. `floats` are their bits,
// a multiple of kAtOnce of them; there is room for as many positions and kAtOnce more. `before` is called with each
// kAtOnce-th position, before the floats from there on are looked at: it may still write them.
template <typename Before>
__attribute__((always_inline)) static inline int positions_of(const uint32_t* floats, int num_floats, uint32_t at_least, uint32_t* positions,
                               Before before) {
  int count = 0;
#if defined(__AVX512F__)
  __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int first = 0; first < num_floats; first += kAtOnce) {
    before(first);
    const __m512i keys = _mm512_and_si512(_mm512_loadu_si512(floats + first), _mm512_set1_epi32(kAbs));
    const __mmask16 found = _mm512_cmpge_epu32_mask(keys, _mm512_set1_epi32(static_cast<int>(at_least)));
    // Compressed in a register: some processors take a hundred cycles to compress to memory.
    _mm512_storeu_si512(positions + count, _mm512_maskz_compress_epi32(found, position));
    count += __builtin_popcount(found);
    position = _mm512_add_epi32(position, _mm512_set1_epi32(kAtOnce));
  }
#elif defined(__AVX2__)
  // Keys are positive as signed numbers too.
  const __m256i below = _mm256_set1_epi32(static_cast<int>(at_least) - 1), abs = _mm256_set1_epi32(kAbs);
  for (int first = 0; first < num_floats; first += kAtOnce) {
    before(first);
    for (int at = first; at < first + kAtOnce; at += 8) {
      const __m256i keys = _mm256_and_si256(load<__m256i>(floats + at), abs);
      const int found = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(keys, below)));
      const __m256i places = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kPlaces.of_mask[found])));
      store(positions + count, _mm256_add_epi32(places, _mm256_set1_epi32(at)));
      count += __builtin_popcount(static_cast<unsigned>(found));
    }
  }
#else
  for (int first = 0; first < num_floats; first += kAtOnce) {
    before(first);
    for (int at = first; at < first + kAtOnce; at++) {
      positions[count] = static_cast<uint32_t>(at);
      count += (floats[at] & kAbs) >= at_least;
    }
  }
#endif
  return count;
}

}  // namespace isthmus
