// Weights that were packed ahead of a call. They are bytes: a header, which tells what
// they were packed for, then the floats of all units.
#pragma once

#include "cpu/checksum.h"
#include "cpu/conv_layout.h"

#include <sstream>

namespace epsa::cpu {

// A checksum of a weight's values and layout.
inline uint64_t checksum_of(const Tensor& weight) {
  const Tensor w = weight.is_non_overlapping_and_dense() ? weight : weight.contiguous();
  const char* data = static_cast<const char*>(w.const_data_ptr());
  const int64_t bytes = w.nbytes();
  // Pieces that a thread reads in some ten microseconds.
  constexpr int64_t kPiece = 1 << 18;
  std::vector<uint64_t> sums((bytes + kPiece - 1) / kPiece);
  const int64_t pieces = static_cast<int64_t>(sums.size());
  for_each(pieces, pieces > 1 ? usable_threads() : 1, [&](int64_t i) {
    sums[i] = checksum(data + i * kPiece, std::min(kPiece, bytes - i * kPiece), i);
  });
  for (const int64_t stride : w.strides()) {
    sums.push_back(stride);
  }
  return checksum(sums.data(), sums.size() * sizeof(uint64_t), pieces);
}

// Tells a tensor's memory and version from others. Raises for inference tensors, which have
// no version. Optimizers with fused=True, .data and numpy leave no version behind, so their
// changes are not seen.
inline uint64_t identity_of(const Tensor& weight) {
  std::vector<uint64_t> facts{reinterpret_cast<uint64_t>(weight.const_data_ptr())};
  facts.push_back(weight._version());
  facts.insert(facts.end(), weight.strides().begin(), weight.strides().end());
  return checksum(facts.data(), facts.size() * sizeof(uint64_t), 0);
}

struct PrepackHeader {
  char magic[8];  // names the layout, too
  int32_t isa, dtype, branches, in_channels, channels;
  struct Branch {
    int32_t groups, kernel_h, kernel_w;
    Packing packing;  // `library`: this branch has no packed weights
  } branch[kMaxBranches];
  uint64_t source[kMaxBranches];  // tell the weights; 0 until sign()
  int32_t frozen;                 // source holds identities, otherwise checksums

  // Headers are compared as bytes, so their gaps must be zero too.
  PrepackHeader() { std::memset(static_cast<void*>(this), 0, sizeof(*this)); }

  PrepackHeader(const ConvProblem& p, const std::vector<Conv>& convs, Isa instructions)
      : PrepackHeader() {
    std::memcpy(magic, "EPSASPC5", sizeof(magic));
    isa = static_cast<int32_t>(instructions);
    dtype = static_cast<int32_t>(p.dtype);
    branches = static_cast<int32_t>(p.S);
    in_channels = static_cast<int32_t>(p.in_channels);
    channels = static_cast<int32_t>(p.C);
    for (int64_t s = 0; s < p.S; ++s) {
      branch[s].groups = static_cast<int32_t>(convs[s].groups);
      branch[s].kernel_h = static_cast<int32_t>(convs[s].kernel_h);
      branch[s].kernel_w = static_cast<int32_t>(convs[s].kernel_w);
    }
  }

  // Notes which weights were packed: by their bytes, or, frozen, by their identities.
  void sign(at::TensorList weights, bool by_identity) {
    frozen = by_identity;
    for (size_t s = 0; s < weights.size(); ++s) {
      source[s] = by_identity ? identity_of(weights[s]) : checksum_of(weights[s]);
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
  bool has(ConvMethod method) const {
    return std::any_of(
        branch, branch + kMaxBranches, [&](const Branch& b) { return b.packing.method == method; });
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
