// A small coverage-guided fuzzer for machines without clang: it runs LLVMFuzzerTestOneInput on mutated inputs, and
// keeps those that take a step through the code that none took before. The target is built by g++ with
// -fsanitize=address,undefined -fsanitize-coverage=trace-pc,trace-cmp; this file without the latter.
//
//   driver --seconds 600 --seed 1 --seeds FOLDER --findings FOLDER [--executions 100000] [--hang-seconds 10]
//   driver FILE ...    runs each file once, as libFuzzer's own main does
//
// The runs happen in a child process. The input of the run under way lies in memory shared with the parent, which
// writes it to a file when the child ends as it should not: by a sanitizer, an abort, or the alarm that ends a hang.

#include <dirent.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

// The target frees all that it allocates; looking for leaks would need to stop this process from outside.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

namespace {

using Input = std::vector<uint8_t>;
using Random = std::mt19937_64;

constexpr size_t kMaxInputBytes = 1 << 16;
constexpr size_t kMapSize = 1 << 16;
constexpr size_t kComparisonSlots = 1 << 10;

// What a run did. The hooks below get no argument of ours, so that this must be global.

struct Comparison {
  uint64_t left, right;
  size_t size_bytes;
};

uint8_t hits[kMapSize];
uint32_t previous_place;
// The last comparison, of different values, at each place; `compared` has the places' slots, in the order they came.
Comparison comparisons[kComparisonSlots];
size_t compared[kComparisonSlots], num_compared;

// Relative to the target's own code: the same wherever the program was loaded.
uint32_t place_of(void* return_address) {
  const uintptr_t entry = reinterpret_cast<uintptr_t>(&LLVMFuzzerTestOneInput);
  const uint64_t offset = reinterpret_cast<uintptr_t>(return_address) - entry;
  return static_cast<uint32_t>(offset * 0x9E3779B97F4A7C15ull >> 32);
}

void record_comparison(void* return_address, uint64_t left, uint64_t right, size_t size_bytes) {
  if (left == right) return;
  const size_t slot = place_of(return_address) % kComparisonSlots;
  if (!comparisons[slot].size_bytes) compared[num_compared++] = slot;
  comparisons[slot] = {left, right, size_bytes};
}

}  // namespace

#define ISTHMUS_HOOK_COMPARISON(name, type)                                     \
  extern "C" void __sanitizer_cov_trace_##name(type left, type right) {         \
    record_comparison(__builtin_return_address(0), left, right, sizeof(type));  \
  }

ISTHMUS_HOOK_COMPARISON(cmp1, uint8_t)
ISTHMUS_HOOK_COMPARISON(cmp2, uint16_t)
ISTHMUS_HOOK_COMPARISON(cmp4, uint32_t)
ISTHMUS_HOOK_COMPARISON(cmp8, uint64_t)
ISTHMUS_HOOK_COMPARISON(const_cmp1, uint8_t)
ISTHMUS_HOOK_COMPARISON(const_cmp2, uint16_t)
ISTHMUS_HOOK_COMPARISON(const_cmp4, uint32_t)
ISTHMUS_HOOK_COMPARISON(const_cmp8, uint64_t)
// No payload holds a float32 whose exact value is looked for.
extern "C" void __sanitizer_cov_trace_cmpf(float, float) {}
extern "C" void __sanitizer_cov_trace_cmpd(double, double) {}

extern "C" void __sanitizer_cov_trace_switch(uint64_t value, uint64_t* cases) {
  const uint64_t num_cases = cases[0], size_bits = cases[1];
  for (uint64_t i = 0; i < num_cases; i++) {
    record_comparison(__builtin_return_address(0), value, cases[2 + i], size_bits / 8);
  }
}

extern "C" void __sanitizer_cov_trace_pc() {
  const uint32_t place = place_of(__builtin_return_address(0));
  uint8_t& count = hits[(place ^ previous_place) % kMapSize];
  if (count < 255) count++;
  // So that a -> b is another step than b -> a.
  previous_place = place >> 1;
}

namespace {

void start_run() {
  memset(hits, 0, sizeof hits);
  previous_place = 0;
}

// Which steps between places any run took, and how often at a time: a bit for each power of two.
class Coverage {
 public:
  // Add the last run; true where it did something new.
  bool add_run() {
    bool is_new = false;
    for (size_t step = 0; step < kMapSize; step++) {
      if (!hits[step]) continue;
      const uint8_t bucket = static_cast<uint8_t>(1u << (31 - __builtin_clz(hits[step])));
      if (seen_[step] & bucket) continue;
      num_points_ += !seen_[step];
      seen_[step] |= bucket;
      is_new = true;
    }
    return is_new;
  }

