// The convolutions forward on the CPU, and the operators spc_conv and spc_prepack.
#include "cpu/conv_forward.h"
#include "ops/groups.h"
#include "ops/library.h"

#include <torch/library.h>

namespace epsa::cpu {

// ---- plans ----

ForwardBank::ForwardBank(const ConvProblem& p, std::vector<Conv> convs, bool may_pair)
    : p_(p),
      isa_(isa_in_use()),
      convs_(std::move(convs)),
      pairs_(may_pair && all_in_pairs(p, convs_, isa_)),
      channels_(pairs_ ? p.in_channels / 2 : p.in_channels),
      k_(kernels_for(p, isa_, pairs_)) {
  for (Conv& conv : convs_) {
    conv = counted_in(conv, pairs_);
  }
}

ForwardBank::ForwardBank(
    const char* op, const ConvProblem& p, at::TensorList weights, const ConvSettings& settings,
    const ConvBias& bias, const std::optional<Tensor>& prepacked)
    : ForwardBank(p, convs_of(p, weights, settings), /*may_pair=*/true) {
  if (bias.value && p.acc == at::kFloat) {  // double has no kernels
    bias_ = bias.value->to(at::kFloat).contiguous();
  }
  header_ = PrepackHeader(p, convs_, isa_);
  // Packed weights are ignored where the weights were changed or replaced since, and where
  // the method that they are for is not wanted any more.
  bool use_packed = false;
  if (prepacked) {
    const PrepackHeader given = read_prepacked(op, *prepacked, header_);
    header_.sign(weights, given.frozen);
    use_packed =
        given.same_weights(header_) && (settings.winograd || !given.has(ConvMethod::winograd));
    header_ = use_packed ? given : header_;
  }
  for (int64_t s = 0; s < p.S; ++s) {
    Packing& packing = header_.branch[s].packing;
    const ConvPlan plan = plan_of(s, packing);
    TORCH_CHECK_VALUE(
        !use_packed || packing == packing_of(convs_[s], plan), op, ": packed has method ",
        static_cast<int>(packing.method), ", blocks of ", packing.block, " and ", packing.columns,
        " columns for weights[", s, "], expected those of this convolution; prepack again");
    packing = packing_of(convs_[s], plan);
    weights_.push_back(use_packed ? weights[s] : evenly(weights[s], pairs_));
    add_branch(s, plan);
  }
  if (use_packed) {
    check_prepacked_size(op, *prepacked, weight_floats_);
    prepacked_ = *prepacked;
  }
}

ForwardBank ForwardBank::in_floats() const {
  std::vector<Conv> convs;
  for (const Conv& conv : convs_) {
    convs.push_back(counted_in(conv, /*pairs=*/false));
  }
  ForwardBank result(p_, std::move(convs), /*may_pair=*/false);
  for (int64_t s = 0; s < p_.S; ++s) {
    result.weights_.push_back(evenly(weights_[s]));
    result.add_branch(s, result.plan_of(s, {}));
  }
  result.bias_ = bias_;
  TORCH_INTERNAL_ASSERT(result.has_all());  // whose maps nobody else would compute
  return result;
}

ConvPlan ForwardBank::plan_of(int64_t s, const Packing& packing) const {
  return plan_conv(convs_[s], p_.dtype == at::kDouble, isa_, packing);
}

void ForwardBank::add_branch(int64_t s, const ConvPlan& plan) {
  const Conv& conv = convs_[s];
  plans_.push_back(plan);
  first_sums_.push_back(sums_);
  if (plan.method == ConvMethod::library) {
    return;
  }
  const int64_t strips = plan.strips(p_.out_h);
  strips_ = std::max(strips_, strips);
  sums_ += strips * p_.C;
  buffer_ = std::max(buffer_, plan.strip * plan.buffer_width * plan.unit_pitch);
  lane_floats_ = std::max(lane_floats_, k_.method(plan.method).lane_floats(conv, plan));
  unit_weights_ = std::max(unit_weights_, plan.unit_weights);
  weight_floats_ += plan.units * plan.unit_weights;
  flops_ += flops_of(p_, conv);
  size_.include(conv, plan.reach);
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    units_.push_back({static_cast<int>(s), unit, 0});
    for (int64_t strip = 0; strip < strips; ++strip) {
      tasks_.push_back({static_cast<int>(s), unit, strip});
    }
  }
}

