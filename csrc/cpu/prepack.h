// Weights that were packed ahead of a call. They are bytes: a header, which tells what
// they were packed for, then the floats of all units.
#pragma once

#include "cpu/conv_layout.h"

#include <sstream>

namespace epsa::cpu {

struct PrepackHeader {
  char magic[8];  // names the layout, too
  int32_t isa, dtype, branches, in_channels, channels;
  struct Branch {
    int32_t groups, kernel_h, kernel_w;
    Packing packing;  // `library`: this branch has no packed weights
  } branch[kMaxBranches];
  // Identifies the packed weights by their address and their count of changes.
  struct Source {
    const void* data;
    int64_t version;
  } source[kMaxBranches];

  // Headers are compared as bytes, so their gaps must be zero too.
  PrepackHeader() { std::memset(static_cast<void*>(this), 0, sizeof(*this)); }

  PrepackHeader(
      const ConvProblem& p, const std::vector<Conv>& convs, at::TensorList weights,
      Isa instructions)
      : PrepackHeader() {
    std::memcpy(magic, "EPSASPC2", sizeof(magic));
    isa = static_cast<int32_t>(instructions);
    dtype = static_cast<int32_t>(p.dtype);
    branches = static_cast<int32_t>(p.S);
    in_channels = static_cast<int32_t>(p.in_channels);
    channels = static_cast<int32_t>(p.C);
    for (int64_t s = 0; s < p.S; ++s) {
      branch[s].groups = static_cast<int32_t>(convs[s].groups);
      branch[s].kernel_h = static_cast<int32_t>(convs[s].kernel_h);
      branch[s].kernel_w = static_cast<int32_t>(convs[s].kernel_w);
      source[s].data = weights[s].const_data_ptr();
      source[s].version = weights[s].is_inference() ? -1 : weights[s]._version();
    }
  }

  // Whether the convolutions are the same. Their packing may differ.
  bool same_convolutions(const PrepackHeader& other) const {
    PrepackHeader a = *this, b = other;
    for (int s = 0; s < kMaxBranches; ++s) {
      a.branch[s].packing = b.branch[s].packing = {};
    }
    return std::memcmp(&a, &b, offsetof(PrepackHeader, source)) == 0;
  }
  bool same_weights(const PrepackHeader& other) const {
    return std::memcmp(source, other.source, sizeof(source)) == 0;
  }

  std::string describe() const {
    std::ostringstream out;
    out << name(static_cast<Isa>(isa)) << ", " << static_cast<at::ScalarType>(dtype) << ", "
        << in_channels << " to " << branches << " x " << channels << " channels";
    for (int32_t s = 0; s < std::min(branches, kMaxBranches); ++s) {
      out << ", " << branch[s].kernel_h << "x" << branch[s].kernel_w << " of " << branch[s].groups
          << " groups";
    }
    return out.str();
  }
};

// What the header takes: whole cache lines.
constexpr int64_t kPrepackHeaderBytes = (sizeof(PrepackHeader) + 63) / 64 * 64;

// Reads the header of packed weights. Raises where they are not for the convolutions of
// `expected`.
inline PrepackHeader read_prepacked(
    const char* op, const Tensor& packed, const PrepackHeader& expected) {
  TORCH_CHECK_VALUE(
      packed.is_contiguous() && packed.numel() >= kPrepackHeaderBytes, op, ": packed has shape ",
      packed.sizes(), " and stride ", packed.strides(),
      ", expected the bytes that spc_prepack returned");
  const void* data = packed.const_data_ptr();
  TORCH_CHECK_VALUE(
      reinterpret_cast<uintptr_t>(data) % 64 == 0, op, ": packed begins at an address that is ",
      reinterpret_cast<uintptr_t>(data) % 64, " modulo 64, expected 0, as spc_prepack returned it");
  PrepackHeader given;
  std::memcpy(static_cast<void*>(&given), data, sizeof(given));
  TORCH_CHECK_VALUE(
      std::memcmp(given.magic, expected.magic, sizeof(given.magic)) == 0, op,
      ": packed does not hold what spc_prepack returned");
  TORCH_CHECK_VALUE(
      given.same_convolutions(expected), op, ": packed was made for ", given.describe(),
      ", expected ", expected.describe(), "; prepack again");
  return given;
}

inline void check_prepacked_size(const char* op, const Tensor& packed, int64_t floats) {
  const int64_t bytes = kPrepackHeaderBytes + floats * static_cast<int64_t>(sizeof(float));
  TORCH_CHECK_VALUE(
      packed.numel() == bytes, op, ": packed has ", packed.numel(), " bytes, expected ", bytes);
}

}  // namespace epsa::cpu
