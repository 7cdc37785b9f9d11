// The operators on the CPU: allocation, layouts and threads around the kernels.
#include "cpu/attention.h"

#include "ops/groups.h"
#include "ops/maps.h"
#include "cpu/kernels/attention.h"
#include "cpu/threads.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstring>

namespace epsa::cpu {
namespace {

using namespace glue;
using at::Tensor;
using OptTensor = std::optional<Tensor>;

Geometry geometry_of(const Problem& p, at::MemoryFormat format) {
  return make_geometry(
      static_cast<int>(p.S), p.C, p.pixels(), p.hidden,
      along_pixels(p, format) ? Layout::contiguous : Layout::channels_last);
}

// ---- memory ----

// at::empty without the dispatcher's share of a small call.
Tensor empty(
    at::IntArrayRef sizes, at::ScalarType dtype,
    at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, format);
}

}  // namespace

// Scratch memory: one allocation, cut into aligned pieces. (Members of AttentionStep::State
// need types with a linkage.)
class Workspace {
 public:
  Workspace(at::ScalarType acc, int64_t elements, int pieces)
      : size_(static_cast<int64_t>(c10::elementSize(acc))),
        memory_(c10::GetCPUAllocator()->allocate((elements + pieces * kAlign) * size_)),
        next_(static_cast<char*>(memory_.get())) {}

  char* take(int64_t elements) {
    char* piece = next_;
    next_ += (elements + kAlign - 1) / kAlign * kAlign * size_;
    return piece;
  }

 private:
  static constexpr int64_t kAlign = 16;  // elements; 64 bytes of float
  int64_t size_;
  c10::DataPtr memory_;
  char* next_;
};

// ---- SE weights in the form that the kernels read ----

namespace {

Tensor cast_to(const Tensor& t, at::ScalarType acc) {
  return (t.scalar_type() == acc ? t : t.to(acc)).contiguous();
}

template <class A>
void transpose(const void* from, void* to, int64_t sets, int64_t C, int64_t r) {
  const A* in = static_cast<const A*>(from);
  A* out = static_cast<A*>(to);
  for (int64_t b = 0; b < sets; ++b, in += C * r, out += C * r) {
    for (int64_t j = 0; j < r; ++j) {
      for (int64_t c = 0; c < C; ++c) {
        out[j * C + c] = in[c * r + j];
      }
    }
  }
}

}  // namespace

struct PackedWeights {
  Tensor fc1, fc1_bias, fc2, fc2_bias;  // keep the memory alive
  Weights view{};

  static int64_t elements(const Problem& p) {  // of workspace
    return p.weight_sets() * p.hidden * p.C;
  }

  PackedWeights(const Problem& p, const SEWeights& se, Workspace& workspace)
      : fc1(cast_to(se.fc1_weight, p.acc)),
        fc1_bias(se.fc1_bias ? cast_to(*se.fc1_bias, p.acc) : Tensor()),
        fc2(cast_to(se.fc2_weight, p.acc)),
        fc2_bias(se.fc2_bias ? cast_to(*se.fc2_bias, p.acc) : Tensor()) {
    view.fc1 = fc1.const_data_ptr();
    view.fc1_bias = se.fc1_bias ? fc1_bias.const_data_ptr() : nullptr;
    view.fc2_bias = se.fc2_bias ? fc2_bias.const_data_ptr() : nullptr;
    view.fc2t = fc2.const_data_ptr();
    if (p.hidden > 1) {  // [C, 1] is its own transpose
      void* packed = workspace.take(elements(p));
      (p.acc == at::kDouble ? transpose<double> : transpose<float>)(view.fc2t, packed,
                                                                    p.weight_sets(), p.C, p.hidden);
      view.fc2t = packed;
    }
    if (!p.shared) {
      view.matrix_stride = p.hidden * p.C;
      view.hidden_stride = p.hidden;
      view.channel_stride = p.C;
    }
  }
};

// ---- the epilogue in the form that the kernels read ----

namespace {

template <class A>
void multiply(const void* a, const void* b, void* product, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    static_cast<A*>(product)[i] = static_cast<const A*>(a)[i] * static_cast<const A*>(b)[i];
  }
}

}  // namespace