bool ForwardBank::has_all() const {
  return std::none_of(plans_.begin(), plans_.end(), [](const ConvPlan& p) {
    return p.method == ConvMethod::library;
  });
}

std::vector<ConvWeights> ForwardBank::conv_weights() const {
  std::vector<ConvWeights> weights;
  for (size_t s = 0; s < convs_.size(); ++s) {
    weights.push_back(weights_of(weights_[s], convs_[s]));
  }
  return weights;
}

Tensor ForwardBank::prepack(at::TensorList weights, bool frozen) const {
  Tensor bytes = at::detail::empty_cpu(
      {kPrepackHeaderBytes + weight_floats_ * static_cast<int64_t>(sizeof(float))}, at::kByte,
      /*pin_memory=*/false, at::MemoryFormat::Contiguous);
  PrepackHeader header = header_;
  header.sign(weights, frozen);
  char* data = static_cast<char*>(bytes.mutable_data_ptr());
  // Clears also the gaps that the kernels leave between the weights.
  std::memset(data, 0, bytes.numel());
  std::memcpy(data, static_cast<const void*>(&header), sizeof(header));
  Packed(plans_).fill(
      k_, convs_, plans_, conv_weights(), usable_threads(),
      reinterpret_cast<float*>(data + kPrepackHeaderBytes));
  return bytes;
}

// ---- steps ----

// A thread's scratch memory: tile buffers and lanes.
struct ForwardBank::Memory {
  Floats buffer, lanes;
  explicit Memory(const ForwardBank& f, int64_t buffers = 1)
      : buffer(buffers * f.buffer_), lanes(f.lane_floats_) {}
};

// One call's arguments and steps.
struct ForwardBank::Call {
  const ForwardBank& self;
  const Tensor& x;
  const std::vector<Images>& feats;
  const std::vector<ConvWeights>& weights;
  float* pooled;
  const Packed* packed = nullptr;  // null: each unit packs its own weights

  Scratch scratch(float* image) const {
    return self.size_.scratch(image, self.p_.H, self.k_.lanes);
  }

  // Whether the kernels can compute this image. Those of pairs cannot where it has an
  // infinity or NaN: matrix multiplies idle lanes by zero, and denormal weights count as
  // zeros. Either would make NaN of them.
  bool pack(int64_t n, float* image, int64_t begin, int64_t end) const {
    const bool finite =
        self.k_.pack_image(image_of(x, n), self.channels_, self.p_.W, scratch(image), begin, end);
    return finite || !self.pairs_;
  }

  bool pack_images(int64_t first, int64_t count, float* images, int64_t threads) const {
    const int64_t blocks = self.blocks(), floats = self.image_floats();
    std::atomic<bool> all{true};
    for_each(count * blocks, threads, [&](int64_t i) {
      const int64_t n = i / blocks, block = i % blocks;
      if (!pack(first + n, images + n * floats, block, block + 1)) {
        all = false;
      }
    });
    return all;
  }

  const float* unit_weights(const Task& task) const {
    return packed->unit(task.branch, self.plans_[task.branch], task.unit);
  }

  void pack_unit(const Task& task, float* to) const {
    const ConvPlan& plan = self.plans_[task.branch];
    self.k_.method(plan.method)
        .pack_weights(self.convs_[task.branch], plan, weights[task.branch], task.unit, to);
  }

  void task(const Task& task, int64_t n, float* image, float* sums, const Memory& memory) const {
    const float* weights = unit_weights(task);
    const int64_t channels = self.convs_[task.branch].ic();
    for (int64_t c = 0; c < channels;) {
      c = convolve(task, weights, c, image, memory.buffer.get(), memory.lanes.get());
    }
    unpack(task, n, memory.buffer.get(), sums);
  }

