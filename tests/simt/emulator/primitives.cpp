// The primitives of emulated_simt.h, as the machine carries them out.
#include "emulator/machine.h"

namespace epsa::emulator {
namespace {

// Waits until all of `fibers` have met. Each then sees what any of them did before.
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

}  // namespace
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
  machine->fail(
      std::string(what) + ": block " + std::to_string(here->block) + ", thread " +
      std::to_string(here->thread));
}

bool detail::in_shared_memory(const void* begin, int64_t bytes) {
  const int64_t offset = static_cast<const unsigned char*>(begin) - here->shared;
  return offset >= 0 && offset + bytes <= self().owner->cluster->launch->options->shared_bytes;
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
  meet(block.shuffles[warp], Wait::shuffle, std::span(block.fibers).subspan(warp * kWarp, kWarp));
  return self().taken;
}

void detail::show(const void* mine, const void* (&of_lanes)[32]) {
  exchange(reinterpret_cast<uint64_t>(mine), 0);
  const std::vector<Fiber>& fibers = self().owner->fibers;
  const int first = here->thread / kWarp * kWarp;
  for (int lane = 0; lane < kWarp; ++lane) {
    of_lanes[lane] = reinterpret_cast<const void*>(fibers[first + lane].given);
  }
}

void detail::seen() {
  exchange(self().given, 0);
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
  if (++meeting.arrived == static_cast<int>(cluster.blocks.size()) * block_threads()) {
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
  // A thread passes every phase, so its count is the phase's number.
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
