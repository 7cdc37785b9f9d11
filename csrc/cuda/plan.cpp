// Plans, shared memory and workspace of the CUDA kernels (plan.h).
#include "cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <numeric>

#include "cuda/launch_number.h"
#include "cuda/params.h"

namespace epsa::cuda {
namespace {

constexpr int kThreads = 256;
// A block that holds a piece of this size has kMaxThreads threads to move it.
constexpr int64_t kLargePiece = 56 * 1024;
// The bytes that a streaming block reads for one ticket. A multiprocessor reads them
// in some microseconds, and they are few beside the L2 cache.
constexpr int64_t kPartBytes = 32 * 1024;
// The shared memory that the system takes from each block.
constexpr int64_t kSystemShared = 1024;
// The maximum of CUDA's grids.
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
int64_t ceil_div(int64_t x, int64_t y) {
  return (x + y - 1) / y;
}
// For sizes that size_error and the bounds of parts keep small.
int narrow(int64_t x) {
  return static_cast<int>(x);
}

int64_t sample_elements(const Problem& p) {
  return int64_t{p.vector()} * p.pixels;
}

// The least number of planes that together fill whole vectors.
int planes_of_vector(const Problem& p, int vector) {
  return vector / std::gcd(p.pixels, vector);
}

int units_of(const Problem& p, int planes) {
  return p.layout == Layout::channels_last ? p.pixels : p.vector() / planes;
}

int largest_cluster(const Device& device) {
  const int cc = device.compute_capability;
  // The portable size is 8; the data-centre parts allow 16.
  return cc < 90 ? 1 : cc < 120 ? 16 : 8;
}

int blocks_on_multiprocessor(const Problem& p, const Plan& plan, const Device& device) {
  const int64_t by_registers = threads_by_registers(p.dtype) / plan.threads;
  const int64_t by_shared = device.shared_per_multiprocessor / (plan.shared_bytes + kSystemShared);
  const int64_t by_threads = device.threads_per_multiprocessor / plan.threads;
  return static_cast<int>(
      std::min<int64_t>({by_registers, by_shared, by_threads, device.blocks_per_multiprocessor}));
}

// The samples whose weight gradients one block sums. There are about as many groups
// for the last block to sum. A block that has `room` bytes for a group's vectors sums
// them much faster, so a group may be smaller to fit, but not by more than half.
int group_of(const Problem& p, int64_t room) {
  const int root = std::max(8, narrow(std::ceil(std::sqrt(p.samples))));
  const int64_t sample = 2 * (int64_t{p.vector()} + int64_t{p.branches} * p.hidden) *
      element_size(accumulation_type(p.dtype));
  const int64_t fits = room / sample;
  const int64_t group = fits >= (root + 1) / 2 ? std::min<int64_t>(root, fits) : root;
  return narrow(std::min<int64_t>(p.samples, group));
}

int64_t piece_elements(const Problem& p, const Split& split) {
  const int64_t units = ceil_div(split.units, split.parts);
  return units *
      (p.layout == Layout::channels_last ? p.vector() : int64_t{split.planes} * p.pixels);
}

// The number of partial sums of one sample.
int64_t partials_of(const Problem& p, const Split& split) {
  const bool pixels = p.layout == Layout::channels_last;
  return int64_t{p.vector()} * (pixels ? split.parts : split.chunks);
}

Plan streaming_plan(const Problem& p, const Device& device) {
  Plan plan{};
  plan.variant = Variant::streaming;
  plan.cluster = 1;
  plan.pieces = 0;
  plan.threads = kThreads;
  plan.vector = p.aligned ? full_vector(p.dtype) : 1;
  plan.group = group_of(p, 0);

  const int64_t bytes = element_size(p.dtype);
  Split& split = plan.split;
  split.planes = split.chunks = 1;
  split.chunk = p.pixels;
  const bool planes = p.layout == Layout::contiguous;
  if (planes && p.pixels * bytes > 2 * kPartBytes) {
    // Rows that begin between vectors do not pay here. Single elements can be cut
    // anywhere.
    if (p.pixels % plan.vector) {
      plan.vector = 1;
    }
    const int64_t line = 128 / bytes;
    split.chunk =
        narrow(round_up(ceil_div(p.pixels, ceil_div(p.pixels * bytes, kPartBytes)), line));
    split.chunks = narrow(ceil_div(p.pixels, split.chunk));
    split.parts = split.units = p.vector() * split.chunks;
  } else {
    if (planes) {
      split.planes = planes_of_vector(p, plan.vector);
    }
    split.units = units_of(p, split.planes);
    // In channels_last a part has S*C partial sums. They must be few beside its
    // elements.
    const int64_t least = planes ? 0 : 16 * p.vector() * bytes;
    split.parts = narrow(
        std::min<int64_t>(
            ceil_div(sample_elements(p) * bytes, std::max(kPartBytes, least)), split.units));
  }
  plan.shared_bytes = shared_bytes(p, plan);
  const int64_t resident = static_cast<int64_t>(device.multiprocessors) *
      std::max(1, blocks_on_multiprocessor(p, plan, device));
  plan.blocks = narrow(std::min(resident, int64_t{p.samples} * 2 * split.parts));
  // A sample's reweight tickets come when its pool tickets are done and its maps are
  // still in the L2 cache.
  const int64_t wanted = ceil_div(plan.blocks, 2 * split.parts) + 1;
  const int64_t cached = std::max<int64_t>(1, device.l2 / 4 / (sample_elements(p) * bytes));
  plan.lag = narrow(std::min({wanted, cached, int64_t{p.samples}}));
  return plan;
}

Plan resident_plan(const Problem& p, int cluster, int pieces) {
  Plan plan{};
  plan.variant = Variant::resident;
  plan.cluster = cluster;
  plan.pieces = pieces;
  plan.vector = p.aligned ? full_vector(p.dtype) : 1;
  plan.blocks = p.samples * cluster;
  Split& split = plan.split;
  split.planes = p.layout == Layout::contiguous ? planes_of_vector(p, plan.vector) : 1;
  split.chunks = 1;
  split.chunk = p.pixels;
  split.units = units_of(p, split.planes);
  split.parts = cluster;
  const int64_t held = pieces * piece_elements(p, split) * element_size(p.dtype);
  plan.threads = held > kLargePiece ? kMaxThreads : kThreads;
  plan.group = group_of(p, held);  // the maps' room is free when the group is summed
  plan.shared_bytes = shared_bytes(p, plan);
  return plan;
}

// Does a resident plan read single elements from device memory? Maps that are not held are summed
// as they come, and their rows may begin between vectors.
bool has_short_loads(const Problem& p, const Plan& plan) {
  return p.pass == Pass::backward && plan.pieces == 1 && p.layout == Layout::contiguous &&
      p.pixels % plan.vector != 0;
}

// Do a resident plan's blocks keep the memory busy? Else streaming is faster.
bool is_busy(const Problem& p, const Device& device, const Candidate& c) {
  if (c.plan.variant == Variant::streaming) {
    return true;
  }
  // Short loads need all threads that a multiprocessor can have.
  const int threads = blocks_on_multiprocessor(p, c.plan, device) * c.plan.threads;
  if (has_short_loads(p, c.plan) && threads < threads_by_registers(p.dtype)) {
    return false;
  }
  // A block alone on its multiprocessor leaves the memory idle while it waits for its cluster.
  return c.resident > device.multiprocessors || c.plan.blocks <= c.resident;
}

}  // namespace

const char* name_of(Variant variant) {
  return variant == Variant::resident ? "resident" : "streaming";
}

std::string kernel_name(Pass pass, Variant variant) {
  return std::string(pass == Pass::forward ? "forward_" : "backward_") + name_of(variant);
}

std::string size_error(
    int64_t samples, int64_t branches, int64_t channels, int64_t pixels, int64_t hidden,
    bool shared) {
  constexpr int64_t kMost = int64_t{1} << 29;
  const auto product = [](std::initializer_list<int64_t> sizes) {
    int64_t result = 1;
    for (const int64_t size : sizes) {
      if (__builtin_mul_overflow(result, size, &result)) {
        return std::numeric_limits<int64_t>::max();
      }
    }
    return result;
  };
  const auto error = [](const char* what, int64_t size) {
    return size < kMost ? std::string()
                        : std::string(what) + " is " + std::to_string(size) +
            ", expected less than 2^29 on a CUDA device";
  };
  const std::string errors[] = {
      error("the batch N", samples), error("the number of pixels H*W", pixels),
      error("the number of channels S*C", product({branches, channels})),
      error("the number of SE weights r*C", product({shared ? 1 : branches, hidden, channels})),
      error("the number of hidden units S*r", product({branches, hidden})),
      // a part of 32 KiB holds 4096 doubles
      error("N*S*C*H*W / 4096", product({samples, branches, channels, pixels}) / 4096)};
  for (const std::string& e : errors) {
    if (!e.empty()) {
      return e;
    }
  }
  return "";
}

bool may_align(Dtype dtype, Layout layout, int channels, int pixels) {
  const int64_t run = layout == Layout::contiguous ? int64_t{channels} * pixels : channels;
  return dtype != Dtype::f64 && run * element_size(dtype) % 16 == 0;
}

void rank(const Problem& p, const Device& device, std::vector<Candidate>& candidates) {
  candidates.erase(
      std::remove_if(
          candidates.begin(), candidates.end(),
          [&](const Candidate& c) { return !is_busy(p, device, c); }),
      candidates.end());
  // Microseconds, fitted to the times of all plans on an H200 (docs/cuda.md). A multiprocessor's
  // blocks come in rounds, and each round waits for its first loads and its barriers. No other
  // block hides the time in which a block moves its own maps. Each block computes the whole gate.
  constexpr double kRound = 3, kPerByte = 2e-5, kPerChannel = 3.0 / 256, kShortLoads = 1.3;
  const int maps = p.pass == Pass::forward ? 1 : 2;
  const double bytes = static_cast<double>(sample_elements(p)) * element_size(p.dtype) * maps;
  const auto cost = [&](const Candidate& c) {
    if (c.plan.variant == Variant::streaming) {
      return std::numeric_limits<double>::infinity();
    }
    const auto rounds = static_cast<double>(ceil_div(c.plan.blocks, c.resident));
    const auto gates = static_cast<double>(ceil_div(c.plan.blocks, device.multiprocessors));
    const double time =
        rounds * (kRound + kPerByte * bytes / c.plan.cluster) + gates * kPerChannel * p.vector();
    return has_short_loads(p, c.plan) ? kShortLoads * time : time;
  };
  // Among equals the first holds more maps and has more loads under way.
  std::stable_sort(candidates.begin(), candidates.end(), [&](const auto& a, const auto& b) {
    return cost(a) < cost(b);
  });
}

std::vector<Candidate> plans(const Problem& p, const Device& device) {
  std::vector<Candidate> result;
  const auto add = [&](const Plan& plan) {
    const int64_t blocks = blocks_on_multiprocessor(p, plan, device);
    // Whole clusters only. Devices whose parts differ in size hold still fewer.
    const int64_t resident = blocks * device.multiprocessors / plan.cluster * plan.cluster;
    result.push_back({plan, std::max<int64_t>(resident, 1)});
  };
  const bool possible = p.pass == Pass::forward ? !p.pooled_given : p.grad_out_given;
  const int most_pieces = p.pass == Pass::forward ? 1 : 2;
  for (int k = 1; possible && k <= largest_cluster(device); k *= 2) {
    if (int64_t{p.samples} * k > kMaxBlocks) {
      break;
    }
    for (int pieces = most_pieces; pieces >= 1; --pieces) {
      const Plan plan = resident_plan(p, k, pieces);
      if (k <= plan.split.units && plan.shared_bytes <= device.shared_per_block &&
          blocks_on_multiprocessor(p, plan, device) > 0) {
        add(plan);
      }
    }
  }
  add(streaming_plan(p, device));
  rank(p, device, result);
  return result;
}

int64_t shared_bytes(const Problem& p, const Plan& plan) {
  const int64_t acc = element_size(accumulation_type(p.dtype));
  const int64_t message = 16;
  const int64_t lanes = p.layout == Layout::channels_last ? plan.vector : 1;
  const int64_t meet = round_up(plan.threads * lanes * acc, 16);
  if (plan.variant == Variant::streaming) {
    return message + meet;
  }
  const int64_t piece =
      plan.pieces * round_up(piece_elements(p, plan.split) * element_size(p.dtype), 16);
  const int64_t vector = round_up(p.vector() * acc, 16);
  const int64_t hidden = round_up(p.branches * p.hidden * acc, 16);
  if (p.pass == Pass::forward) {
    return piece + meet + 4 * vector + hidden;
  }
  return piece + meet + 6 * vector + 2 * hidden + message;
}

Workspace workspace(const Problem& p, const Plan& plan) {
  Workspace w{};
  int64_t next = 0;
  const auto take = [&next](bool needed, int64_t bytes) {
    const int64_t at = next;
    next += needed ? round_up(bytes, 16) : 0;
    return at;
  };
  const bool streaming = plan.variant == Variant::streaming;
  const bool backward = p.pass == Pass::backward;
  const bool weights = backward && p.weights_wanted;
  const int64_t acc = element_size(accumulation_type(p.dtype));
  const int64_t groups = ceil_div(p.samples, plan.group);
  if (std::max<int64_t>(groups, plan.group) >= int64_t{1} << kArrivalBits) {
    throw std::logic_error("epsa_fused: a LaunchCounter cannot count to the number of groups");
  }
  const int64_t partials = partials_of(p, plan.split);
  const int64_t vectors = int64_t{p.samples} * p.vector() * acc;
  const int64_t hidden = int64_t{p.samples} * p.branches * p.hidden * acc;
  const int64_t weight_elements =
      p.weight_sets() * (int64_t{2} * p.hidden * p.channels + p.hidden + p.channels);
  const int64_t weight_row = round_up(weight_elements * acc, 16);  // read by 16 bytes

  w.ticket = take(streaming, 8);
  w.arrived = take(streaming, int64_t{p.samples} * 4);
  w.ready = take(streaming, int64_t{p.samples} * 4);
  w.cleared = next;
  w.groups_arrived = take(weights && p.samples > 1, (groups + 1) * 8);
  w.partial = take(streaming, p.samples * partials * acc);
  w.hidden = take(streaming || weights, hidden);
  w.scratch = take(streaming, vectors);
  w.summands = take(streaming && p.epilogue, vectors);
  w.grad_v = take(backward && (streaming || weights), vectors);
  w.grad_u = take(backward && (streaming || weights), hidden);
  w.grad_pooled = take(backward && streaming, vectors);
  w.group_sums = take(weights && groups > 1, groups * weight_row);
  w.bytes = next;
  return w;
}

void set_plan(Params& params, const Problem& p, const Plan& plan, void* memory) {
  params.samples = p.samples;
  params.branches = p.branches;
  params.channels = p.channels;
  params.pixels = p.pixels;
  params.hidden = p.hidden;
  params.shared = p.shared;
  params.pooled_given = p.pooled_given;
  params.grad_out_given = p.grad_out_given;
  params.feats_wanted = p.feats_wanted;
  params.weights_wanted = p.weights_wanted;
  params.cluster = plan.cluster;
  params.pieces = plan.pieces;
  params.lag = plan.lag;
  params.group = plan.group;
  params.split = plan.split;
  params.partials = partials_of(p, plan.split);
  params.launch = new_launch_number();

  const Workspace w = workspace(p, plan);
  const auto at = [memory](int64_t offset) {
    return static_cast<void*>(static_cast<char*>(memory) + offset);
  };
  params.ticket = static_cast<unsigned long long*>(at(w.ticket));
  params.arrived = static_cast<unsigned*>(at(w.arrived));
  params.ready = static_cast<unsigned*>(at(w.ready));
  params.groups_arrived = static_cast<LaunchCounter*>(at(w.groups_arrived));
  params.partial = at(w.partial);
  params.hidden_units = at(w.hidden);
  params.scratch = at(w.scratch);
  params.summands = at(w.summands);
  params.grad_v = at(w.grad_v);
  params.grad_u = at(w.grad_u);
  params.grad_pooled = at(w.grad_pooled);
  params.group_sums = at(w.group_sums);
}

}  // namespace epsa::cuda