  // Starts at channel c. Returns the first channel that it left out.
  int64_t convolve(
      const Task& task, const float* unit_weights, int64_t c, float* image, float* buffer,
      float* lanes) const {
    const auto [begin, end] = rows(task);
    const ConvPlan& plan = self.plans_[task.branch];
    return self.k_.method(plan.method)
        .convolve(
            self.convs_[task.branch], plan, scratch(image), unit_weights, task.unit, c, begin, end,
            strip_sums(task, buffer), lanes);
  }

  void unpack(const Task& task, int64_t n, float* buffer, float* sums) const {
    const ConvProblem& p = self.p_;
    const auto [begin, end] = rows(task);
    const Run run = unit_run(self.convs_[task.branch], self.plans_[task.branch], task.unit);
    const Image to = feats[task.branch].image(n, run.first, begin);
    const float* bias = self.bias(task.branch);
    self.k_.unpack(
        strip_sums(task, buffer), run.count, end - begin, p.out_w, to,
        bias ? bias + run.first : nullptr,
        sums + self.first_sums_[task.branch] + task.strip * p.C + run.first);
  }

  Sums strip_sums(const Task& task, float* buffer) const {
    const ConvPlan& plan = self.plans_[task.branch];
    return {
        buffer, plan.buffer_width * plan.unit_pitch, plan.unit_pitch,
        /*add=*/false};
  }

  std::pair<int64_t, int64_t> rows(const Task& task) const {
    const int64_t strip = self.plans_[task.branch].strip;
    const int64_t begin = task.strip * strip;
    return {begin, std::min(begin + strip, self.p_.out_h)};
  }

  // Turns the sums of sample n into its means.
  void finish(int64_t n, const float* sums) const {
    self.means(sums, pooled + n * self.p_.S * self.p_.C);
  }
};

// Partial sums of one sample to means [S, C], in the order of the strips.
void ForwardBank::means(const float* sums, float* pooled) const {
  const float pixels = static_cast<float>(p_.out_h * p_.out_w);
  for (int64_t s = 0; s < p_.S; ++s) {
    if (!has(s)) {
      continue;
    }
    float* mean = pooled + s * p_.C;
    std::fill_n(mean, p_.C, 0.0f);
    for (int64_t strip = 0; strip < plans_[s].strips(p_.out_h); ++strip) {
      const float* part = sums + first_sums_[s] + strip * p_.C;
      for (int64_t c = 0; c < p_.C; ++c) {
        mean[c] += part[c];
      }
    }
    for (int64_t c = 0; c < p_.C; ++c) {
      mean[c] /= pixels;
    }
  }
}

// ---- orders of work ----

void ForwardBank::run(
    const Tensor& x, const std::vector<Images>& feats, float* pooled, const Done& done) const {
  if (!try_run(x, feats, pooled, done)) {
    in_floats().try_run(x, feats, pooled, done);
  }
}

bool ForwardBank::try_run(
    const Tensor& x, const std::vector<Images>& feats, float* pooled, const Done& done) const {
  const int64_t threads = threads_for(flops_);
  const std::vector<ConvWeights> weights = conv_weights();
  Call call{*this, x, feats, weights, pooled};
  Packed packed(plans_);
  if (prepacked_.defined()) {
    packed.data = reinterpret_cast<const float*>(
        static_cast<const char*>(prepacked_.const_data_ptr()) + kPrepackHeaderBytes);
    call.packed = &packed;
  }
  // Weights that exceed the cache should be read once, rather than the images.
  if (weight_floats_ > kCacheFloats && (p_.N <= threads || weight_floats_ > 8 * image_floats())) {
    return by_unit(call, threads, done);
  }
  if (!call.packed) {
    packed = pack_weights(k_, convs_, plans_, weights, threads);
    call.packed = &packed;
  }
  // Each thread takes whole samples. All threads share the samples that are left.
  const int64_t whole = p_.N - p_.N % threads;
  return by_sample(call, whole, threads, done) && shared(call, whole, threads, done);
}

