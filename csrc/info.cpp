// Python module _C: facts about the build, and plans. No torch header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/conv_plan.h"
#include "cpu/isa.h"
#include "cuda/plan.h"
#include "types.h"

namespace py = pybind11;

namespace {

using namespace epsa;
using namespace epsa::cuda;

constexpr std::pair<const char*, Pass> kPasses[] = {
    {"forward", Pass::forward}, {"backward", Pass::backward}};
#define EPSA_ENTRY(entry, type, torch_name, python_name) std::pair(python_name, Dtype::entry),
constexpr std::pair<const char*, Dtype> kDtypes[] = {EPSA_DTYPES(EPSA_ENTRY)};
#undef EPSA_ENTRY
constexpr std::pair<const char*, Layout> kLayouts[] = {
    {"contiguous", Layout::contiguous}, {"channels_last", Layout::channels_last}};

std::vector<std::pair<std::string, epsa::cpu::Isa>> isas() {
  std::vector<std::pair<std::string, epsa::cpu::Isa>> names;
  for (const epsa::cpu::Isa isa : epsa::cpu::kIsas) {
    names.emplace_back(name(isa), isa);
  }
  return names;
}

template <class Names>
auto named(const char* what, const std::string& given, const Names& names) {
  std::string all;
  for (const auto& [name, value] : names) {
    if (given == name) {
      return value;
    }
    all += (all.empty() ? "" : ", ") + std::string(name);
  }
  throw py::value_error(std::string(what) + ": expected one of {" + all + "}, got '" + given + "'");
}

int64_t at_least(int64_t least, const char* what, int64_t given) {
  if (given < least) {
    throw py::value_error(
        std::string(what) + ": expected at least " + std::to_string(least) + ", got " +
        std::to_string(given));
  }
  return given;
}

int small(int64_t least, const char* what, int64_t given) {
  if (given > std::numeric_limits<int>::max()) {
    throw py::value_error(
        std::string(what) + ": expected less than 2^31, got " + std::to_string(given));
  }
  return static_cast<int>(at_least(least, what, given));
}

Device make_device(
    std::string name, int64_t compute_capability, int64_t multiprocessors,
    int64_t threads_per_multiprocessor, int64_t blocks_per_multiprocessor,
    int64_t shared_per_multiprocessor, int64_t shared_per_block, int64_t l2) {
  Device d;
  d.name = std::move(name);
  d.compute_capability = small(80, "compute_capability", compute_capability);
  d.multiprocessors = small(1, "multiprocessors", multiprocessors);
  d.threads_per_multiprocessor = small(1, "threads_per_multiprocessor", threads_per_multiprocessor);
  d.blocks_per_multiprocessor = small(1, "blocks_per_multiprocessor", blocks_per_multiprocessor);
  d.shared_per_multiprocessor = at_least(1, "shared_per_multiprocessor", shared_per_multiprocessor);
  d.shared_per_block = at_least(1, "shared_per_block", shared_per_block);
  d.l2 = at_least(1, "l2", l2);
  return d;
}

py::dict to_dict(const Problem& problem, const Candidate& candidate) {
  const Plan& plan = candidate.plan;
  const Workspace w = workspace(problem, plan);
  py::dict split, space, result;
  split["parts"] = plan.split.parts;
  split["units"] = plan.split.units;
  split["planes"] = plan.split.planes;
  split["chunks"] = plan.split.chunks;
  split["chunk"] = plan.split.chunk;
  space["ticket"] = w.ticket;
  space["arrived"] = w.arrived;
  space["ready"] = w.ready;
  space["cleared"] = w.cleared;
  space["groups_arrived"] = w.groups_arrived;
  space["partial"] = w.partial;
  space["hidden"] = w.hidden;
  space["scratch"] = w.scratch;
  space["grad_v"] = w.grad_v;
  space["grad_u"] = w.grad_u;
  space["grad_pooled"] = w.grad_pooled;
  space["group_sums"] = w.group_sums;
  space["bytes"] = w.bytes;
  result["kernel"] = kernel_name(problem.pass, plan.variant);
  result["variant"] = name_of(plan.variant);
  result["cluster"] = plan.cluster;
  result["pieces"] = plan.pieces;
  result["threads"] = plan.threads;
  result["blocks"] = plan.blocks;
  result["resident"] = candidate.resident;
  result["shared_bytes"] = plan.shared_bytes;
  result["vector"] = plan.vector;
  result["split"] = split;
  result["lag"] = plan.lag;
  result["group"] = plan.group;
  result["workspace"] = space;
  return result;
}

std::vector<py::dict> cuda_plans(
    const Device& device, const std::string& pass, int64_t samples, int64_t branches,
    int64_t channels, int64_t pixels, int64_t hidden, bool shared, const std::string& dtype,
    const std::string& layout, std::optional<bool> aligned, bool pooled_given, bool grad_out_given,
    bool feats_wanted, bool weights_wanted,
    const std::map<std::pair<int, int>, int64_t>& resident) {
  at_least(1, "samples", samples);
  if (branches < kMinBranches || branches > kMaxBranches) {
    throw py::value_error(
        "branches: expected " + std::to_string(kMinBranches) + " to " +
        std::to_string(kMaxBranches) + ", got " + std::to_string(branches));
  }
  at_least(1, "channels", channels);
  at_least(1, "pixels", pixels);
  at_least(1, "hidden", hidden);
  const std::string error = size_error(samples, branches, channels, pixels, hidden, shared);
  if (!error.empty()) {
    throw py::value_error(error);
  }
  Problem p{};
  p.pass = named("pass_", pass, kPasses);
  p.samples = static_cast<int>(samples);
  p.branches = static_cast<int>(branches);
  p.channels = static_cast<int>(channels);
  p.pixels = static_cast<int>(pixels);
  p.hidden = static_cast<int>(hidden);
  p.shared = shared;
  p.dtype = named("dtype", dtype, kDtypes);
  p.layout = named("layout", layout, kLayouts);
  const bool alignable = may_align(p.dtype, p.layout, p.channels, p.pixels);
  p.aligned = aligned.value_or(alignable);
  if (p.aligned && !alignable) {
    throw py::value_error(
        "aligned: expected False for " + std::to_string(channels) + " channels of " +
        std::to_string(pixels) + " pixels of " + dtype + " in the layout " + layout +
        ", of which not every slot begins at a multiple of 16 bytes, got True");
  }
  p.pooled_given = pooled_given;
  p.grad_out_given = grad_out_given;
  p.feats_wanted = feats_wanted;
  p.weights_wanted = weights_wanted;
  std::vector<py::dict> result;
  std::vector<Candidate> candidates = plans(p, device);
  for (Candidate& c : candidates) {
    const auto known = resident.find({c.plan.cluster, c.plan.pieces});
    c.resident = known == resident.end() ? c.resident : at_least(1, "resident", known->second);
  }
  rank(p, device, candidates);
  for (const Candidate& c : candidates) {
    result.push_back(to_dict(p, c));
  }
  return result;
}

// Products of larger sizes of a convolution could overflow.
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

void at_most(int64_t most, const char* what, int64_t given) {
  if (given > most) {
    throw py::value_error(
        std::string(what) + ": expected at most " + std::to_string(most) + ", got " +
        std::to_string(given));
  }
}

py::dict conv_plan(
    int64_t in_channels, int64_t out_channels, int64_t groups, std::pair<int64_t, int64_t> kernel,
    int64_t height, int64_t width, int64_t stride, int64_t padding, int64_t dilation, bool winograd,
    const std::string& dtype, const std::optional<std::string>& isa) {
  namespace cpu = epsa::cpu;
  for (const auto& [what, given] : std::vector<std::pair<const char*, int64_t>>{
           {"in_channels", in_channels},
           {"out_channels", out_channels},
           {"groups", groups},
           {"kernel[0]", kernel.first},
           {"kernel[1]", kernel.second},
           {"height", height},
           {"width", width},
           {"stride", stride},
           {"dilation", dilation}}) {
    at_least(1, what, given);
    at_most(kMost, what, given);
  }
  at_least(0, "padding", padding);
  at_most(kMost, "padding", padding);
  if (in_channels % groups || out_channels % groups) {
    throw py::value_error(
        "groups: expected a divisor of in_channels = " + std::to_string(in_channels) +
        " and out_channels = " + std::to_string(out_channels) + ", got " + std::to_string(groups));
  }
  if (height + 2 * padding < dilation * (kernel.first - 1) + 1 ||
      width + 2 * padding < dilation * (kernel.second - 1) + 1) {
    throw py::value_error("the output would be empty, expected at least 1 x 1");
  }
  cpu::Conv conv = cpu::make_conv(
      in_channels, out_channels, groups, kernel.first, kernel.second, stride, padding, dilation,
      height, width);
  conv.winograd = winograd;
  cpu::Isa wanted = cpu::isa_in_use();
  if (isa) {
    wanted = named("isa", *isa, isas());
  }
  const Dtype type = named("dtype", dtype, kDtypes);
  const bool pairs = type == Dtype::bf16 && cpu::in_pairs(conv, wanted);
  const cpu::ConvPlan plan =
      cpu::plan_conv(cpu::counted_in(conv, pairs), type == Dtype::f64, wanted);
  py::dict result;
  result["method"] = cpu::name(plan.method);
  result["pairs"] = pairs;
  result["pixels"] = plan.pixels;
  result["block"] = plan.block;
  result["units"] = plan.units;
  result["unit_channels"] = plan.unit_channels;
  result["strip"] = plan.strip;
  return result;
}

void define_build(py::module_& m) {
  m.attr("MIN_BRANCHES") = epsa::kMinBranches;
  m.attr("MAX_BRANCHES") = epsa::kMaxBranches;
  m.attr("COMPARED_WEIGHTS") = epsa::cpu::kComparedWeights;

  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = EPSA_TORCH_VERSION;
        info["compiler"] = __VERSION__;
        info["cuda"] = static_cast<bool>(EPSA_WITH_CUDA);
#ifdef _OPENMP
        info["openmp"] = _OPENMP;
#else
        info["openmp"] = 0;
#endif
        std::vector<std::string> isas;
        for (auto isa : epsa::cpu::built_isas()) {
          isas.push_back(epsa::cpu::name(isa));
        }
        info["cpu_isas"] = isas;
        return info;
      },
      "The torch version and the compiler it was built with, whether it holds "
      "CUDA kernels, the OpenMP version (0: one thread only), and the "
      "instruction sets that the CPU kernels were compiled for.");

  m.def(
      "cpu_isa", [] { return epsa::cpu::name(epsa::cpu::isa_in_use()); },
      "The instruction set that the CPU kernels use on this machine; "
      "EPSA_CPU_ISA overrides the choice.");
}