  size_t num_points() const { return num_points_; }

 private:
  uint8_t seen_[kMapSize] = {};
  size_t num_points_ = 0;
};

// Mutations. Each takes an input of at least one byte and leaves it so.

size_t below(Random& random, size_t bound) { return random() % bound; }

struct Mutator {
  Random& random;
  const std::vector<Input>& corpus;

  void flip_bit(Input& input) {
    const size_t bit = below(random, 8 * input.size());
    input[bit / 8] ^= static_cast<uint8_t>(1u << bit % 8);
  }

  void set_byte(Input& input) { input[below(random, input.size())] = static_cast<uint8_t>(random()); }

  void add_to_word(Input& input) {
    const size_t size_bytes = word_bytes(input);
    const size_t offset = below(random, input.size() - size_bytes + 1);
    uint64_t word = 0;
    memcpy(&word, input.data() + offset, size_bytes);
    word += below(random, 33) - 16;
    memcpy(input.data() + offset, &word, size_bytes);
  }

  void set_extreme_word(Input& input) {
    static constexpr uint64_t kExtremes[] = {0, 1, 0x7F, 0x80, 0xFF, 0x7F80, 0x7FFF, 0x8000, ~0ull};
    const uint64_t extreme = kExtremes[below(random, std::size(kExtremes))];
    const size_t size_bytes = word_bytes(input);
    memcpy(input.data() + below(random, input.size() - size_bytes + 1), &extreme, size_bytes);
  }

  void repeat_byte(Input& input) {
    const size_t offset = below(random, input.size()), count = 1 + below(random, 32);
    const size_t stop = std::min(offset + count, input.size());
    std::fill(input.begin() + static_cast<long>(offset), input.begin() + static_cast<long>(stop), input[offset]);
  }

  void move_range(Input& input) {
    const size_t from = below(random, input.size()), to = below(random, input.size());
    const size_t count = 1 + below(random, input.size() - std::max(from, to));
    memmove(input.data() + to, input.data() + from, count);
  }

  void cut_or_extend(Input& input) { input.resize(1 + below(random, std::min(2 * input.size(), kMaxInputBytes))); }

  // The start of this one, and what another has from there on.
  void splice(Input& input) {
    const Input& other = corpus[below(random, corpus.size())];
    const size_t offset = below(random, std::min(input.size(), other.size()));
    input.resize(offset);
    input.insert(input.end(), other.begin() + static_cast<long>(offset), other.end());
  }

  // Where the input holds one side of a comparison, write the other, or what is next to it.
  void follow_comparison(Input& input) {
    if (!num_compared) return set_byte(input);
    Comparison comparison = comparisons[compared[below(random, num_compared)]];
    const size_t size_bytes = comparison.size_bytes;
    if (size_bytes > input.size()) return set_byte(input);
    if (random() & 1) std::swap(comparison.left, comparison.right);
    const uint64_t wanted = comparison.right + below(random, 3) - 1;
    const uint8_t* held = reinterpret_cast<const uint8_t*>(&comparison.left);
    const auto start = input.begin() + static_cast<long>(below(random, input.size()));
    auto found = std::search(start, input.end(), held, held + size_bytes);
    if (found == input.end()) found = std::search(input.begin(), input.end(), held, held + size_bytes);
    const size_t offset = found != input.end() ? static_cast<size_t>(found - input.begin())
                                               : below(random, input.size() - size_bytes + 1);
    memcpy(input.data() + offset, &wanted, size_bytes);
  }

  void mutate(Input& input) {
    static constexpr void (Mutator::*kMutations[])(Input&) = {
        &Mutator::flip_bit,    &Mutator::set_byte,   &Mutator::add_to_word,   &Mutator::set_extreme_word,
        &Mutator::repeat_byte, &Mutator::move_range, &Mutator::cut_or_extend, &Mutator::splice,
        &Mutator::follow_comparison};
    for (size_t left = 1 + below(random, 6); left > 0; left--) {
      (this->*kMutations[below(random, std::size(kMutations))])(input);
    }
  }

