// Times every launch plan that plan.h offers for EPSANet's stages, to check their
// ranking on a device. It needs no torch.
//
//   make gpu-plans           a table, and benchmarks/results/<device>-plans.csv
//   build/gpu/plans FILE     the same, to a file of your own
//
// A time is the median over replays of a CUDA graph. The graph launches the plan once
// on each of several sets of maps, together larger than the L2 cache. "of copy"
// compares with a copy of the same bytes, measured in the same way.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace epsa::cuda {
namespace {

constexpr int kBranches = 4;
constexpr int kReduction = 16;
constexpr int kRepeats = 15;

struct Stage {
  int planes, size;
};
constexpr Stage kStages[] = {{64, 56}, {128, 28}, {256, 14}, {512, 7}};

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(cudaGetErrorString(error));
  }
}

class Memory {
 public:
  explicit Memory(size_t bytes) {
    void* p = nullptr;
    check(cudaMalloc(&p, std::max<size_t>(bytes, 1)));
    memory_.reset(p);
  }
  unsigned char* data() const { return static_cast<unsigned char*>(memory_.get()); }

 private:
  struct Free {
    void operator()(void* p) const { cudaFree(p); }
  };
  std::unique_ptr<void, Free> memory_;
};

// Floats in [-1, 1); bf16 maps read the same bytes. Zeros would need less power than
// real maps and run faster.
Memory random_memory(size_t bytes) {
  static const std::vector<float> numbers = [] {
    std::mt19937 generator(0);
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<float> values(1 << 20);
    std::generate(values.begin(), values.end(), [&] { return uniform(generator); });
    return values;
  }();
  Memory memory(bytes);
  const size_t block = numbers.size() * sizeof(float);
  for (size_t at = 0; at < bytes; at += block) {
    check(cudaMemcpy(
        memory.data() + at, numbers.data(), std::min(block, bytes - at), cudaMemcpyHostToDevice));
  }
  return memory;
}

// ---- timing ----

struct Times {
  double median, spread;  // of one call, microseconds
};