void define_conv_plan(py::module_& m) {
  m.def(
      "conv_plan", &conv_plan,
      "How the CPU computes one branch's grouped convolution in spc_conv. "
      "method: 'broadcast' (lanes are output channels), 'dot' (lanes are input "
      "channels), 'winograd' (F(2 x 2, 3 x 3), arXiv 1509.09308: lanes are "
      "output channels of 16 products in place of 36), 'matrix' (bfloat16 "
      "products of matrices by AMX) or 'library' (torch's "
      "convolution: no kernel here fits; gradients go there also with dilation, "
      "with padding beyond the kernel, and where a group's channels are not "
      "whole vectors). Of all but the last also the pixels "
      "(winograd: transforms; matrix: positions) and the vectors (dot: output "
      "channels; matrix: pixels of a position) of a "
      "register tile, the units that the output channels make, the channels of "
      "one and its rows at a time. pairs: whether kernels of bfloat16 pairs compute "
      "it, as they do where all branches can. A pure function; winograd: may that "
      "method be used? isa: one of build_info()['cpu_isas'], None for the one in use.",
      py::kw_only(), py::arg("in_channels"), py::arg("out_channels"), py::arg("groups"),
      py::arg("kernel"), py::arg("height"), py::arg("width"), py::arg("stride") = 1,
      py::arg("padding") = 0, py::arg("dilation") = 1, py::arg("winograd") = true,
      py::arg("dtype") = "float32", py::arg("isa") = py::none());
}

