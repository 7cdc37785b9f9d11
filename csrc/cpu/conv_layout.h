// Shared by the convolutions' forward and backward passes on the CPU: scratch memory,
// tensors as the kernels read them, packed weights, and torch's own convolution.
#pragma once

#include "ops/maps.h"
#include "ops/conv.h"
#include "cpu/kernels/conv.h"
#include "cpu/threads.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>

namespace epsa::cpu {

using at::Tensor;

// Floats that begin at a cache line.
class Floats {
 public:
  Floats() = default;
  explicit Floats(int64_t count, bool zero = false)
      : memory_(c10::GetCPUAllocator()->allocate(std::max<int64_t>(count, 1) * sizeof(float))) {
    TORCH_INTERNAL_ASSERT(reinterpret_cast<uintptr_t>(memory_.get()) % 64 == 0);
    if (zero) {
      std::memset(memory_.get(), 0, count * sizeof(float));
    }
  }
  float* get() const { return static_cast<float*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

// Below this, another thread costs more than it saves.
constexpr double kSerialFlops = 1e6;

inline int64_t threads_for(double flops) {
  return flops < kSerialFlops ? 1 : usable_threads();
}

inline double flops_of(const ConvProblem& p, const Conv& conv) {
  const int64_t inputs = conv.pairs ? 2 * conv.ic() : conv.ic();
  return 2.0 * static_cast<double>(p.N * p.C * inputs * conv.taps()) *
      static_cast<double>(p.out_h * p.out_w);
}

// ---- tensors as the kernels read them ----

// The images of a batch, or the same channels of each.
struct Images {
  Image first;
  int64_t batch_stride;  // elements
  int64_t element_size;  // bytes

  // Sample n, from a channel and a row on.
  Image image(int64_t n, int64_t channel = 0, int64_t row = 0) const {
    const int64_t element =
        n * batch_stride + channel * first.channel_stride + row * first.row_stride;
    Image result = first;
    result.data = static_cast<char*>(first.data) + element * element_size;
    return result;
  }
  Images from(int64_t channel) const { return {image(0, channel), batch_stride, element_size}; }
};

inline Images images_of(const Tensor& t) {
  const Image first{
      glue::data_of(t),
      // The strides of one channel or one pixel mean nothing.
      t.size(1) == 1 ? t.size(2) * t.size(3) : t.stride(1), t.size(3) == 1 ? 1 : t.stride(3),
      t.stride(2)};
  return {first, t.stride(0), static_cast<int64_t>(t.element_size())};
}

inline Image image_of(const Tensor& t, int64_t n, int64_t channel = 0) {
  return images_of(t).image(n, channel);
}

// Whether the kernels can read t: the pixels of a row are dense, or the channels of a
// pixel.
inline bool is_image(const Tensor& t) {
  return t.size(3) == 1 || t.stride(3) == 1 || (t.size(1) > 1 && t.stride(1) == 1);
}

inline int64_t tap_stride(const Tensor& w) {
  return w.size(2) * w.size(3) == 1 ? 1  // never stepped
      : w.size(3) == 1              ? w.stride(2)
                                    : w.stride(3);
}

// Whether a weight's taps are evenly spaced, and its taps or channels dense.
inline bool evenly_spaced(const Tensor& w) {
  const bool even = w.size(2) == 1 || w.size(3) == 1 || w.stride(2) == w.size(3) * w.stride(3);
  return even && (tap_stride(w) == 1 || w.stride(1) == 1);
}

// Whether each pair of dense channels is an item of 32 bits at its natural place.
inline bool pairs_are_items(const Tensor& w) {
  return reinterpret_cast<uintptr_t>(w.const_data_ptr()) % 4 == 0 && w.stride(0) % 2 == 0 &&
      (w.size(2) * w.size(3) == 1 || tap_stride(w) % 2 == 0);
}

// The same weights, with their inputs counted in pairs, or one by one.
inline ConvWeights counted_in(ConvWeights weights, bool pairs) {
  if (pairs) {
    weights.second = weights.in_stride;
    weights.in_stride *= 2;
  }
  return weights;
}

inline ConvWeights weights_of(const Tensor& w, const Conv& conv) {
  ConvWeights weights{glue::data_of(w), conv.oc() * w.stride(0),
                      w.stride(0),      w.size(1) == 1 ? 1 : w.stride(1),
                      tap_stride(w),    /*turned=*/false};
  return counted_in(weights, conv.pairs);
}

// The weights of one phase of the input's gradient. Input and output channels of a
// group swap roles.
inline ConvWeights turned_weights_of(const Tensor& w, const Conv& phase) {
  const ConvWeights weights{
      glue::data_of(w),
      w.size(0) / phase.groups * w.stride(0),
      w.size(1) == 1 ? 1 : w.stride(1),
      w.stride(0),
      tap_stride(w),
      /*turned=*/true};
  return counted_in(weights, phase.pairs);
}

inline Conv conv_of(
    const ConvProblem& p, const Tensor& w, const ConvSettings& settings, int64_t s) {
  Conv conv = make_conv(
      p.in_channels, p.C, settings.groups[s], w.size(2), w.size(3), settings.stride,
      settings.padding[s], settings.dilation[s], p.H, p.W);
  conv.winograd = settings.winograd;
  return conv;
}

// The branches' convolutions.
inline std::vector<Conv> convs_of(
    const ConvProblem& p, at::TensorList weights, const ConvSettings& settings) {
  std::vector<Conv> convs;
  for (int64_t s = 0; s < p.S; ++s) {
    convs.push_back(conv_of(p, weights[s], settings, s));
  }
  return convs;
}

// Whether kernels of pairs compute a pass: all of its convolutions, or none.
inline bool all_in_pairs(const ConvProblem& p, const std::vector<Conv>& convs, Isa isa) {
  return p.dtype == at::kBFloat16 && !convs.empty() &&
      std::all_of(convs.begin(), convs.end(), [&](const Conv& c) { return in_pairs(c, isa); });
}

// w, or a copy that the kernels can read. Those of pairs read dense channels as items.
inline Tensor evenly(const Tensor& w, bool pairs = false) {
  const bool even = evenly_spaced(w) && !(pairs && w.stride(1) == 1 && !pairs_are_items(w));
  return even ? w : w.clone(at::MemoryFormat::Contiguous);
}

inline const ConvKernels& kernels_for(const ConvProblem& p, Isa isa, bool pairs = false) {
  if (pairs) {
    return pair_kernels(isa);
  }
  // Double has no kernels, and its plans never call one: float's stand in.
  return conv_kernels(p.dtype == at::kDouble ? Dtype::f32 : glue::dtype_of(p.dtype), isa);
}

// The weights of all units of several plans, as the kernels read them.
struct Packed {
  std::vector<int64_t> first;  // of each branch
  int64_t floats = 0;
  Floats memory;
  const float* data = nullptr;

  Packed() = default;
  explicit Packed(const std::vector<ConvPlan>& plans) {
    for (const ConvPlan& plan : plans) {
      first.push_back(floats);
      floats += plan.units * plan.unit_weights;
    }
  }

  int64_t place(size_t s, const ConvPlan& plan, int64_t u) const {
    return first[s] + u * plan.unit_weights;
  }
  const float* unit(size_t s, const ConvPlan& plan, int64_t u) const {
    return data + place(s, plan, u);
  }

  // Packs into `to`, from where unit() reads afterwards.
  void fill(
      const ConvKernels& k, const std::vector<Conv>& convs, const std::vector<ConvPlan>& plans,
      const std::vector<ConvWeights>& weights, int64_t threads, float* to) {
    std::vector<std::pair<size_t, int64_t>> units;
    for (size_t s = 0; s < plans.size(); ++s) {
      for (int64_t u = 0; u < plans[s].units; ++u) {
        units.push_back({s, u});
      }
    }
    data = to;
    for_each(static_cast<int64_t>(units.size()), threads, [&](int64_t i) {
      const auto [s, u] = units[i];
      k.method(plans[s].method)
          .pack_weights(convs[s], plans[s], weights[s], u, to + place(s, plans[s], u));
    });
  }
};

inline Packed pack_weights(
    const ConvKernels& k, const std::vector<Conv>& convs, const std::vector<ConvPlan>& plans,
    const std::vector<ConvWeights>& weights, int64_t threads) {
  Packed packed(plans);
  packed.memory = Floats(packed.floats);
  packed.fill(k, convs, plans, weights, threads, packed.memory.get());
  return packed;
}

// ---- branches without kernels here: torch's convolution ----

// torch's convolutions get 16-bit tensors as float and their results are rounded once,
// like the kernels'. In 16 bits they round more often, and they are slow on machines
// without bfloat16 arithmetic.
inline Tensor in_acc(const Tensor& t, const ConvProblem& p) {
  return t.scalar_type() == p.acc ? t : t.to(p.acc);
}

// t in a type and layout. Its strides are those of a new tensor, also where a size of 1
// allows others.
inline Tensor settled(const Tensor& t, at::ScalarType dtype, at::MemoryFormat format) {
  Tensor result = at::detail::empty_cpu(t.sizes(), dtype, /*pin_memory=*/false, format);
  const bool settled = t.scalar_type() == dtype && t.strides() == result.strides();
  return settled ? t : result.copy_(t);
}

// The operator spc_conv_backward: the gradients of x and of the weights.
ConvBackward conv_backward(
    at::TensorList grad_feats, const Tensor& x, at::TensorList weights,
    const ConvSettings& settings, c10::List<bool> output_mask);

}  // namespace epsa::cpu
