// The CUDA kernels' entry points: one launch a fragment, 256 threads a CTA, any number of CTAs. Whole numbers have 64
// bits; pointers lie on 16 bytes; a payload is as large as its form says; `scratch` starts as zeros and belongs to one
// stream.
#include "kernels_blocks.cuh"
#include "kernels_chunks.cuh"
#include "kernels_planes.cuh"

// At least four CTAs share a multiprocessor, so that some load and store while others compute.
#define ISTHMUS_KERNEL extern "C" __global__ void __launch_bounds__(isthmus::kThreads, 4)

#define ISTHMUS_ENCODE_BLOCKS(name, Source, bits, hadamard, stochastic)                                             \
  ISTHMUS_KERNEL name(const Source* source, uint64_t num_elements, uint64_t seed, uint8_t* payload,                 \
                      isthmus::Scratch* scratch) {                                                                  \
    isthmus::encode_blocks<Source, bits, hadamard, stochastic>(source, num_elements, static_cast<uint32_t>(seed),   \
                                                               payload, scratch);                                   \
  }

#define ISTHMUS_DECODE_BLOCKS(name, Target, bits, hadamard, add)                                           \
  ISTHMUS_KERNEL name(const uint8_t* payload, uint64_t num_elements, Target* into) {                       \
    isthmus::decode_blocks<Target, bits, hadamard, add>(payload, num_elements, into);                      \
  }

// Named: what is done, of how many bits, from or to which type, and how.
#define ISTHMUS_BLOCKS(bits, suffix, hadamard)                                                                     \
  ISTHMUS_ENCODE_BLOCKS(encode_##bits##_float32##suffix, float, bits, hadamard, false)                             \
  ISTHMUS_ENCODE_BLOCKS(encode_##bits##_float32##suffix##_stochastic, float, bits, hadamard, true)                 \
  ISTHMUS_ENCODE_BLOCKS(encode_##bits##_bfloat16##suffix, isthmus::bfloat16_t, bits, hadamard, false)              \
  ISTHMUS_ENCODE_BLOCKS(encode_##bits##_bfloat16##suffix##_stochastic, isthmus::bfloat16_t, bits, hadamard, true)  \
  ISTHMUS_DECODE_BLOCKS(decode_##bits##_float32##suffix, float, bits, hadamard, false)                             \
  ISTHMUS_DECODE_BLOCKS(decode_##bits##_float32##suffix##_add, float, bits, hadamard, true)                        \
  ISTHMUS_DECODE_BLOCKS(decode_##bits##_bfloat16##suffix, isthmus::bfloat16_t, bits, hadamard, false)

ISTHMUS_BLOCKS(8, , false)
ISTHMUS_BLOCKS(8, _hadamard, true)
ISTHMUS_BLOCKS(4, , false)
ISTHMUS_BLOCKS(4, _hadamard, true)

// Named: what is done, how many are kept, and how many bits a value has.
#define ISTHMUS_CHUNKS(kept, value_bits)                                                                             \
  ISTHMUS_KERNEL encode_chunks_##kept##_##value_bits(const float* delta, float* residual, uint64_t num_elements,     \
                                                     float beta, uint8_t* payload, isthmus::Scratch* scratch) {      \
    __shared__ isthmus::ChunkShared shared;                                                                          \
    isthmus::encode_chunks<kept, value_bits>(delta, residual, num_elements, beta, payload, scratch, shared);         \
  }                                                                                                                  \
  ISTHMUS_KERNEL add_chunks_##kept##_##value_bits(const uint8_t* payload, uint64_t num_elements, float* into) {       \
    isthmus::add_chunks<kept, value_bits>(payload, num_elements, into);                                               \
  }

ISTHMUS_CHUNKS(32, 1)
ISTHMUS_CHUNKS(32, 2)
ISTHMUS_CHUNKS(64, 1)
ISTHMUS_CHUNKS(64, 2)
ISTHMUS_CHUNKS(128, 1)
ISTHMUS_CHUNKS(128, 2)

#define ISTHMUS_PLANES(width, Word)                                                                               \
  ISTHMUS_KERNEL split_planes_##width(const Word* words, const Word* base, uint64_t num_words, uint8_t* planes) { \
    isthmus::split_planes(words, base, num_words, planes);                                                        \
  }                                                                                                               \
  ISTHMUS_KERNEL merge_planes_##width(const uint8_t* planes, const Word* base, uint64_t num_words, Word* words) { \
    isthmus::merge_planes(planes, base, num_words, words);                                                        \
  }

ISTHMUS_PLANES(16, uint16_t)
ISTHMUS_PLANES(32, uint32_t)
