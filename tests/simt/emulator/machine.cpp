#include "emulator/machine.h"

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>

namespace epsa::emulator {

Machine* machine = nullptr;

namespace {

constexpr int64_t kMostBlocks = 64;

void thread_main();

}  // namespace

// ---- the launches ----

Machine::Machine(std::vector<Launch> launches) : launches_(std::move(launches)) {
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
  // After a failure some threads have not ended. Nothing runs them again.
  for (Cluster& cluster : clusters_) {
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
    switch_to(*fiber);  // returns when a thread has ended, or on failure
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
  // Launches take turns, in order or at random. This ends when none of them can
  // start a cluster.
  const size_t count = launches_.size();
  for (size_t idle = 0, turn = 0; idle < count; ++turn) {
    if (random_ != 0 && idle == 0) {
      turn = random(count);
    }
    Launch& launch = launches_[turn % count];
    if (launch.waiting.empty() || (resident_ > 0 && resident_ + launch.size() > limit_)) {
      ++idle;
      continue;
    }
    idle = 0;
    start_cluster(launch);
  }
}

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
    start_block(block, index * launch.size() + rank, options);
  }
  progress();
}

void Machine::start_block(Block& block, int64_t number, const LaunchOptions& options) {
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
    fiber.block = number;
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

void Machine::retire(Fiber& fiber) {
#ifdef EPSA_TSAN
  // All that the thread did is before the launch's end, even if it never ended.
  __tsan_switch_to_fiber(fiber.stack.tsan, kNoSync);
  release(&end_);
  __tsan_switch_to_fiber(host_.stack.tsan, kNoSync);
#endif
  give_stack(fiber.stack, fiber.wait == Wait::exited);
  fiber.stack = {};
}

void Machine::retire(Cluster& cluster) {
  for (Block& block : cluster.blocks) {
    for (Fiber& fiber : block.fibers) {
      if (fiber.stack.base != nullptr) {
        retire(fiber);
      }
    }
    unpoison(block.shared, cluster.launch->options->shared_bytes);
    std::free(block.shared);
  }
}

void Machine::enqueue(Fiber& fiber) {
  ring_[(head_ + ready_) & (ring_.size() - 1)] = &fiber;
  ++ready_;
}

// Takes the thread that goes on from the queue; null where the queue is empty.
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

// ---- the running thread ----

namespace {

// ASan must know the stacks on both sides. It tells where the host's own stack is.
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

}  // namespace

void Machine::switch_to(Fiber& fiber) {
  Fiber& from = self();
  simt::detail::here = &fiber;
#ifdef EPSA_ASAN
  before_switch = &from;
  __sanitizer_start_switch_fiber(
      from.wait == Wait::exited ? nullptr : &from.fake_stack, fiber.stack.base, fiber.stack.bytes);
#endif
#ifdef EPSA_TSAN
  __tsan_switch_to_fiber(fiber.stack.tsan, kNoSync);
#endif
  jump(from.context, fiber.context);
  after_switch();
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
  // So many polls give every thread its turn, also in a random order.
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
  report_ = std::move(report);  // no destructor runs on this stack any more
  switch_to(host_);
  __builtin_unreachable();
}

namespace {

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
    // The block's memory is gone now, even if others of the cluster still read
    // it. For TSan the last thread writes it: that races with every read that no
    // cluster barrier orders before the exit.
    acquire(&block.exits);
    poison(block.shared, launch.options->shared_bytes);
  }
  machine->leave();
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

std::string launch(const LaunchOptions& options, const std::function<void()>& kernel) {
  return launch_together({{options, kernel}});
}

}  // namespace epsa::emulator