// scale and shift [S, C] in the order of the branches; null without an epilogue.
struct PackedEpilogue {
  bool relu;
  char *scale = nullptr, *shift = nullptr;

  static int64_t elements(const Problem& p, const Epilogue& e) {  // of workspace
    return e.any() ? 2 * p.S * p.C : 0;
  }

  PackedEpilogue(const Problem& p, const Epilogue& e, bool reversed, Workspace& workspace)
      : relu(e.relu), acc_(p.acc), vector_(p.S * p.C) {
    if (!e.any()) {
      return;
    }
    const int64_t branch = p.C * static_cast<int64_t>(c10::elementSize(p.acc));
    shift = workspace.take(vector_);
    if (!e.scale) {
      std::memset(shift, 0, p.S * branch);
      return;
    }
    scale = workspace.take(vector_);
    const Tensor by_slot[] = {e.scale->contiguous(), e.shift->contiguous()};
    for (int s = 0; s < p.S; ++s) {
      const int64_t slot = slot_of_branch(s, static_cast<int>(p.S), reversed);
      for (int i = 0; i < 2; ++i) {
        std::memcpy(
            (i == 0 ? scale : shift) + s * branch,
            static_cast<const char*>(by_slot[i].const_data_ptr()) + slot * branch, branch);
      }
    }
  }

  // What a sample's maps are multiplied by: its attention, or the product with scale.
  const void* factors(const void* attention, void* product) const {
    if (!scale) {
      return attention;
    }
    (acc_ == at::kDouble ? multiply<double> : multiply<float>)(attention, scale, product, vector_);
    return product;
  }

 private:
  at::ScalarType acc_;
  int64_t vector_;
};

// ---- threads ----

namespace {

// Elements below which another thread costs more than it saves.
constexpr int64_t kSerialElements = 16384;

// reduce(n, begin, end), then gate(n), then scale(n, begin, end), over all samples
// and units. Each free thread takes the next whole sample, which stays in its cache
// between the passes. The remaining samples are split into units. The results are the
// same.
template <class Reduce, class GateStep, class Scale>
void for_samples(
    const Geometry& g, int64_t samples, const Reduce& reduce, const GateStep& gate,
    const Scale& scale) {
  const int64_t units = g.units();
  const int64_t elements = g.branches * g.channels * g.pixels;
  const int64_t threads = samples * elements < kSerialElements ? 1 : usable_threads();
  const int64_t whole = samples - samples % threads;
  for_each(whole, threads, [&](int64_t n) {
    reduce(n, 0, units);
    gate(n);
    scale(n, 0, units);
  });
  if (whole == samples) {
    return;
  }
  const auto split = [&](const auto& step) {
    const int64_t grain = std::max<int64_t>(1, kSerialElements / 4 * units / elements);
    parallel_for(whole * units, samples * units, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t n = begin / units;
        const int64_t stop = std::min(end, (n + 1) * units);
        step(n, begin - n * units, stop - n * units);
        begin = stop;
      }
    });
  };
  split(reduce);
  parallel_for(whole, samples, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      gate(n);
    }
  });
  split(scale);
}

}  // namespace

// ---- forward ----

