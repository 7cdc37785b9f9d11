// Compiled without sanitizers, see build.py: what the scheduler does is no
// synchronisation of the threads that it runs. With EPSA_ASAN or EPSA_TSAN it
// tells the sanitizer by hand of stacks, of threads, and of the order that the
// primitives promise.
#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <numeric>
#include <span>

#include "emulated_simt.h"

#if !defined(__x86_64__) || defined(EPSA_UCONTEXT)
#undef EPSA_UCONTEXT
#define EPSA_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_THREAD__
#error "the scheduler must not be watched"
#endif

#ifdef EPSA_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef EPSA_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}
#endif

namespace epsa::emulator {
namespace {

namespace simt = cuda::simt;

// ---- what the sanitizers are told ----

#ifdef EPSA_TSAN
constexpr unsigned kNoSync = 1;
void acquire(void* order) { __tsan_acquire(order); }
void release(void* order) { __tsan_release(order); }
#else
void acquire(void*) {}
void release(void*) {}
#endif

void poison(void* memory, size_t bytes) {
  std::memset(memory, 0xff, bytes);
#ifdef EPSA_ASAN
  __asan_poison_memory_region(memory, bytes);
#endif
}

void unpoison([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef EPSA_ASAN
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

// ---- stacks ----

#if defined(EPSA_TSAN) || defined(EPSA_ASAN)
constexpr size_t kStack = 256 << 10;  // a sanitizer's report needs room
#else
constexpr size_t kStack = 64 << 10;
#endif
#ifdef EPSA_TSAN
constexpr int64_t kMostThreads = 2048;  // TSan has 8000 or so
#else
constexpr int64_t kMostThreads = 16384;  // a process has 65530 mappings
#endif

struct Stack {
  char* base = nullptr;  // above a page that traps
  size_t bytes = 0;
  [[maybe_unused]] void* tsan = nullptr;  // TSan's notion of the thread
};

std::vector<Stack> spare_stacks;

Stack take_stack() {
  if (!spare_stacks.empty()) {
    const Stack stack = spare_stacks.back();
    spare_stacks.pop_back();
    unpoison(stack.base, stack.bytes);  // its last frames never returned
    return stack;
  }
  const size_t page = sysconf(_SC_PAGESIZE);
  void* memory = mmap(nullptr, page + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("a fiber's stack");
    std::abort();
  }
  Stack stack{static_cast<char*>(memory) + page, kStack};
#ifdef EPSA_TSAN
  stack.tsan = __tsan_create_fiber(0);
#endif
  return stack;
}

#ifdef EPSA_TSAN

// Two threads of a launch never share a stack: one would race with the other
// there, and be taken for the same elsewhere. The next launch may have it.
std::vector<Stack> used_stacks;

void give_stack(const Stack& stack, bool left_in_order) {
  if (left_in_order &&
      spare_stacks.size() + used_stacks.size() < size_t{kMostThreads}) {
    used_stacks.push_back(stack);
  } else {  // making one takes TSan nearly a millisecond
    const size_t page = sysconf(_SC_PAGESIZE);
    __tsan_destroy_fiber(stack.tsan);
    munmap(stack.base - page, page + stack.bytes);
  }
}

void end_launch() {
  spare_stacks.insert(spare_stacks.end(), used_stacks.begin(),
                      used_stacks.end());
  used_stacks.clear();
}

#else

void give_stack(const Stack& stack, bool) { spare_stacks.push_back(stack); }
void end_launch() {}

#endif

// ---- contexts ----

#ifdef EPSA_UCONTEXT

using Context = ucontext_t;

void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void jump(Context& from, Context& to) { swapcontext(&from, &to); }

#else

// Saves what a function must preserve on the stack of the one that calls, then
// goes on as the other did. Neither changes the floating-point modes.
extern "C" __attribute__((visibility("hidden"))) void epsa_switch_stacks(
    void** from, void* to);
asm(R"(
.text
.hidden epsa_switch_stacks
.globl epsa_switch_stacks
.type epsa_switch_stacks, @function
epsa_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size epsa_switch_stacks, .-epsa_switch_stacks
)");

using Context = void*;  // the stack pointer

void prepare(Context& context, char* stack, void (*entry)()) {
  // Six registers, the entry, and a return address that nobody uses.
  void** top = reinterpret_cast<void**>(stack + kStack) - 8;
  std::fill_n(top, 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  context = top;
}

void jump(Context& from, Context& to) { epsa_switch_stacks(&from, to); }

#endif

// ---- threads, blocks, clusters, launches ----

enum class Wait { none, barrier, shuffle, cluster, exited };

struct Block;

struct Fiber : simt::detail::Place {
  Context context{};
  Stack stack;
  Block* owner = nullptr;
  Wait wait = Wait::none;
  int delay = 0;  // how often the random order passes it over
  // clusters
  bool arrived = false;  // and has not waited since
  int64_t phases = 0;  // barriers that it has passed
  // shuffles
  int mask = 0;
  uint64_t given = 0;
  uint64_t taken = 0;
  [[maybe_unused]] void* fake_stack = nullptr;  // ASan's
};

// Where a number of threads meet, time after time.
struct Meeting {
  int arrived = 0;
  int64_t phase = 0;
  // For TSan, the even and the odd phases: who is early in the next one must
  // not be seen by who is late in this one.
  uint64_t orders[2] = {};
  void* order(int64_t of_phase) { return &orders[of_phase & 1]; }
};

struct Launch {
  const LaunchOptions* options;
  const std::function<void()>* kernel;
  std::vector<int64_t> waiting;  // clusters to start, the last one first
  int size() const { return std::max(1, options->cluster); }
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  int rank = 0;
  int exited = 0;
  int delay = 0;
  uint64_t exits = 0;  // for TSan, their order
  unsigned char* shared = nullptr;
  Meeting barrier;
  std::vector<Meeting> shuffles;  // of the warps
  std::vector<Fiber> fibers;

  bool ended() const { return exited == static_cast<int>(fibers.size()); }
};

struct Cluster {
  Launch* launch = nullptr;
  int number = 0;  // of the launch
  Meeting barrier;
  std::vector<Block> blocks;
};

constexpr int64_t kMostBlocks = 64;

class Machine {
 public:
  explicit Machine(std::vector<Launch> launches);
  ~Machine();

  std::string run();

  // ---- for the running thread ----

  void begin() { acquire(&begin_); }
  void preempt(bool always);  // the others may go on
  void hand_over();  // the others go on; this one is in the queue, or waits
  void polled();
  void progress() { polls_ = 0; }
  void wake(std::span<Fiber> fibers, Wait waiting);
  [[noreturn]] void leave();  // it has ended
  [[noreturn]] void fail(std::string report);

 private:
  void start_blocks();
  void start_cluster(Launch& launch);
  void retire(Fiber& fiber);
  void retire(Cluster& cluster);
  Fiber* next();
  void enqueue(Fiber& fiber);
  void switch_to(Fiber& fiber);
  std::string stuck(const char* otherwise) const;
  uint64_t random(uint64_t below);

  std::vector<Launch> launches_;
  std::list<Cluster> clusters_;  // the resident ones
  int64_t resident_ = 0;  // blocks
  int64_t limit_ = 0;
  uint64_t random_ = 0;  // 0: in order
  Fiber host_;
  // The queue of threads that can go on, a ring; as long as no block starts it
  // needs no more memory, since nothing may be allocated in a thread's name.
  std::vector<Fiber*> ring_;
  size_t head_ = 0;
  size_t ready_ = 0;
  size_t living_ = 0;
  int64_t polls_ = 0;  // without progress
  Fiber* ended_ = nullptr;
  std::string report_;
  // For TSan, the orders between the host and the threads.
  uint64_t begin_ = 0;
  uint64_t end_ = 0;
};

Machine* machine = nullptr;

Fiber& self() { return static_cast<Fiber&>(*simt::detail::here); }

Machine::Machine(std::vector<Launch> launches)
    : launches_(std::move(launches)) {
  const LaunchOptions& first = *launches_[0].options;
  random_ = first.seed * 0x9e3779b97f4a7c15u;  // odd: 0 for 0 alone
  int threads = 1;
  for (const Launch& launch : launches_) {
    threads = std::max(threads, launch.options->threads);
  }
  limit_ = std::clamp(kMostThreads / threads, int64_t{1}, kMostBlocks);
  if (first.max_resident > 0) {
    limit_ = std::min<int64_t>(limit_, first.max_resident);
  }
  for (Launch& launch : launches_) {
    launch.waiting.resize(launch.options->blocks / launch.size());
    std::iota(launch.waiting.rbegin(), launch.waiting.rend(), 0);
    for (size_t i = launch.waiting.size(); random_ != 0 && i > 1; --i) {
      std::swap(launch.waiting[i - 1], launch.waiting[random(i)]);
    }
  }
  machine = this;
  simt::detail::here = &host_;
#ifdef EPSA_TSAN
  host_.stack.tsan = __tsan_get_current_fiber();
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);  // and writes
#endif
  release(&begin_);
}

Machine::~Machine() {
  // After a failure some threads are where they were: nothing runs them again.
  for (Cluster& cluster : clusters_) {
    for (Block& block : cluster.blocks) {
      for (Fiber& fiber : block.fibers) {
        if (fiber.stack.base != nullptr) {
          retire(fiber);
        }
      }
    }
    retire(cluster);
  }
  end_launch();
#ifdef EPSA_TSAN
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  acquire(&end_);
  simt::detail::here = nullptr;
  machine = nullptr;
}

uint64_t Machine::random(uint64_t below) {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return (random_ >> 32) * below >> 32;
}

std::string Machine::run() {
  start_blocks();
  while (living_ > 0) {
    Fiber* fiber = next();
    if (fiber == nullptr) {
      return stuck("deadlock");
    }
    switch_to(*fiber);  // comes back when a thread has ended, or on failure
    if (!report_.empty()) {
      return report_;
    }
    Cluster& cluster = *ended_->owner->cluster;
    retire(*ended_);
    --living_;
    if (std::ranges::all_of(cluster.blocks, &Block::ended)) {
      resident_ -= static_cast<int64_t>(cluster.blocks.size());
      retire(cluster);
      clusters_.remove_if([&](Cluster& other) { return &other == &cluster; });
    }
    start_blocks();
  }
  return "";
}

void Machine::start_blocks() {
  // Launches take turns, in order or at random; where one cannot start a
  // cluster, all the others are asked before this ends.
  const size_t count = launches_.size();
  for (size_t idle = 0, turn = 0; idle < count; ++turn) {
    if (random_ != 0 && idle == 0) {
      turn = random(count);
    }
    Launch& launch = launches_[turn % count];
    if (launch.waiting.empty() ||
        (resident_ > 0 && resident_ + launch.size() > limit_)) {
      ++idle;
      continue;
    }
    idle = 0;
    start_cluster(launch);
  }
}

void thread_main();

void Machine::start_cluster(Launch& launch) {
  const LaunchOptions& options = *launch.options;
  Cluster& cluster = clusters_.emplace_back();
  cluster.launch = &launch;
  cluster.number = static_cast<int>(&launch - launches_.data());
  cluster.blocks = std::vector<Block>(launch.size());
  const int64_t index = launch.waiting.back();
  launch.waiting.pop_back();
  resident_ += launch.size();
  living_ += static_cast<size_t>(launch.size()) * options.threads;
  if (living_ > ring_.size()) {
    std::rotate(ring_.begin(), ring_.begin() + head_, ring_.end());
    head_ = 0;
    ring_.resize(std::bit_ceil(living_));
  }
  for (int rank = 0; rank < launch.size(); ++rank) {
    Block& block = cluster.blocks[rank];
    block.cluster = &cluster;
    block.rank = rank;
    block.shuffles.resize(options.threads / simt::kWarp);
    void* shared = nullptr;
    if (posix_memalign(&shared, 16, options.shared_bytes) != 0) {
      std::perror("shared memory");
      std::abort();
    }
    std::memset(shared, 0xff, options.shared_bytes);
    block.shared = static_cast<unsigned char*>(shared);
    if (random_ != 0 && random(4) == 0) {
      block.delay = static_cast<int>(random(16 * options.threads));
    }
    block.fibers = std::vector<Fiber>(options.threads);
    for (int i = 0; i < options.threads; ++i) {
      Fiber& fiber = block.fibers[i];
      fiber.thread = i;
      fiber.threads = options.threads;
      fiber.block = index * launch.size() + rank;
      fiber.shared = block.shared;
      fiber.owner = &block;
      if (random_ != 0 && random(8) == 0) {
        fiber.delay = static_cast<int>(random(64));
      }
      fiber.stack = take_stack();
      prepare(fiber.context, fiber.stack.base, thread_main);
      enqueue(fiber);
    }
  }
  progress();
}

void Machine::retire(Fiber& fiber) {
#ifdef EPSA_TSAN
  // What it did is before the launch's end, also where it did not come to its
  // own.
  __tsan_switch_to_fiber(fiber.stack.tsan, kNoSync);
  release(&end_);
  __tsan_switch_to_fiber(host_.stack.tsan, kNoSync);
#endif
  give_stack(fiber.stack, fiber.wait == Wait::exited);
  fiber.stack = {};
}

void Machine::retire(Cluster& cluster) {
  for (Block& block : cluster.blocks) {
    unpoison(block.shared, cluster.launch->options->shared_bytes);
    std::free(block.shared);
  }
}

void Machine::enqueue(Fiber& fiber) {
  ring_[(head_ + ready_) & (ring_.size() - 1)] = &fiber;
  ++ready_;
}

// The thread that goes on, no longer in the queue; null where there is none.
Fiber* Machine::next() {
  if (ready_ == 0) {
    return nullptr;
  }
  const size_t mask = ring_.size() - 1;
  Fiber*& first = ring_[head_ & mask];
  for (int tries = 0; random_ != 0 && tries < 4; ++tries) {
    std::swap(first, ring_[(head_ + random(ready_)) & mask]);
    int& delay = first->delay > 0 ? first->delay : first->owner->delay;
    if (delay == 0) {
      break;
    }
    --delay;
  }
  Fiber* fiber = first;
  head_ = (head_ + 1) & mask;
  --ready_;
  return fiber;
}

// ASan wants to know the stacks on both sides; the host's own it tells us.
[[maybe_unused]] Fiber* before_switch = nullptr;

void after_switch() {
#ifdef EPSA_ASAN
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(self().fake_stack, &bottom, &bytes);
  before_switch->stack.base = static_cast<char*>(const_cast<void*>(bottom));
  before_switch->stack.bytes = bytes;
#endif
}

void Machine::switch_to(Fiber& fiber) {
  Fiber& from = self();
  simt::detail::here = &fiber;
#ifdef EPSA_ASAN
  before_switch = &from;
  __sanitizer_start_switch_fiber(
      from.wait == Wait::exited ? nullptr : &from.fake_stack,
      fiber.stack.base, fiber.stack.bytes);
#endif
#ifdef EPSA_TSAN
  __tsan_switch_to_fiber(fiber.stack.tsan, kNoSync);
#endif
  jump(from.context, fiber.context);
  after_switch();
}

void thread_main() {
  after_switch();
  machine->begin();
  Block& block = *self().owner;
  const Launch& launch = *block.cluster->launch;
  (*launch.kernel)();
  if (!self().copies.empty()) {
    simt::detail::fail("exit with a copy_async16 that was not waited for");
  }
  if (self().arrived) {
    simt::detail::fail("exit between cluster_arrive and cluster_wait");
  }
  self().wait = Wait::exited;
  ++block.exited;
  release(&block.exits);
  if (block.ended() && launch.options->cluster > 0) {
    // Its memory is gone now, whatever others of the cluster may still read.
    // For TSan the last thread writes this: a race with reads that no cluster
    // barrier orders before the exit.
    acquire(&block.exits);
    poison(block.shared, launch.options->shared_bytes);
  }
  machine->leave();
}

void Machine::hand_over() {
  Fiber* fiber = next();
  if (fiber == nullptr) {
    fail(stuck("deadlock"));
  }
  if (fiber != &self()) {
    switch_to(*fiber);
  }
}

void Machine::preempt(bool always) {
  if (always || random_ == 0 || random(2) == 0) {
    enqueue(self());
    hand_over();
  }
}

void Machine::polled() {
  // Long enough for every thread to have had its turn, also at random.
  if (++polls_ > 100000 + 64 * static_cast<int64_t>(living_)) {
    fail(stuck("livelock"));
  }
  preempt(true);
}

void Machine::wake(std::span<Fiber> fibers, Wait waiting) {
  for (Fiber& fiber : fibers) {
    if (fiber.wait == waiting) {
      fiber.wait = Wait::none;
      enqueue(fiber);
    }
  }
}

void Machine::leave() {
  progress();
  ended_ = &self();
  switch_to(host_);
  __builtin_unreachable();
}

void Machine::fail(std::string report) {
  report_ = std::move(report);  // no destructor runs here any more
  switch_to(host_);
  __builtin_unreachable();
}

// Why no thread can go on, from how many threads of each block wait for what.
std::string Machine::stuck(const char* otherwise) const {
  static constexpr const char* kNames[] = {
      "polling", "at a barrier", "at a shuffle", "at a cluster barrier",
      "exited"};
  std::string cause;
  std::string listing;
  int listed = 0;
  for (const Cluster& cluster : clusters_) {
    const bool exits = std::ranges::any_of(cluster.blocks, &Block::exited);
    for (const Block& block : cluster.blocks) {
      int counts[std::size(kNames)] = {};
      for (const Fiber& fiber : block.fibers) {
        ++counts[static_cast<int>(fiber.wait)];
      }
      const auto count = [&](Wait wait) {
        return counts[static_cast<int>(wait)];
      };
      const int kinds = (count(Wait::barrier) > 0) +
                        (count(Wait::shuffle) > 0) +
                        (count(Wait::cluster) > 0);
      if (cause.empty() && count(Wait::none) == 0 && kinds > 0) {
        if (kinds > 1) {
          cause = "divergent barriers";
        } else if (count(Wait::exited) > 0 ||
                   (exits && count(Wait::cluster) > 0)) {
          cause = "exit before a barrier";
        }
      }
      if (++listed > 8) {
        continue;
      }
      listing += listed > 1 ? "; " : "";
      if (launches_.size() > 1) {
        listing += "launch " + std::to_string(cluster.number) + ", ";
      }
      listing += "block " + std::to_string(block.fibers[0].block) + ":";
      const char* comma = " ";
      for (size_t i = 0; i < std::size(kNames); ++i) {
        if (counts[i] > 0) {
          listing += comma + std::to_string(counts[i]) + " " + kNames[i];
          comma = ", ";
        }
      }
    }
  }
  if (cause.empty()) {
    cause = otherwise;
  }
  return cause + ": " + listing + (listed > 8 ? "; ..." : "");
}

// All of `fibers` meet; what each did before, each sees after.
void meet(Meeting& meeting, Wait kind, std::span<Fiber> fibers) {
  void* order = meeting.order(meeting.phase);
  release(order);
  machine->progress();
  self().wait = kind;
  if (++meeting.arrived == static_cast<int>(fibers.size())) {
    meeting.arrived = 0;
    ++meeting.phase;
    if (kind == Wait::shuffle) {
      for (size_t lane = 0; lane < fibers.size(); ++lane) {
        fibers[lane].taken = fibers[lane ^ fibers[lane].mask].given;
      }
    }
    machine->wake(fibers, kind);
  }
  machine->hand_over();
  acquire(order);
}

// The running thread's cluster.
Cluster& own_cluster() {
  Cluster& cluster = *self().owner->cluster;
  if (cluster.launch->options->cluster == 0) {
    simt::detail::fail("a cluster's primitive in a launch without clusters");
  }
  return cluster;
}

std::string invalid(const LaunchOptions& options) {
  if (options.blocks < 1 || options.threads < 1 || options.threads > 1024) {
    return "invalid launch: no blocks, no threads or more than 1024";
  }
  if (options.cluster < 0 || options.cluster > 16 ||
      options.blocks % std::max(1, options.cluster) != 0) {
    return "invalid launch: more than 16 blocks in a cluster, or blocks left";
  }
  if (options.shared_bytes < 0 || options.shared_bytes % 16 != 0) {
    return "invalid launch: shared memory is not a multiple of 16 bytes";
  }
  return "";
}

}  // namespace

std::string launch_together(
    const std::vector<std::pair<LaunchOptions, std::function<void()>>>& all) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  std::vector<Launch> launches;
  for (const auto& [options, kernel] : all) {
    if (const std::string report = invalid(options); !report.empty()) {
      return report;
    }
    launches.push_back({&options, &kernel, {}});
  }
  return Machine(std::move(launches)).run();
}

std::string launch(const LaunchOptions& options,
                   const std::function<void()>& kernel) {
  return launch_together({{options, kernel}});
}

}  // namespace epsa::emulator

namespace epsa::cuda::simt {

using namespace emulator;

detail::Place* detail::here = nullptr;

void detail::step(Step kind) {
  if (kind == Step::polled) {
    machine->polled();
    return;
  }
  if (kind == Step::progress) {
    machine->progress();
  }
  machine->preempt(false);
}

void detail::fail(const char* what) {
  machine->fail(std::string(what) + ": block " + std::to_string(here->block) +
                ", thread " + std::to_string(here->thread));
}

bool detail::in_shared_memory(const void* begin, int64_t bytes) {
  const int64_t offset =
      static_cast<const unsigned char*>(begin) - here->shared;
  return offset >= 0 &&
         offset + bytes <=
             self().owner->cluster->launch->options->shared_bytes;
}

uint64_t detail::exchange(uint64_t bits, int mask) {
  Block& block = *self().owner;
  const size_t warp = here->thread / kWarp;
  if (warp >= block.shuffles.size()) {
    fail("shuffle in a warp of fewer than 32 threads");
  }
  if (mask < 0 || mask >= kWarp) {
    fail("shuffle with a lane outside of the warp");
  }
  self().given = bits;
  self().mask = mask;
  meet(block.shuffles[warp], Wait::shuffle,
       std::span(block.fibers).subspan(warp * kWarp, kWarp));
  return self().taken;
}

const void* detail::peer(const void* shared, int rank) {
  Cluster& cluster = own_cluster();
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size())) {
    fail("cluster_peer of a rank outside of the cluster");
  }
  if (!in_shared_memory(shared, 1)) {
    fail("cluster_peer of an address outside of the block's shared memory");
  }
  if (self().phases == 0) {
    fail("cluster_peer before any cluster barrier");
  }
  Block& block = cluster.blocks[rank];
  if (block.exited > 0) {
    fail("cluster_peer after the peer's exit");
  }
  const unsigned char* mapped =
      block.shared + (static_cast<const unsigned char*>(shared) - here->shared);
  step(Step::progress);
  return mapped;
}