// `call` launches set i's work on the stream.
Times time_calls(int sets, cudaStream_t stream, const std::function<void(int)>& call) {
  for (int i = 0; i < sets; ++i) {
    call(i);
  }
  check(cudaStreamSynchronize(stream));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < sets; ++i) {
    call(i);
  }
  cudaGraph_t graph;
  cudaGraphExec_t run;
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&run, graph, 0));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<double> times;
  for (int k = 0; k < kRepeats; ++k) {
    check(cudaGraphLaunch(run, stream));  // keeps the device busy meanwhile
    check(cudaEventRecord(begin, stream));
    check(cudaGraphLaunch(run, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(1e3 * ms / sets);
  }
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  check(cudaGraphExecDestroy(run));
  check(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return {times[kRepeats / 2], times[kRepeats * 3 / 4] - times[kRepeats / 4]};
}

// ---- one problem ----

// The S slots of one [N, S*C, H, W] tensor.
Maps maps_of(const Problem& p, void* data) {
  Maps maps{};
  const int64_t bytes = element_size(p.dtype);
  const bool last = p.layout == Layout::channels_last;
  for (int s = 0; s < p.branches; ++s) {
    maps.data[s] =
        static_cast<char*>(data) + s * int64_t{p.channels} * (last ? 1 : p.pixels) * bytes;
    maps.batch_stride[s] = int64_t{p.vector()} * p.pixels;
    maps.pixel_stride[s] = last ? p.vector() : 1;
  }
  return maps;
}

// The memory that one launch reads and writes.
struct Set {
  Memory x, y, to, pooled, attention, fc1, fc2, grad_fc1, grad_fc2, workspace;

  Set(const Problem& p, int64_t map_bytes, int64_t workspace_bytes)
      : x(random_memory(map_bytes)),
        y(random_memory(p.pass == Pass::backward ? map_bytes : 0)),
        to(map_bytes),
        pooled(random_memory(vectors(p))),
        attention(random_memory(vectors(p))),
        fc1(random_memory(weights(p))),
        fc2(random_memory(weights(p))),
        grad_fc1(weights(p)),
        grad_fc2(weights(p)),
        workspace(workspace_bytes) {}

  static size_t vectors(const Problem& p) { return size_t{sizeof(float)} * p.samples * p.vector(); }
  static size_t weights(const Problem& p) { return size_t{sizeof(float)} * p.hidden * p.channels; }

  Params params(const Problem& p) const {
    Params params{};
    params.fc1 = fc1.data();
    params.fc2 = fc2.data();
    params.feats = maps_of(p, x.data());
    params.pooled = pooled.data();
    params.attention = attention.data();
    if (p.pass == Pass::forward) {
      params.out = maps_of(p, to.data());
    } else {
      params.grad_out = maps_of(p, y.data());
      params.grad_feats = maps_of(p, to.data());
      params.grad_fc1 = grad_fc1.data();
      params.grad_fc2 = grad_fc2.data();
    }
    return params;
  }
};

void time_plans(
    const Problem& p, const Stage& stage, const Device& device, cudaStream_t stream,
    std::FILE* csv) {
  const int64_t map_bytes = int64_t{p.samples} * p.vector() * p.pixels * element_size(p.dtype);
  const int sets = static_cast<int>(std::clamp<int64_t>(4 * device.l2 / map_bytes + 1, 2, 64));
  const std::vector<Candidate> candidates = admitted_plans(p, device);
  int64_t workspace_bytes = 0;
  for (const Candidate& candidate : candidates) {
    workspace_bytes = std::max(workspace_bytes, workspace(p, candidate.plan).bytes);
  }
  std::vector<Set> memory;
  for (int i = 0; i < sets; ++i) {
    memory.emplace_back(p, map_bytes, workspace_bytes);
  }
  const Times copy = time_calls(sets, stream, [&](int i) {
    check(cudaMemcpyAsync(
        memory[i].to.data(), memory[i].x.data(), map_bytes, cudaMemcpyDeviceToDevice, stream));
  });
  const bool forward = p.pass == Pass::forward;
  const double traffic = forward ? 2 : 3;
  const std::string name = std::string(forward ? "forward" : "backward") + "," +
      (p.layout == Layout::contiguous ? "contiguous" : "channels_last") + "," +
      (p.dtype == Dtype::f32 ? "float32" : "bfloat16") + "," + std::to_string(p.samples) + "," +
      std::to_string(stage.planes) + "," + std::to_string(stage.size);
  std::printf("%s: copy %.2f us\n", name.c_str(), copy.median);
  for (size_t rank = 0; rank < candidates.size(); ++rank) {
    const Plan& plan = candidates[rank].plan;
    const int resident = static_cast<int>(candidates[rank].resident);
    const Times t = time_calls(sets, stream, [&](int i) {
      Params params = memory[i].params(p);
      launch(p, plan, params, memory[i].workspace.data(), stream);
    });
    const double of_copy = copy.median / 2 * traffic / t.median;
    std::printf(
        "  %zu %s (%d at once): %.2f us, %.0f%% of copy\n", rank, describe(plan).c_str(), resident,
        t.median, 100 * of_copy);
    std::fprintf(
        csv, "%s,%zu,%s,%d,%d,%d,%d,%d,%lld,%d,%.2f,%.2f,%.2f,%.3f\n", name.c_str(), rank,
        name_of(plan.variant), plan.cluster, plan.pieces, plan.blocks, resident, plan.threads,
        static_cast<long long>(plan.shared_bytes), plan.split.parts, t.median, t.spread,
        copy.median, of_copy);
    std::fflush(csv);
    std::fflush(stdout);
  }
}

void time_stage(
    int samples, Pass pass, const Stage& stage, const Device& device, cudaStream_t stream,
    std::FILE* csv) {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    for (const Layout layout : {Layout::contiguous, Layout::channels_last}) {
      Problem p{};
      p.pass = pass;
      p.samples = samples;
      p.branches = kBranches;
      p.channels = stage.planes / kBranches;
      p.pixels = stage.size * stage.size;
      p.hidden = p.channels / kReduction;
      p.shared = true;
      p.dtype = dtype;
      p.layout = layout;
      p.aligned = may_align(dtype, layout, p.channels, p.pixels);
      p.weights_wanted = pass == Pass::backward;
      time_plans(p, stage, device, stream, csv);
    }
  }
}

int run(const char* path) {
  std::FILE* csv = std::fopen(path, "w");
  if (!csv) {
    std::perror(path);
    return 1;
  }
  int number = 0;
  check(cudaGetDevice(&number));
  const Device device = device_properties(number);
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  std::fprintf(
      csv,
      "mode,layout,dtype,n,planes,size,rank,variant,cluster,held,blocks,"
      "resident,threads,shared_bytes,parts,us,iqr_us,copy_us,of_copy\n");
  for (const int n : {64, 256, 1}) {  // most wanted first
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      for (const Stage& stage : kStages) {
        time_stage(n, pass, stage, device, stream, csv);
      }
    }
  }
  std::fclose(csv);
  check(cudaStreamDestroy(stream));
  return 0;
}

}  // namespace
}  // namespace epsa::cuda

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FILE.csv\n", argv[0]);
    return 2;
  }
  try {
    return epsa::cuda::run(argv[1]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