Forward attention_forward(
    const Problem& p, at::TensorList feats_, const SEWeights& se, bool reversed,
    const OptTensor& pooled_in, const Epilogue& epilogue_in) {
  const Kernels& k = kernels(dtype_of(p.dtype), isa_in_use());
  const at::MemoryFormat format = common_layout(feats_);
  Tensor out = empty({p.N, p.S * p.C, p.H, p.W}, p.dtype, format);
  Tensor pooled =
      pooled_in ? pooled_in->clone(at::MemoryFormat::Contiguous) : empty({p.N, p.S, p.C}, p.acc);
  Tensor attention = empty({p.N, p.S, p.C}, p.acc);
  if (p.N == 0) {
    return {out, pooled, attention};
  }

  c10::SmallVector<Tensor, kMaxBranches> feats;
  for (const Tensor& f : feats_) {
    feats.push_back(in_layout(f, format));
  }
  const Geometry g = geometry_of(p, format);
  const int64_t vector_bytes = p.S * p.C * pooled.element_size();
  const int64_t hidden_bytes = p.S * p.hidden * pooled.element_size();
  const bool chunked = g.chunks > 1;
  Workspace workspace(
      p.acc,
      PackedWeights::elements(p) + PackedEpilogue::elements(p, epilogue_in) + p.N * p.S * p.hidden +
          (chunked ? p.N * g.partials() : 0) + (epilogue_in.scale ? p.N * p.S * p.C : 0),
      6);
  const PackedWeights weights(p, se, workspace);
  const PackedEpilogue epilogue(p, epilogue_in, reversed, workspace);
  char* hidden = workspace.take(p.N * p.S * p.hidden);
  char* pooled_data = static_cast<char*>(pooled.mutable_data_ptr());
  char* attention_data = static_cast<char*>(attention.mutable_data_ptr());
  // With one chunk the partial sums are the sums, and lie where they will stay.
  char* partial = chunked ? workspace.take(p.N * g.partials()) : pooled_data;
  const int64_t partial_bytes = g.partials() * pooled.element_size();
  // With a scale each sample's factors are not its attention.
  char* factors = epilogue.scale ? workspace.take(p.N * p.S * p.C) : attention_data;

  const Maps x = maps_of(feats);
  const Maps y = slots_of(out, p, format, reversed);
  const auto reduce = [&](int64_t n, int64_t begin, int64_t end) {
    if (!pooled_in) {
      k.reduce(g, x, nullptr, partial + n * partial_bytes, n, begin, end);
    }
  };
  const auto gate = [&](int64_t n) {
    k.gate(
        g, weights.view, pooled_in ? nullptr : partial + n * partial_bytes,
        pooled_data + n * vector_bytes, hidden + n * hidden_bytes,
        attention_data + n * vector_bytes);
    epilogue.factors(attention_data + n * vector_bytes, factors + n * vector_bytes);
  };
  const auto scale = [&](int64_t n, int64_t begin, int64_t end) {
    k.scale(g, x, factors + n * vector_bytes, epilogue.shift, epilogue.relu, y, n, begin, end);
  };
  for_samples(g, p.N, reduce, gate, scale);
  return {out, pooled, attention};
}

// ---- backward ----

namespace {

// The gradients of one call: allocated where they are wanted.
struct Gradients {
  std::vector<Tensor> feats;
  Tensor weights[4];  // in the accumulation type, until result() casts them
  bool any_feats = false, any_weights = false;

  Gradients(
      const Problem& p, const SEWeights& se, const c10::List<bool>& output_mask,
      at::MemoryFormat format)
      : weight_dtype_(p.weight_dtype) {
    for (int64_t s = 0; s < p.S; ++s) {
      const bool wanted = output_mask.get(s);
      any_feats |= wanted;
      feats.push_back(wanted ? empty({p.N, p.C, p.H, p.W}, p.dtype, format) : empty({0}, p.dtype));
    }
    const Tensor* given[] = {
        &se.fc1_weight, se.fc1_bias ? &*se.fc1_bias : nullptr, &se.fc2_weight,
        se.fc2_bias ? &*se.fc2_bias : nullptr};
    for (int i = 0; i < 4; ++i) {
      wanted_[i] = output_mask.get(p.S + i) && given[i];
      any_weights |= wanted_[i];
      weights[i] = wanted_[i] ? empty(given[i]->sizes(), p.acc) : empty({0}, p.weight_dtype);
    }
  }

  void zero() {
    for (Tensor& t : feats) {
      t.zero_();
    }
    for (Tensor& t : weights) {
      t.zero_();
    }
  }

  void* weight_data(int i) const { return wanted_[i] ? weights[i].mutable_data_ptr() : nullptr; }

  Backward result() {
    for (Tensor& t : weights) {
      if (t.scalar_type() != weight_dtype_) {
        t = t.to(weight_dtype_);
      }
    }
    return {std::move(feats), weights[0], weights[1], weights[2], weights[3]};
  }

 private:
  at::ScalarType weight_dtype_;
  bool wanted_[4];
};

// What one call of the backward pass holds between its steps.
struct BackwardStep {
  const Problem& p;
  const Kernels& k;
  const Geometry g;
  Workspace workspace;
  const PackedWeights weights;
  const Tensor pooled, attention;
  char *hidden, *grad_u, *grad_v, *grad_pooled, *partial;