// Each free thread takes the next sample, up to `count`, so that x stays in its cache.
bool ForwardBank::by_sample(
    const Call& call, int64_t count, int64_t threads, const Done& done) const {
  if (count == 0) {
    return true;
  }
  struct Own {
    Floats image, sums;
    Memory memory;
  };
  const auto own = [&] { return Own{Floats(image_floats()), Floats(sums_), Memory(*this)}; };
  std::atomic<bool> all{true};
  for_each_with(count, threads, own, [&](int64_t n, const Own& own) {
    if (!all || !call.pack(n, own.image.get(), 0, blocks())) {
      all = false;
      return;
    }
    for (const Task& task : tasks_) {
      call.task(task, n, own.image.get(), own.sums.get(), own.memory);
    }
    call.finish(n, own.sums.get());
    done(n, 1);
  });
  return all;
}

// All threads share the samples from `first` on, strip by strip.
bool ForwardBank::shared(const Call& call, int64_t first, int64_t threads, const Done& done) const {
  const int64_t count = p_.N - first;
  const int64_t tasks = static_cast<int64_t>(tasks_.size());
  if (count == 0) {
    return true;
  }
  const Floats images(count * image_floats());
  const Floats sums(count * sums_);
  if (!call.pack_images(first, count, images.get(), threads)) {
    return false;
  }
  for_each_with(
      count * tasks, threads, [&] { return Memory(*this); },
      [&](int64_t i, const Memory& memory) {
        const int64_t n = i / tasks;
        call.task(
            tasks_[i % tasks], first + n, images.get() + n * image_floats(), sums.get() + n * sums_,
            memory);
      });
  for (int64_t n = 0; n < count; ++n) {
    call.finish(first + n, sums.get() + n * sums_);
    done(first + n, threads);
  }
  return true;
}

// Samples [first, first + count), whose images are packed.
struct ForwardBank::Wave {
  const Call& call;
  int64_t first, count;
  float* images;
  float* sums;

  // Computes one unit of samples [begin, end) of the wave. The weights of a vector of
  // input channels serve all of them, before the next vector's are read.
  void unit(
      const Task& unit, const float* weights, int64_t begin, int64_t end,
      const Memory& memory) const {
    const ForwardBank& self = call.self;
    const int64_t floats = self.image_floats();
    const int64_t channels = self.convs_[unit.branch].ic();
    for (int64_t from = 0, to = 0; from < channels; from = to) {
      each(unit, begin, end, memory, [&](const Task& task, int64_t n, float* buffer) {
        to = call.convolve(task, weights, from, images + n * floats, buffer, memory.lanes.get());
      });
    }
    each(unit, begin, end, memory, [&](const Task& task, int64_t n, float* buffer) {
      call.unpack(task, first + n, buffer, sums + n * self.sums_);
    });
  }

  // f(task, n, its tile buffer) for each sample and each strip of a unit.
  template <class F>
  void each(const Task& unit, int64_t begin, int64_t end, const Memory& memory, const F& f) const {
    const ForwardBank& self = call.self;
    const int64_t strips = self.plans_[unit.branch].strips(self.p_.out_h);
    float* buffer = memory.buffer.get();
    for (int64_t n = begin; n < end; ++n) {
      Task task = unit;
      for (; task.strip < strips; ++task.strip, buffer += self.buffer_) {
        f(task, n, buffer);
      }
    }
  }
};

