// The convolutions of all branches, forward: who does what, and in which order.
#pragma once

#include "cpu/prepack.h"

namespace epsa::cpu {

// The branches that have kernels here, on all samples.
class ForwardBank {
 public:
  // prepacked: what prepack() returned for such weights, or nothing
  ForwardBank(
      const char* op, const SpcProblem& p, at::TensorList weights,
      const SpcSettings& settings,
      const std::optional<Tensor>& prepacked = std::nullopt)
      : p_(p), isa_(isa_in_use()), k_(kernels_for(p, isa_)) {
    for (int64_t s = 0; s < p.S; ++s) {
      convs_.push_back(conv_of(p, weights[s], settings, s));
    }
    header_ = PrepackHeader(p, convs_, weights, isa_);
    // Packed weights that were changed or replaced since are left alone.
    bool use_packed = false;
    if (prepacked) {
      const PrepackHeader given = read_prepacked(op, *prepacked, header_);
      use_packed = given.same_weights(header_);
      header_ = use_packed ? given : header_;
    }
    for (int64_t s = 0; s < p.S; ++s) {
      const Tensor& w = weights[s];
      const Conv& conv = convs_[s];
      Packing& packing = header_.branch[s].packing;
      const ConvPlan plan =
          plan_conv(conv, p.dtype == at::kDouble, isa_, packing);
      TORCH_CHECK_VALUE(
          !use_packed ||
              (plan.block == packing.block && plan.method == packing.method),
          op, ": packed has method ", static_cast<int>(packing.method),
          " and blocks of ", packing.block, " for weights[", s,
          "], expected one of this convolution's; prepack again");
      packing = {plan.method, plan.block};
      plans_.push_back(plan);
      weights_.push_back(use_packed ? w : evenly(w));
      first_sums_.push_back(sums_);
      if (plan.method == ConvMethod::library) {
        continue;
      }
      const int64_t strips = plan.strips(p.out_h);
      strips_ = std::max(strips_, strips);
      sums_ += strips * p.C;
      buffer_ = std::max(
          buffer_, plan.strip * plan.buffer_width * plan.unit_pitch);
      lane_floats_ = std::max(lane_floats_, k_.lane_floats(conv, plan));
      unit_weights_ = std::max(unit_weights_, plan.unit_weights);
      weight_floats_ += plan.units * plan.unit_weights;
      flops_ += flops_of(p, conv);
      size_.include(conv, plan.buffer_width);
      for (int64_t unit = 0; unit < plan.units; ++unit) {
        units_.push_back({static_cast<int>(s), unit, 0});
        for (int64_t strip = 0; strip < strips; ++strip) {
          tasks_.push_back({static_cast<int>(s), unit, strip});
        }
      }
    }
    if (use_packed) {
      check_prepacked_size(op, *prepacked, weight_floats_);
      prepacked_ = *prepacked;
    }
  }

  // The packed weights with their header, for a constructor's `prepacked`.
  Tensor prepack() const {
    Tensor bytes = at::detail::empty_cpu(
        {PrepackHeader::kBytes +
         weight_floats_ * static_cast<int64_t>(sizeof(float))},
        at::kByte, /*pin_memory=*/false, at::MemoryFormat::Contiguous);
    char* data = static_cast<char*>(bytes.mutable_data_ptr());
    // also what the kernels leave between the weights
    std::memset(data, 0, bytes.numel());
    std::memcpy(data, static_cast<const void*>(&header_), sizeof(header_));
    Packed(plans_).fill(
        k_, convs_, plans_, conv_weights(), usable_threads(),
        reinterpret_cast<float*>(data + PrepackHeader::kBytes));
    return bytes;
  }

  bool has(int64_t s) const {
    return plans_[s].method != ConvMethod::library;
  }
  bool has_any() const { return !units_.empty(); }
  bool has_all() const {
    return std::none_of(
        plans_.begin(), plans_.end(),
        [](const ConvPlan& p) { return p.method == ConvMethod::library; });
  }

  // Convolves all samples of x into `feats` and writes the means of the maps to
  // `pooled` [N, S, C], both for the branches that have kernels here. When sample
  // n is complete, done(n, threads) follows, which may use so many threads. Who
  // computes what does not touch the results.
  template <class Done>
  void run(
      const Tensor& x, const std::vector<Tensor>& feats, float* pooled,
      const Done& done) const {
    const int64_t threads = threads_for(flops_);
    const std::vector<ConvWeights> weights = conv_weights();
    Call call{*this, x, feats, weights, pooled};
    Packed packed(plans_);
    if (prepacked_.defined()) {
      packed.data = reinterpret_cast<const float*>(
          static_cast<const char*>(prepacked_.const_data_ptr()) +
          PrepackHeader::kBytes);
      call.packed = &packed;
    }
    // beyond the cache the weights, not the images, should be read once
    if (weight_floats_ > kCacheFloats &&
        (p_.N <= threads || weight_floats_ > 8 * image_floats())) {
      by_unit(call, threads, done);
      return;
    }
    if (!call.packed) {
      packed = pack_weights(k_, convs_, plans_, weights, threads);
      call.packed = &packed;
    }
    // Samples are dealt out whole; those that do not divide by the number of
    // threads are shared.
    const int64_t whole = p_.N - p_.N % threads;
    by_sample(call, whole, threads, done);
    shared(call, whole, threads, done);
  }