 private:
  size_t word_bytes(const Input& input) { return std::min<size_t>(size_t{1} << below(random, 4), input.size()); }
};

// What parent and child share.
struct Shared {
  uint64_t executions;
  size_t size_bytes;
  uint8_t bytes[kMaxInputBytes];
};

struct Options {
  double seconds = 60.0;
  uint64_t executions = UINT64_MAX;
  uint64_t seed = 1;
  // A run that takes longer is a finding.
  unsigned hang_seconds = 10;
  std::string seeds, findings = ".";
  std::vector<std::string> files;
};

Input read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    fprintf(stderr, "%s cannot be read\n", path.c_str());
    exit(2);
  }
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::vector<Input> read_folder(const std::string& path) {
  std::vector<std::string> names;
  if (DIR* folder = opendir(path.c_str())) {
    while (const dirent* entry = readdir(folder)) {
      if (entry->d_name[0] != '.') names.push_back(path + "/" + entry->d_name);
    }
    closedir(folder);
  }
  // The same order everywhere.
  std::sort(names.begin(), names.end());
  std::vector<Input> inputs;
  for (const std::string& name : names) inputs.push_back(read_file(name));
  return inputs;
}

void run_once(const Input& input, unsigned hang_seconds, Shared* shared) {
  shared->size_bytes = input.size();
  memcpy(shared->bytes, input.data(), input.size());
  shared->executions++;
  alarm(hang_seconds);
  start_run();
  LLVMFuzzerTestOneInput(input.data(), input.size());
}

// The child: seeds first, then mutants of what is in the corpus, until time or executions are over.
void fuzz(const Options& options, Shared* shared) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point started = Clock::now();
  static Coverage coverage;
  std::vector<Input> corpus;
  for (Input& seed : read_folder(options.seeds)) {
    seed.resize(std::clamp<size_t>(seed.size(), 1, kMaxInputBytes));
    run_once(seed, options.hang_seconds, shared);
    coverage.add_run();
    corpus.push_back(std::move(seed));
  }
  if (corpus.empty()) corpus.push_back(Input(1));
  Random random(options.seed);
  Mutator mutator = {random, corpus};
  while (shared->executions < options.executions) {
    if (std::chrono::duration<double>(Clock::now() - started).count() >= options.seconds) break;
    Input mutant = corpus[below(random, corpus.size())];
    mutator.mutate(mutant);
    mutant.resize(std::min(mutant.size(), kMaxInputBytes));
    run_once(mutant, options.hang_seconds, shared);
    if (coverage.add_run()) corpus.push_back(std::move(mutant));
  }
  alarm(0);
  printf("executions %lu, coverage %zu, corpus %zu\n", static_cast<unsigned long>(shared->executions),
         coverage.num_points(), corpus.size());
}

// Write the input of the child's last run to a file, and say how to run it alone.
void report_finding(const Options& options, const Shared& shared, int status, const char* program) {
  uint64_t name = 0xCBF29CE484222325ull;
  for (size_t at = 0; at < shared.size_bytes; at++) name = (name ^ shared.bytes[at]) * 0x100000001B3ull;
  char path[4096];
  snprintf(path, sizeof path, "%s/finding-%016lx", options.findings.c_str(), static_cast<unsigned long>(name));
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(shared.bytes),
                                              static_cast<std::streamsize>(shared.size_bytes));
  const bool is_hang = WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM;
  printf("finding after %lu executions: %s\n", static_cast<unsigned long>(shared.executions),
         is_hang ? "a run that did not end" : "the target said what is above, or died");
  printf("run it alone: %s %s\n", program, path);
}

int supervise(const Options& options, const char* program) {
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    perror("mmap");
    return 2;
  }
  Shared* shared = static_cast<Shared*>(memory);
  const pid_t child = fork();
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    fuzz(options, shared);
    exit(0);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) < 0) {
    perror("fork or waitpid");
    return 2;
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return 0;
  if (shared->executions == 0) return 2;
  report_finding(options, *shared, status, program);
  return 1;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int at = 1; at < argc; at++) {
    const std::string option = argv[at];
    if (option.rfind("--", 0) != 0) {
      options.files.push_back(option);
      continue;
    }
    if (at + 1 == argc) {
      fprintf(stderr, "%s needs a value\n", option.c_str());
      exit(2);
    }
    const char* value = argv[++at];
    if (option == "--seconds") {
      options.seconds = atof(value);
    } else if (option == "--executions") {
      options.executions = strtoull(value, nullptr, 10);
    } else if (option == "--seed") {
      options.seed = strtoull(value, nullptr, 10);
    } else if (option == "--hang-seconds") {
      options.hang_seconds = static_cast<unsigned>(atoi(value));
    } else if (option == "--seeds") {
      options.seeds = value;
    } else if (option == "--findings") {
      options.findings = value;
    } else {
      fprintf(stderr, "%s is no option; see the top of driver.cpp\n", option.c_str());
      exit(2);
    }
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  if (options.files.empty()) return supervise(options, argv[0]);
  for (const std::string& path : options.files) {
    const Input input = read_file(path);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  return 0;
}
