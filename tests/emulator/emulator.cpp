// The scheduler behind emulator.h.
#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

EmulatedIndex threadIdx, blockIdx, gridDim;

// Where the linker put the kernels' shared variables.
extern "C" char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
// Fibres of one CTA that run before another CTA may: a switch copies shared memory.
constexpr int kLongestTurn = 200;

// A barrier of a warp or of a CTA. `round` counts how often it opened.
struct Barrier {
  unsigned size = 0, num_waiting = 0;
  uint64_t round = 0;
  Site site = {nullptr, 0};
};

struct Warp {
  Barrier barrier;
  // Two, used in turn: a lane is never more than one exchange ahead.
  uint64_t values[2][kWarpSize];
};

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned thread = 0, cta = 0;
  bool is_done = false;
  // The barrier it waits at, and that barrier's round then.
  const Barrier* waits_at = nullptr;
  uint64_t round = 0;

  bool can_run() const { return !is_done && (!waits_at || waits_at->round != round); }
};

struct Cta {
  std::vector<Fibre*> fibres;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<char> shared;
  unsigned num_done = 0;
};

struct Machine {
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<Cta> ctas;
  ucontext_t scheduler;
  Fibre* running = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::string error;
};

Machine machine;

unsigned draw(unsigned below) { return static_cast<unsigned>(machine.random() % below); }

void to_scheduler() { swapcontext(&machine.running->context, &machine.scheduler); }

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

// Never goes on: the launch ends.
void fail(const std::string& what) {
  const Fibre& fibre = *machine.running;
  machine.error = "CTA " + std::to_string(fibre.cta) + ", thread " + std::to_string(fibre.thread) + ": " + what;
  for (;;) to_scheduler();
}

void wait(Barrier& barrier, Site site) {
  if (barrier.num_waiting == 0) barrier.site = site;
  if (barrier.site.line != site.line || strcmp(barrier.site.file, site.file)) {
    fail("divergent barrier: waits at " + text(site) + " while others wait at " + text(barrier.site));
  }
  if (++barrier.num_waiting == barrier.size) {
    barrier.num_waiting = 0;
    barrier.round++;
    maybe_yield();
    return;
  }
  machine.running->waits_at = &barrier;
  machine.running->round = barrier.round;
  to_scheduler();
  machine.running->waits_at = nullptr;
}

Warp& running_warp() {
  return machine.ctas[machine.running->cta].warps[machine.running->thread / kWarpSize];
}

void run_fibre() {
  (*machine.kernel)();
  machine.running->is_done = true;
  to_scheduler();
}

void start(Fibre& fibre) {
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack.get();
  fibre.context.uc_stack.ss_size = kStackBytes;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, run_fibre, 0);
}

void set_up(unsigned num_ctas, unsigned num_threads) {
  const size_t shared_bytes = __stop_emulated_shared - __start_emulated_shared;
  while (machine.fibres.size() < num_ctas * num_threads) {
    machine.fibres.push_back(std::make_unique<Fibre>());
    machine.fibres.back()->stack.reset(new char[kStackBytes]);
  }
  machine.ctas.assign(num_ctas, Cta());
  for (unsigned c = 0; c < num_ctas; c++) {
    Cta& cta = machine.ctas[c];
    cta.barrier.size = num_threads;
    cta.warps.resize(num_threads / kWarpSize);
    for (Warp& warp : cta.warps) warp.barrier.size = kWarpSize;
    cta.shared.resize(shared_bytes);
    for (char& byte : cta.shared) byte = static_cast<char>(machine.random());
    for (unsigned t = 0; t < num_threads; t++) {
      Fibre& fibre = *machine.fibres[c * num_threads + t];
      fibre.thread = t, fibre.cta = c, fibre.is_done = false, fibre.waits_at = nullptr;
      start(fibre);
      cta.fibres.push_back(&fibre);
    }
  }
}

void resume(Fibre& fibre) {
  machine.running = &fibre;
  threadIdx.x = fibre.thread, blockIdx.x = fibre.cta;
  swapcontext(&machine.scheduler, &fibre.context);
}

// Runs random fibres of a CTA for a while; false where none could run.
bool run_turn(Cta& cta) {
  std::copy(cta.shared.begin(), cta.shared.end(), __start_emulated_shared);
  bool has_run = false;
  const unsigned num_fibres = static_cast<unsigned>(cta.fibres.size());
  for (int left = 1 + static_cast<int>(draw(kLongestTurn)); left && machine.error.empty(); left--) {
    const unsigned first = draw(num_fibres);
    Fibre* chosen = nullptr;
    for (unsigned i = 0; i < num_fibres && !chosen; i++) {
      Fibre* fibre = cta.fibres[(first + i) % num_fibres];
      if (fibre->can_run()) chosen = fibre;
    }
    if (!chosen) break;
    has_run = true;
    resume(*chosen);
    cta.num_done += chosen->is_done;
  }
  std::copy(__start_emulated_shared, __stop_emulated_shared, cta.shared.begin());
  return has_run;
}

// Nothing can run, yet not all threads ended: says who waits where.
void report_stuck(const Cta& cta) {
  for (const Fibre* fibre : cta.fibres) {
    if (fibre->is_done) continue;
    machine.error = "divergent barrier: CTA " + std::to_string(fibre->cta) + ", thread " +
                    std::to_string(fibre->thread) + " waits at " + text(fibre->waits_at->site) +
                    " for threads that never come";
    return;
  }
}

void run_all() {
  std::vector<Cta*> left;
  for (Cta& cta : machine.ctas) left.push_back(&cta);
  while (!left.empty() && machine.error.empty()) {
    const unsigned i = draw(static_cast<unsigned>(left.size()));
    if (!run_turn(*left[i]) && left[i]->num_done < left[i]->fibres.size()) report_stuck(*left[i]);
    if (left[i]->num_done == left[i]->fibres.size()) left.erase(left.begin() + i);
  }
}

}  // namespace

void sync_cta(Site site) { wait(machine.ctas[machine.running->cta].barrier, site); }

void sync_warp(Site site) { wait(running_warp().barrier, site); }

const uint64_t* exchange(uint64_t value, Site site) {
  Warp& warp = running_warp();
  uint64_t* values = warp.values[warp.barrier.round % 2];
  values[lane()] = value;
  wait(warp.barrier, site);
  return values;
}

void maybe_yield() {
  if (draw(4) == 0) to_scheduler();
}

unsigned lane() { return machine.running->thread % kWarpSize; }

const char* launch(unsigned num_ctas, unsigned num_threads, uint64_t schedule, const std::function<void()>& kernel) {
  machine.random.seed(schedule);
  machine.error.clear();
  machine.kernel = &kernel;
  gridDim.x = num_ctas;
  set_up(num_ctas, num_threads);
  run_all();
  return machine.error.empty() ? nullptr : machine.error.c_str();
}

}  // namespace emulator
