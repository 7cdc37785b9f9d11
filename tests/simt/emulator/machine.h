// The machine that runs a launch: its blocks and threads, and which thread is next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <list>
#include <span>
#include <string>
#include <vector>

#include "emulated_simt.h"
#include "emulator.h"
#include "emulator/fibers.h"
#include "emulator/sanitizers.h"

namespace epsa::emulator {

namespace simt = cuda::simt;

enum class Wait { none, barrier, shuffle, cluster, exited };

struct Block;

struct Fiber : simt::detail::Place {
  Context context{};
  Stack stack;
  Block* owner = nullptr;
  Wait wait = Wait::none;
  int delay = 0;  // how often the random order passes it over
  // clusters
  bool arrived = false;  // true from cluster_arrive to cluster_wait
  int64_t phases = 0;    // barriers passed
  // shuffles
  int mask = 0;
  uint64_t given = 0;
  uint64_t taken = 0;
  [[maybe_unused]] void* fake_stack = nullptr;  // ASan's
};

// A place where a number of threads meet, time after time.
struct Meeting {
  int arrived = 0;
  int64_t phase = 0;
  // For TSan, one order for even and one for odd phases. A thread that is late in
  // this phase must not be ordered after one that is early in the next.
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
  uint64_t exits = 0;  // for TSan, the order of the exits
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

// Runs the threads of some launches, one at a time, until all have ended.
class Machine {
 public:
  explicit Machine(std::vector<Launch> launches);
  ~Machine();

  std::string run();

  // ---- for the running thread ----

  void begin() { acquire(&begin_); }
  void preempt(bool always);  // lets the others go on, sometimes or always
  void hand_over();           // the others go on; the caller has queued this one or waits
  void polled();
  void progress() { polls_ = 0; }
  void wake(std::span<Fiber> fibers, Wait waiting);
  [[noreturn]] void leave();  // the thread has ended
  [[noreturn]] void fail(std::string report);

 private:
  void start_blocks();
  void start_cluster(Launch& launch);
  void start_block(Block& block, int64_t number, const LaunchOptions& options);
  void retire(Fiber& fiber);
  void retire(Cluster& cluster);
  Fiber* next();
  void enqueue(Fiber& fiber);
  void switch_to(Fiber& fiber);
  // Why no thread can go on; `otherwise` where no mistake shows.
  std::string stuck(const char* otherwise) const;
  uint64_t random(uint64_t below);

  std::vector<Launch> launches_;
  std::list<Cluster> clusters_;  // the resident ones
  int64_t resident_ = 0;         // blocks
  int64_t limit_ = 0;
  uint64_t random_ = 0;  // 0: no random order
  Fiber host_;
  // The queue of threads that can go on, a ring. It grows only when a block
  // starts, on the host: nothing may be allocated in a thread's name.
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

extern Machine* machine;  // the one that runs

// The running thread.
inline Fiber& self() {
  return static_cast<Fiber&>(*simt::detail::here);
}

}  // namespace epsa::emulator
