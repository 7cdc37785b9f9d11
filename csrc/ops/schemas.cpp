// The operators' schemas. Exported programs hold them: only append arguments with defaults.
#include <torch/library.h>

#include <string>

#include "ops/foreign.h"

namespace epsa {
namespace {

// Defines an operator, and beside it the one that computes its results' shapes
// (csrc/ops/meta.cpp). The latter is private: epsa_fused/_fake.py calls it.
void define(torch::Library& m, const std::string& name, const std::string& rest) {
  m.def((name + rest).c_str(), {at::Tag::pt2_compliant_tag});
  refuse_foreign(m, name);
  m.def(("_" + name + "_meta" + rest).c_str());
}

const std::string kConv =
    "Tensor x, Tensor[] weights, int[] groups, int stride, int[] padding, "
    "int[] dilation";
const std::string kAppended = ", bool winograd=True";  // of the convolutions' settings
const std::string kBias = ", Tensor? bias=None";       // of the convolutions
const std::string kEpilogue = ", Tensor? scale=None, Tensor? shift=None, bool relu=False";
const std::string kSE = "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias";
const std::string kForward = " -> (Tensor out, Tensor pooled, Tensor attention)";
const std::string kGradSE =
    "Tensor grad_fc1_weight, Tensor grad_fc1_bias, Tensor grad_fc2_weight, "
    "Tensor grad_fc2_bias";

}  // namespace

TORCH_LIBRARY(epsa_fused, m) {
  m.set_python_module("epsa_fused._fake");
  define(
      m, "psa_attention",
      "(Tensor[] feats, " + kSE + ", bool reversed, Tensor? pooled=None" + kEpilogue + ")" +
          kForward);
  define(
      m, "psa_attention_backward",
      "(Tensor? grad_out, Tensor? grad_attention, Tensor[] feats, " + kSE +
          ", Tensor pooled, Tensor attention, bool reversed, "
          "bool[] output_mask) -> (Tensor[] grad_feats, " +
          kGradSE + ")");
  define(m, "spc_conv", "(" + kConv + kAppended + kBias + ") -> (Tensor[] feats, Tensor pooled)");
  define(
      m, "spc_conv_backward",
      "(Tensor[] grad_feats, " + kConv + ", bool[] output_mask" + kAppended +
          ") -> (Tensor grad_x, Tensor[] grad_weights)");
  define(
      m, "psa_forward",
      "(" + kConv + ", " + kSE + ", bool reversed, Tensor? packed=None" + kAppended + kEpilogue +
          kBias + ") -> Tensor");
  define(
      m, "psa_save_output",
      "(" + kConv + ", " + kSE + ", bool reversed" + kAppended + ")" + kForward);
  define(
      m, "psa_save_output_backward",
      "(Tensor grad_out, " + kConv + ", " + kSE +
          ", Tensor out, Tensor pooled, Tensor attention, bool reversed, "
          "bool[] output_mask" +
          kAppended + ") -> (Tensor grad_x, Tensor[] grad_weights, " + kGradSE + ")");
  m.def(
      ("spc_prepack(" + kConv + ", bool frozen=False" + kAppended + ") -> Tensor packed").c_str());
  refuse_foreign(m, "spc_prepack");
}

}  // namespace epsa