  BackwardStep(
      const Problem& problem, const SEWeights& se, const GradArguments& given,
      at::MemoryFormat format)
      : p(problem),
        k(kernels(dtype_of(p.dtype), isa_in_use())),
        g(geometry_of(p, format)),
        workspace(
            p.acc,
            PackedWeights::elements(p) + 2 * p.N * p.S * (p.C + p.hidden) +
                (g.chunks > 1 ? p.N * g.partials() : 0),
            6),
        weights(p, se, workspace),
        pooled(given.pooled.contiguous()),
        attention(given.attention.contiguous()),
        hidden(workspace.take(p.N * p.S * p.hidden)),
        grad_u(workspace.take(p.N * p.S * p.hidden)),
        grad_v(workspace.take(p.N * p.S * p.C)),
        grad_pooled(workspace.take(p.N * p.S * p.C)),
        partial(g.chunks > 1 ? workspace.take(p.N * g.partials()) : grad_pooled) {}

  // The gate's gradients, and those of the maps where grad_out is given.
  void run(
      at::TensorList feats, const Tensor& grad_out, const Tensor& grad_attention, const Maps& dx,
      at::MemoryFormat format, bool reversed, bool of_output, bool any_feats) const {
    const int64_t size = pooled.element_size();
    const int64_t vector_bytes = p.S * p.C * size;
    const int64_t hidden_bytes = p.S * p.hidden * size;
    const int64_t partial_bytes = g.partials() * size;
    const auto* pooled_data = static_cast<const char*>(pooled.const_data_ptr());
    const auto* attention_data = static_cast<const char*>(attention.const_data_ptr());
    const auto* grad_attention_data = grad_attention.defined()
        ? static_cast<const char*>(grad_attention.const_data_ptr())
        : nullptr;
    const bool through_out = grad_out.defined();
    const Maps x = maps_of(feats);
    const Maps dy = through_out ? slots_of(grad_out, p, format, reversed) : Maps{};

    const auto reduce = [&](int64_t n, int64_t begin, int64_t end) {
      if (through_out) {
        k.reduce(g, dy, &x, partial + n * partial_bytes, n, begin, end);
      }
    };
    const auto gate = [&](int64_t n) {
      k.gate_grad(
          g, weights.view, through_out ? partial + n * partial_bytes : nullptr, of_output,
          grad_attention_data ? grad_attention_data + n * vector_bytes : nullptr,
          pooled_data + n * vector_bytes, attention_data + n * vector_bytes,
          hidden + n * hidden_bytes, grad_v + n * vector_bytes, grad_u + n * hidden_bytes,
          grad_pooled + n * vector_bytes);
    };
    const auto scale = [&](int64_t n, int64_t begin, int64_t end) {
      if (through_out && any_feats) {
        k.scale(
            g, dy, attention_data + n * vector_bytes, grad_pooled + n * vector_bytes,
            /*relu=*/false, dx, n, begin, end);
      }
    };
    for_samples(g, p.N, reduce, gate, scale);
  }

  // Without grad_out a map's gradient is grad_pooled / M at every pixel, which
  // the gate has divided already.
  void spread_pooled(std::vector<Tensor>& grad_feats, const c10::List<bool>& output_mask) {
    const Tensor dp = at::from_blob(grad_pooled, {p.N, p.S, p.C, 1, 1}, at::TensorOptions(p.acc));
    for (int64_t s = 0; s < p.S; ++s) {
      if (output_mask.get(s)) {
        grad_feats[s].copy_(dp.select(1, s).expand_as(grad_feats[s]));
      }
    }
  }

  void weight_grads(const Gradients& grads) const {
    const WeightGrads to{
        grads.weight_data(0), grads.weight_data(1), grads.weight_data(2), grads.weight_data(3)};
    const int64_t work = 2 * p.N * (p.shared ? p.S : 1) * p.C;  // per hidden unit
    parallel_for(
        0, p.weight_sets() * p.hidden, std::max<int64_t>(1, 4 * kSerialElements / work),
        [&](int64_t begin, int64_t end) {
          k.weight_grad(
              g, p.N, p.shared, pooled.const_data_ptr(), hidden, grad_v, grad_u, to, begin, end);
        });
  }
};

}  // namespace