 private:
  // A piece of work: one unit, one strip.
  struct Task {
    int branch;
    int64_t unit, strip;
  };

  // A thread's scratch memory: tile buffers and lanes.
  struct Memory {
    Floats buffer, lanes;
    explicit Memory(const ForwardBank& f, int64_t buffers = 1)
        : buffer(buffers * f.buffer_), lanes(f.lane_floats_) {}
  };

  // One call's steps.
  struct Call {
    const ForwardBank& self;
    const Tensor& x;
    const std::vector<Tensor>& feats;
    const std::vector<ConvWeights>& weights;
    float* pooled;
    const Packed* packed = nullptr;  // where not packed by the unit

    Scratch scratch(float* image) const {
      return self.size_.scratch(image, self.p_.H);
    }

    void pack(int64_t n, float* image, int64_t begin, int64_t end) const {
      self.k_.pack_image(
          image_of(x, n), self.p_.in_channels, self.p_.W, scratch(image), begin,
          end);
    }

    const float* unit_weights(const Task& task) const {
      return packed->unit(
          task.branch, self.plans_[task.branch], task.unit);
    }

    void task(
        const Task& task, const float* unit_weights, int64_t n, float* image,
        float* sums, const Memory& memory) const {
      const int64_t channels = self.convs_[task.branch].ic();
      for (int64_t c = 0; c < channels;) {
        c = convolve(
            task, unit_weights, c, image, memory.buffer.get(),
            memory.lanes.get());
      }
      unpack(task, n, memory.buffer.get(), sums);
    }

    // From channel c on to the one that it returns.
    int64_t convolve(
        const Task& task, const float* unit_weights, int64_t c, float* image,
        float* buffer, float* lanes) const {
      const auto [begin, end] = rows(task);
      return self.k_.convolve(
          self.convs_[task.branch], self.plans_[task.branch], scratch(image),
          unit_weights, task.unit, c, begin, end, strip_sums(task, buffer),
          lanes);
    }

