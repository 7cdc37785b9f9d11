#include "cases/case.h"

#include <algorithm>
#include <initializer_list>

namespace epsa::cuda {

namespace {

std::string name_of(Dtype dtype) {
  return dtype == Dtype::f64 ? "f64"
      : dtype == Dtype::f32  ? "f32"
      : dtype == Dtype::bf16 ? "bf16"
                             : "f16";
}

}  // namespace

std::vector<Case> all_cases() {
  constexpr Dtype f32 = Dtype::f32, f64 = Dtype::f64, bf16 = Dtype::bf16, f16 = Dtype::f16;
  std::vector<Case> cases;
  const auto add = [&](Case k, std::initializer_list<Dtype> dtypes) {
    const std::string name = k.name;
    for (const Dtype dtype : dtypes) {
      for (const Layout layout : {Layout::contiguous, Layout::channels_last}) {
        k.dtype = dtype;
        k.layout = layout;
        k.name = name + "/" + name_of(dtype) +
            (layout == Layout::contiguous ? "/contiguous" : "/channels_last");
        cases.push_back(k);
      }
    }
  };
  // The last stage of the network. Planes of whole vectors, and of whole halves of
  // a bf16 vector. Planes that take the threads several turns.
  add({"stage4", 2, 4, 16, 49, 4}, {f32, f64, bf16, f16});
  add({"vectors", 3, 4, 8, 32, 3}, {f32, f64, bf16, f16});
  add({"half_vectors", 2, 2, 16, 12, 2}, {bf16, f16});
  add({"long", 1, 3, 5, 600, 2}, {f32, bf16});
  add({"wide", 2, 4, 72, 6, 40}, {f32, bf16});
  // Sizes that are multiples of nothing; one pixel, one channel, one of each.
  add({"odd", 3, 3, 5, 15, 2}, {f32, f64, bf16, f16});
  add({"one_pixel", 5, 4, 24, 1, 3}, {f32, bf16});
  add({"one_channel", 2, 4, 1, 30, 1}, {f32, f16});
  add({"one_of_each", 3, 2, 1, 1, 1}, {f32, bf16});
  add({"branches_2", 2, 2, 33, 9, 4}, {f32, f16});
  add({"branches_5", 2, 5, 8, 16, 1}, {f32, bf16});
  add({"branches_6", 2, 6, 8, 9, 2}, {f32, f16});
  add({"branches_7", 1, 7, 12, 16, 5}, {f32, bf16});
  add({"branches_8", 4, 8, 16, 20, 2}, {f32, bf16});
  // One sample alone needs no counters. Enough samples for several groups of weight gradients in
  // every mode.
  add({"one_sample", 1, 4, 16, 49, 4}, {f32, bf16});
  add({"batch_of_17", 17, 3, 4, 4, 2}, {f32, bf16});

  const auto option = [&](const char* name, auto&& set) {
    Case k{name, 3, 4, 8, 16, 3};
    set(k);
    add(k, {f32, bf16});
  };
  option("per_branch", [](Case& k) { k.shared = false; });
  option("fc1_bias_only", [](Case& k) { k.fc2_bias = false; });
  option("fc2_bias_only", [](Case& k) { k.fc1_bias = false; });
  option("per_branch_no_bias", [](Case& k) { k.shared = k.fc1_bias = k.fc2_bias = false; });
  option("forward_order", [](Case& k) { k.reversed = false; });
  option("chunks", [](Case& k) { k.storage = Storage::chunks; });
  option("gaps", [](Case& k) { k.storage = Storage::gaps; });
  option("sliced", [](Case& k) { k.storage = Storage::sliced; });
  option("pooled_given", [](Case& k) { k.pooled_given = true; });
  option("epilogue", [](Case& k) { k.affine = k.relu = true; });
  option("epilogue_uneven", [](Case& k) { k.affine = k.relu = true, k.C = 5, k.M = 15; });
  option("epilogue_in_forward_order", [](Case& k) { k.affine = true, k.reversed = false; });
  option("epilogue_of_pooled", [](Case& k) { k.affine = k.relu = k.pooled_given = true; });
  option("relu_alone", [](Case& k) { k.relu = true; });
  option("grad_out_alone", [](Case& k) { k.grad_attention = false; });
  option("grad_attention_alone", [](Case& k) { k.grad_out = false; });
  option("frozen_feats", [](Case& k) { k.feats_mask = 0; });
  option("frozen_weights", [](Case& k) { k.weights_mask = 0; });
  option("some_frozen", [](Case& k) { k.feats_mask = 5, k.weights_mask = 6; });
  option("attention_of_frozen_feats", [](Case& k) {
    k.grad_out = false;
    k.feats_mask = 0;
    k.shared = false;
  });
  for (const Dtype dtype : {bf16, f16}) {
    Case k{"half_weights", 3, 4, 16, 25, 5};
    k.half_weights = true;
    add(k, {dtype});
    k.name = "per_branch_half_weights";
    k.shared = false;
    add(k, {dtype});
  }
  return cases;
}

bool contains(const std::string& text, const std::vector<std::string>& parts) {
  return parts.empty() || std::any_of(parts.begin(), parts.end(), [&](const std::string& part) {
           return text.find(part) != std::string::npos;
         });
}

bool is_quick(const Case& k) {
  return contains(
      k.name,
      {"stage4/", "vectors/", "odd/", "one_pixel/", "batch_of_17/", "wide/", "per_branch/", "gaps/",
       "sliced/", "chunks/", "grad_attention_alone/", "some_frozen/", "half_weights/",
       "one_sample/", "epilogue/", "epilogue_uneven/", "relu_alone/"});
}

}  // namespace epsa::cuda