Backward attention_backward(
    const Problem& p, at::TensorList feats_, const SEWeights& se, const GradArguments& given,
    bool reversed, const c10::List<bool>& output_mask, bool of_output) {
  const at::MemoryFormat format = common_layout(feats_);
  Gradients grads(p, se, output_mask, format);
  const bool none = !given.grad_out && !given.grad_attention;
  if (p.N == 0 || none) {
    grads.zero();
    return grads.result();
  }
  if (!grads.any_feats && !grads.any_weights) {
    return grads.result();
  }
  const auto& grad_out = given.grad_out;
  c10::SmallVector<Tensor, kMaxBranches> feats;
  for (const Tensor& f : feats_) {
    feats.push_back(grad_out ? in_layout(f, format) : f);
  }
  BackwardStep step(p, se, given, format);
  step.run(
      feats, grad_out ? in_layout(*grad_out, format) : Tensor(),
      given.grad_attention ? given.grad_attention->contiguous() : Tensor(),
      wanted_maps(grads.feats, output_mask), format, reversed, of_output, grads.any_feats);
  if (!grad_out && grads.any_feats) {
    step.spread_pooled(grads.feats, output_mask);
  }
  if (grads.any_weights) {
    step.weight_grads(grads);
  }
  return grads.result();
}

// ---- one sample at a time, in place ----

struct AttentionStep::State {
  Problem p;
  const Kernels& k;
  Geometry g;
  Workspace workspace;
  PackedWeights weights;
  PackedEpilogue epilogue;
  Maps maps;

  State(
      const Problem& problem, const Tensor& out, at::MemoryFormat format, const SEWeights& se,
      bool reversed, const Epilogue& e)
      : p(problem),
        k(kernels(dtype_of(p.dtype), isa_in_use())),
        g(geometry_of(p, format)),
        workspace(p.acc, PackedWeights::elements(p) + PackedEpilogue::elements(p, e), 3),
        weights(p, se, workspace),
        epilogue(p, e, reversed, workspace),
        maps(slots_of(out, p, format, reversed)) {}
};

AttentionStep::AttentionStep(
    const Problem& p, const Tensor& out, const SEWeights& se, bool reversed, const Epilogue& e) {
  TORCH_INTERNAL_ASSERT(p.acc == at::kFloat);
  state_ = std::make_unique<State>(p, out, common_layout({out}), se, reversed, e);
}

AttentionStep::~AttentionStep() = default;

void AttentionStep::run(int64_t n, const float* pooled, float* attention, int64_t threads) const {
  const State& s = *state_;
  std::vector<float> hidden(s.p.S * s.p.hidden);
  // Without partial sums, gate only reads the means.
  s.k.gate(s.g, s.weights.view, nullptr, const_cast<float*>(pooled), hidden.data(), attention);
  std::vector<float> product(s.epilogue.scale ? s.p.S * s.p.C : 0);
  const void* factors = s.epilogue.factors(attention, product.data());
  const auto scale = [&](int64_t begin, int64_t end) {
    s.k.scale(s.g, s.maps, factors, s.epilogue.shift, s.epilogue.relu, s.maps, n, begin, end);
  };
  if (threads == 1) {
    scale(0, s.g.units());
  } else {
    parallel_for(0, s.g.units(), 1, scale);
  }
}

// ---- the operators ----

namespace {

Forward forward(
    at::TensorList feats, const SEWeights& se, bool reversed, const OptTensor& pooled,
    const Epilogue& epilogue) {
  const Problem p = check_arguments("psa_attention", feats, se, pooled, epilogue);
  return attention_forward(p, feats, se, reversed, pooled, epilogue);
}

Backward backward(
    const OptTensor& grad_out, const OptTensor& grad_attention, at::TensorList feats,
    const SEWeights& se, const Tensor& pooled, const Tensor& attention, bool reversed,
    c10::List<bool> output_mask) {
  const GradArguments grads{grad_out, grad_attention, pooled, attention};
  const Problem p =
      check_backward_arguments("psa_attention_backward", feats, se, grads, output_mask);
  return attention_backward(p, feats, se, grads, reversed, output_mask, /*of_output=*/false);
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, CPU, m) {
  m.impl("psa_attention", flat<forward>());
  m.impl("psa_attention_backward", flat<backward>());
}

}  // namespace epsa::cpu
