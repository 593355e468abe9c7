// The CUDA kernels, unmodified, behind entry points for ctypes: one for each list of parameters.
#include "emulator.h"
#include "kernels.cu"

using isthmus::kThreads;
using isthmus::Scratch;

template <class... Parameters>
static const char* run(void (*kernel)(Parameters...), unsigned num_ctas, uint64_t schedule, Parameters... arguments) {
  return emulator::launch(num_ctas, kThreads, schedule, [=] { kernel(arguments...); });
}

using EncodeBlocks = void(const void*, uint64_t, uint64_t, uint8_t*, Scratch*);
using EncodeChunks = void(const float*, float*, uint64_t, float, uint8_t*, Scratch*);
// Of decode_* and add_chunks_*.
using Decode = void(const uint8_t*, uint64_t, void*);
// Of split_planes_* and merge_planes_*.
using Planes = void(const void*, const void*, uint64_t, void*);

extern "C" {

const char* emulate_encode_blocks(EncodeBlocks* kernel, unsigned num_ctas, uint64_t schedule, const void* source,
                                  uint64_t num_elements, uint64_t seed, uint8_t* payload, Scratch* scratch) {
  return run(kernel, num_ctas, schedule, source, num_elements, seed, payload, scratch);
}

const char* emulate_encode_chunks(EncodeChunks* kernel, unsigned num_ctas, uint64_t schedule, const float* delta,
                                  float* residual, uint64_t num_elements, float beta, uint8_t* payload,
                                  Scratch* scratch) {
  return run(kernel, num_ctas, schedule, delta, residual, num_elements, beta, payload, scratch);
}

const char* emulate_decode(Decode* kernel, unsigned num_ctas, uint64_t schedule, const uint8_t* payload,
                           uint64_t num_elements, void* into) {
  return run(kernel, num_ctas, schedule, payload, num_elements, into);
}

const char* emulate_planes(Planes* kernel, unsigned num_ctas, uint64_t schedule, const void* source, const void* base,
                           uint64_t num_words, void* target) {
  return run(kernel, num_ctas, schedule, source, base, num_words, target);
}
}