    void unpack(
        const Task& task, int64_t n, float* buffer, float* sums) const {
      const SpcProblem& p = self.p_;
      const auto [begin, end] = rows(task);
      const Run run = unit_run(
          self.convs_[task.branch], self.plans_[task.branch], task.unit);
      const Tensor& feat = feats[task.branch];
      Image to = image_of(feat, n, run.first);
      to.data = static_cast<char*>(to.data) +
          begin * to.row_stride * feat.element_size();
      self.k_.unpack(
          strip_sums(task, buffer), run.count, end - begin, p.out_w, to,
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

    // sums of sample n -> its means
    void finish(int64_t n, const float* sums) const {
      self.means(sums, pooled + n * self.p_.S * self.p_.C);
    }
  };

  // Each thread its own samples, up to `count`: x stays in its cache.
  template <class Done>
  void by_sample(
      const Call& call, int64_t count, int64_t threads, const Done& done) const {
    for_parts(count, threads, [&](int64_t begin, int64_t end) {
      const Floats image(image_floats()), sums(sums_);
      const Memory memory(*this);
      for (int64_t n = begin; n < end; ++n) {
        call.pack(n, image.get(), 0, blocks());
        for (const Task& task : tasks_) {
          call.task(
              task, call.unit_weights(task), n, image.get(), sums.get(), memory);
        }
        call.finish(n, sums.get());
        done(n, 1);
      }
    });
  }

  // All threads share the samples from `first` on, strip by strip.
  template <class Done>
  void shared(
      const Call& call, int64_t first, int64_t threads, const Done& done) const {
    const int64_t count = p_.N - first;
    const int64_t tasks = static_cast<int64_t>(tasks_.size());
    if (count == 0) {
      return;
    }
    const Floats images(count * image_floats());
    const Floats sums(count * sums_);
    pack_images(call, first, count, images.get(), threads);
    std::atomic<int64_t> next{0};
    for_parts(threads, threads, [&](int64_t, int64_t) {
      const Memory memory(*this);
      for (int64_t i; (i = next++) < count * tasks;) {
        const int64_t n = i / tasks;
        const Task& task = tasks_[i % tasks];
        call.task(
            task, call.unit_weights(task), first + n,
            images.get() + n * image_floats(), sums.get() + n * sums_, memory);
      }
    });
    for (int64_t n = 0; n < count; ++n) {
      call.finish(first + n, sums.get() + n * sums_);
      done(first + n, threads);
    }
  }

  // All threads share the units; a unit's weights are packed where they are used,
  // and those of a vector of input channels serve all samples of a wave before the
  // next ones': neither they nor the images need a large cache.
  template <class Done>
  void by_unit(const Call& call, int64_t threads, const Done& done) const {
    constexpr int64_t kWaveFloats = 1 << 21;  // of packed images
    const int64_t wave =
        std::clamp<int64_t>(kWaveFloats / image_floats(), 1, p_.N);
    const int64_t units = static_cast<int64_t>(units_.size());
    const Floats images(wave * image_floats());
    const Floats sums(wave * sums_);
    for (int64_t first = 0; first < p_.N; first += wave) {
      const int64_t count = std::min(wave, p_.N - first);
      pack_images(call, first, count, images.get(), threads);
      // some tasks for each thread, or they would end at very different times
      const int64_t parts =
          std::clamp<int64_t>((4 * threads + units - 1) / units, 1, count);
      std::atomic<int64_t> next{0};
      for_parts(threads, threads, [&](int64_t, int64_t) {
        const Memory memory(*this, (count + parts - 1) / parts * strips_);
        const Floats own_weights(call.packed ? 0 : unit_weights_);
        for (int64_t i; (i = next++) < units * parts;) {
          const Task& unit = units_[i / parts];
          const float* weights =
              call.packed ? call.unit_weights(unit) : own_weights.get();
          if (!call.packed) {
            k_.pack_weights(
                convs_[unit.branch], plans_[unit.branch],
                call.weights[unit.branch], unit.unit, own_weights.get());
          }
          const int64_t part = i % parts;
          const int64_t begin = part * count / parts;
          const int64_t end = (part + 1) * count / parts;
          // f(task, n, its buffer) for each sample n of the wave and each strip
          const auto each = [&](const auto& f) {
            float* buffer = memory.buffer.get();
            for (int64_t n = begin; n < end; ++n) {
              Task task = unit;
              const int64_t strips = plans_[unit.branch].strips(p_.out_h);
              for (; task.strip < strips; ++task.strip, buffer += buffer_) {
                f(task, n, buffer);
              }
            }
          };
          const int64_t channels = convs_[unit.branch].ic();
          for (int64_t from = 0, to = 0; from < channels; from = to) {
            each([&](const Task& task, int64_t n, float* buffer) {
              to = call.convolve(
                  task, weights, from, images.get() + n * image_floats(), buffer,
                  memory.lanes.get());
            });
          }
          each([&](const Task& task, int64_t n, float* buffer) {
            call.unpack(task, first + n, buffer, sums.get() + n * sums_);
          });
        }
      });
      const bool alone = count < threads;
      for_each(count, alone ? 1 : threads, [&](int64_t n) {
        call.finish(first + n, sums.get() + n * sums_);
        done(first + n, alone ? threads : 1);
      });
    }
  }

  std::vector<ConvWeights> conv_weights() const {
    std::vector<ConvWeights> weights;
    for (size_t s = 0; s < convs_.size(); ++s) {
      weights.push_back(weights_of(weights_[s], convs_[s]));
    }
    return weights;
  }

  int64_t image_floats() const {
    return size_.floats(p_.in_channels, p_.H, k_.lanes);
  }
  int64_t blocks() const {  // of an image's channels
    return (p_.in_channels + k_.lanes - 1) / k_.lanes;
  }

  void pack_images(
      const Call& call, int64_t first, int64_t count, float* images,
      int64_t threads) const {
    for_each(count * blocks(), threads, [&](int64_t i) {
      const int64_t n = i / blocks(), block = i % blocks();
      call.pack(first + n, images + n * image_floats(), block, block + 1);
    });
  }

  // partial sums of one sample -> means [S, C], in the order of the strips
  void means(const float* sums, float* pooled) const {
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

  SpcProblem p_;
  Isa isa_;
  const ConvKernels& k_;
  std::vector<Conv> convs_;
  std::vector<ConvPlan> plans_;
  std::vector<Tensor> weights_;
  PrepackHeader header_;
  Tensor prepacked_;
  std::vector<int64_t> first_sums_;  // of a branch, among a sample's
  std::vector<Task> tasks_, units_;  // of the latter the strip is open
  ScratchSize size_;
  int64_t sums_ = 0, buffer_ = 0, lane_floats_ = 0;  // floats
  int64_t strips_ = 0;  // of one sample at most
  int64_t unit_weights_ = 0, weight_floats_ = 0;  // of one unit at most, of all
  double flops_ = 0;
};

// All branches: those of `native` there, the others by torch's convolution.
SpcForward convolve(
    const ForwardBank& native, const SpcProblem& p, const Tensor& x,
    at::TensorList weights, const SpcSettings& settings);

}  // namespace epsa::cpu
