// Runs kernels in buffers of just the sizes they may touch, and prints a hash of what these hold then. A build with
// sanitizers finds what is read or written beside them, and vectors that do not lie on their own size; and a kernel
// that was broken on purpose brings down this process, not the test's.
//
//   run_kernel (KERNEL ENTRY NUM_CTAS SCHEDULE NUM_ELEMENTS SOURCE_BYTES TARGET_BYTES)...
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include <string>

#include "emulator.h"

namespace {

using Kernel = void*;
using BlockEncoder = const char*(Kernel, unsigned, uint64_t, void*, uint64_t, uint64_t, void*, void*);
using ChunkEncoder = const char*(Kernel, unsigned, uint64_t, void*, void*, uint64_t, float, void*, void*);
using Decoder = const char*(Kernel, unsigned, uint64_t, void*, uint64_t, void*);
using PlaneKernel = const char*(Kernel, unsigned, uint64_t, void*, void*, uint64_t, void*);

constexpr uint64_t kScratchBytes = 24;

struct Buffer {
  uint8_t* bytes;
  uint64_t size_bytes;
};

// Small floats, as bytes that are any payload too.
Buffer make_buffer(uint64_t size_bytes, uint32_t salt) {
  uint8_t* bytes = static_cast<uint8_t*>(malloc(size_bytes));
  for (uint64_t i = 0; i < size_bytes; i++) {
    const uint32_t mixed = static_cast<uint32_t>(i + salt) * 0x9E3779B9u >> 20;
    bytes[i] = static_cast<uint8_t>(i % 4 == 3 ? 0x3C + mixed % 8 : mixed);
  }
  return {bytes, size_bytes};
}

constexpr int kWordsPerRun = 7;

uint64_t number(const char* word) { return strtoull(word, nullptr, 10); }

bool run(char** words) {
  Kernel kernel = dlsym(RTLD_DEFAULT, words[0]);
  const char* entry_name = words[1];
  void* entry = dlsym(RTLD_DEFAULT, entry_name);
  const unsigned num_ctas = static_cast<unsigned>(number(words[2]));
  const uint64_t schedule = number(words[3]), num_elements = number(words[4]);
  const Buffer source = make_buffer(number(words[5]), 1), second = make_buffer(number(words[5]), 2);
  const Buffer target = make_buffer(number(words[6]), 3);
  void* scratch = calloc(1, kScratchBytes);

  const char* error = "no such entry";
  if (!strcmp(entry_name, "emulate_encode_blocks")) {
    constexpr uint64_t kSeed = 7;
    error = reinterpret_cast<BlockEncoder*>(entry)(kernel, num_ctas, schedule, source.bytes, num_elements, kSeed,
                                                   target.bytes, scratch);
  } else if (!strcmp(entry_name, "emulate_encode_chunks")) {
    constexpr float kBeta = 0.95f;
    error = reinterpret_cast<ChunkEncoder*>(entry)(kernel, num_ctas, schedule, source.bytes, second.bytes,
                                                   num_elements, kBeta, target.bytes, scratch);
  } else if (!strcmp(entry_name, "emulate_decode")) {
    error = reinterpret_cast<Decoder*>(entry)(kernel, num_ctas, schedule, source.bytes, num_elements, target.bytes);
  } else if (!strcmp(entry_name, "emulate_planes")) {
    error = reinterpret_cast<PlaneKernel*>(entry)(kernel, num_ctas, schedule, source.bytes, second.bytes,
                                                  num_elements, target.bytes);
  }
  uint64_t hash = 0xCBF29CE484222325ull;  // FNV-1a
  for (const Buffer& buffer : {source, second, target}) {
    for (uint64_t i = 0; i < buffer.size_bytes; i++) hash = (hash ^ buffer.bytes[i]) * 0x100000001B3ull;
    free(buffer.bytes);
  }
  free(scratch);
  printf("%s %s\n", words[0], error ? error : std::to_string(hash).c_str());
  fflush(stdout);
  return !error;
}

}  // namespace

int main(int num_words, char** words) {
  bool all_ran = true;
  for (int first = 1; first + kWordsPerRun <= num_words; first += kWordsPerRun) all_ran &= run(words + first);
  return all_ran ? 0 : 1;
}