// All threads share the units, and pack a unit's weights where they are used. A wave of
// samples at a time: neither weights nor images need a large cache.
bool ForwardBank::by_unit(const Call& call, int64_t threads, const Done& done) const {
  constexpr int64_t kWaveFloats = 1 << 21;  // of packed images
  const int64_t most = std::clamp<int64_t>(kWaveFloats / image_floats(), 1, p_.N);
  const int64_t units = static_cast<int64_t>(units_.size());
  const Floats images(most * image_floats());
  const Floats sums(most * sums_);
  struct Own {
    Memory memory;
    Floats weights;
  };
  for (int64_t first = 0; first < p_.N; first += most) {
    const int64_t count = std::min(most, p_.N - first);
    const Wave wave{call, first, count, images.get(), sums.get()};
    if (!call.pack_images(first, count, images.get(), threads)) {
      return false;
    }
    // Several tasks for each thread let all threads end at about the same time.
    const int64_t parts = std::clamp<int64_t>((4 * threads + units - 1) / units, 1, count);
    const auto own = [&] {
      return Own{
          Memory(*this, (count + parts - 1) / parts * strips_),
          Floats(call.packed ? 0 : unit_weights_)};
    };
    for_each_with(units * parts, threads, own, [&](int64_t i, const Own& own) {
      const Task& unit = units_[i / parts];
      const int64_t part = i % parts;
      if (!call.packed) {
        call.pack_unit(unit, own.weights.get());
      }
      wave.unit(
          unit, call.packed ? call.unit_weights(unit) : own.weights.get(), part * count / parts,
          (part + 1) * count / parts, own.memory);
    });
    const bool alone = count < threads;
    for_each(count, alone ? 1 : threads, [&](int64_t n) {
      call.finish(first + n, sums.get() + n * sums_);
      done(first + n, alone ? threads : 1);
    });
  }
  return true;
}

// ---- with the branches that have no kernel here ----

ConvForward convolve(
    const ForwardBank& native, const ConvProblem& p, const Tensor& x_, at::TensorList weights,
    const ConvSettings& settings, const ConvBias& bias) {
  const at::MemoryFormat format = conv_layout(x_);
  Tensor pooled = at::detail::empty_cpu(
      {p.N, p.S, p.C}, p.acc, /*pin_memory=*/false, at::MemoryFormat::Contiguous);
  const Tensor x = is_image(x_) ? x_ : x_.contiguous(format);
  std::vector<Tensor> feats;
  bool any = false;
  for (int64_t s = 0; s < p.S; ++s) {
    if (native.has(s)) {
      any = true;
      feats.push_back(
          at::detail::empty_cpu(
              {p.N, p.C, p.out_h, p.out_w}, p.dtype, /*pin_memory=*/false, format));
      continue;
    }
    std::optional<Tensor> own = bias.of(s, p.S);
    if (own) {
      own = in_acc(*own, p);
    }
    const Tensor f = library_conv(in_acc(x, p), in_acc(weights[s], p), settings, s, own);
    feats.push_back(settled(f, p.dtype, format));
    pooled.select(1, s).copy_(f.mean({2, 3}));
  }
  if (any && p.N > 0) {
    std::vector<Images> maps;
    for (const Tensor& f : feats) {
      maps.push_back(images_of(f));
    }
    native.run(x, maps, pooled.mutable_data_ptr<float>(), [](int64_t, int64_t) {});
  }
  return {std::move(feats), std::move(pooled)};
}

// ---- the operators ----

namespace {

ConvForward conv_forward(
    const Tensor& x, at::TensorList weights, const ConvSettings& settings, const ConvBias& bias) {
  const ConvProblem p = check_conv_arguments("spc_conv", x, weights, settings);
  check_bias("spc_conv", x, bias, p);
  const ForwardBank native("spc_conv", p, weights, settings, bias);
  return convolve(native, p, x, weights, settings, bias);
}

Tensor prepack(const Tensor& x, at::TensorList weights, const ConvSettings& settings, bool frozen) {
  const ConvProblem p = check_conv_arguments("spc_prepack", x, weights, settings);
  const ForwardBank native("spc_prepack", p, weights, settings, kNoBias);
  TORCH_CHECK_VALUE(
      native.has_any(),
      "spc_prepack: expected at least one convolution that has "
      "a kernel here, got none of ",
      p.S, " (dtype ", p.dtype, ", stride ", settings.stride, "): there is nothing to pack");
  return native.prepack(weights, frozen);
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, CPU, m) {
  m.impl("spc_conv", flat<conv_forward>());
  m.impl("spc_prepack", flat<prepack>());
}

}  // namespace epsa::cpu