void define_cuda_device(py::module_& m) {
  py::class_<Device>(
      m, "CudaDevice",
      "The properties of a GPU that a launch plan depends on. Sizes are bytes; "
      "compute_capability is 90 for sm_90; shared_per_block is the most that "
      "a launch may opt in to.")
      .def(
          py::init(&make_device), py::kw_only(), py::arg("name"), py::arg("compute_capability"),
          py::arg("multiprocessors"), py::arg("threads_per_multiprocessor"),
          py::arg("blocks_per_multiprocessor"), py::arg("shared_per_multiprocessor"),
          py::arg("shared_per_block"), py::arg("l2"))
      .def_readonly("name", &Device::name)
      .def_readonly("compute_capability", &Device::compute_capability)
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("threads_per_multiprocessor", &Device::threads_per_multiprocessor)
      .def_readonly("blocks_per_multiprocessor", &Device::blocks_per_multiprocessor)
      .def_readonly("shared_per_multiprocessor", &Device::shared_per_multiprocessor)
      .def_readonly("shared_per_block", &Device::shared_per_block)
      .def_readonly("l2", &Device::l2);
}

void define_cuda_plans(py::module_& m) {
  m.def(
      "cuda_plans", &cuda_plans,
      "How the attention step of these sizes is laid out on a GPU: the "
      "candidates, best first. A launch takes the first that the "
      "device has room for. A pure function: no GPU is asked. `aligned`: may "
      "all maps be accessed by 16 bytes? None: as far as their sizes say. "
      "`resident`: the blocks that the device holds at once, by (cluster, pieces); "
      "an estimate stands for those that it does not name. The "
      "offsets in `workspace` are bytes, and its first `cleared` bytes are set "
      "to zero before the kernel.",
      py::arg("device"), py::kw_only(), py::arg("pass_"), py::arg("samples"), py::arg("branches"),
      py::arg("channels"), py::arg("pixels"), py::arg("hidden"), py::arg("shared") = true,
      py::arg("dtype") = "float32", py::arg("layout") = "contiguous",
      py::arg("aligned") = py::none(), py::arg("pooled_given") = false,
      py::arg("grad_out_given") = true, py::arg("feats_wanted") = true,
      py::arg("weights_wanted") = true,
      py::arg("resident") = std::map<std::pair<int, int>, int64_t>());
}

}  // namespace

// No function here keeps state of Python's, so a free-threaded Python needs no lock.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Facts about this build of epsa_fused and this machine.";
  define_build(m);
  define_conv_plan(m);
  define_cuda_device(m);
  define_cuda_plans(m);
}