void barrier() {
  Block& block = *self().owner;
  meet(block.barrier, Wait::barrier, block.fibers);
}

int cluster_rank() {
  own_cluster();
  return self().owner->rank;
}

void cluster_arrive() {
  Cluster& cluster = own_cluster();
  if (self().arrived) {
    detail::fail("cluster_arrive twice without a cluster_wait between");
  }
  self().arrived = true;
  Meeting& meeting = cluster.barrier;
  release(meeting.order(meeting.phase));
  if (++meeting.arrived ==
      static_cast<int>(cluster.blocks.size()) * block_threads()) {
    meeting.arrived = 0;
    ++meeting.phase;
    for (Block& block : cluster.blocks) {
      machine->wake(block.fibers, Wait::cluster);
    }
  }
  detail::step(detail::Step::progress);
}

void cluster_wait() {
  Cluster& cluster = own_cluster();
  if (!self().arrived) {
    detail::fail("cluster_wait without a cluster_arrive");
  }
  // A thread passes every phase, so that its count is the phase's number.
  const int64_t phase = self().phases;
  machine->progress();
  if (cluster.barrier.phase == phase) {
    self().wait = Wait::cluster;
    machine->hand_over();
  } else {
    machine->preempt(false);
  }
  acquire(cluster.barrier.order(phase));
  self().arrived = false;
  ++self().phases;
}

}  // namespace epsa::cuda::simt
