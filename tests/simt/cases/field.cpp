#include "cases/field.h"

namespace epsa::cuda {

Field dense(Tensor tensor, Dtype dtype, bool output, size_t elements) {
  Field f{tensor, dtype, output, {}, {}, {}};
  f.buffers.emplace_back(elements * f.bytes());
  for (size_t i = 0; i < elements; ++i) {
    f.add(0, static_cast<int64_t>(i));
  }
  return f;
}

Field fields_of_maps(const Case& k, Tensor tensor, bool output, bool slots, Maps& maps) {
  const bool one = slots || k.storage == Storage::chunks;
  // Whole vectors of any type, or a part of one.
  const int begin = k.storage == Storage::gaps ? 8 : k.storage == Storage::sliced ? 1 : 0;
  const auto channels = [&](int s) {  // a different number for each tensor
    const int gap = k.storage == Storage::sliced ? 3 : begin;
    return one ? k.S * k.C + gap : k.C + gap * (s + 1);
  };
  const bool planes = k.layout == Layout::contiguous;
  const auto first = [&](int s) {
    const int slot = slots && k.reversed ? k.S - 1 - s : s;
    return int64_t{begin} + (one ? slot * k.C * (planes ? k.M : 1) : 0);
  };
  const auto buffer = [&](int s) {
    const bool wanted = tensor != kGradFeats || (k.feats_mask >> s & 1);
    return !wanted ? -1 : one ? 0 : s;
  };
  Field f{tensor, k.dtype, output, {}, {}, {}};
  std::vector<int64_t> ends(one ? 1 : k.S);
  for (int row = 0; row < k.N * k.S * k.C; ++row) {
    const int n = row / (k.S * k.C), s = row / k.C % k.S, c = row % k.C;
    for (int m = 0; m < k.M; ++m) {
      const int64_t inner = planes ? c * k.M + m : m * channels(s) + c;
      f.add(buffer(s), first(s) + n * channels(s) * k.M + inner);
      int64_t& end = ends[one ? 0 : s];
      end = std::max(end, f.index.back() + 1);
    }
  }
  for (const int64_t end : ends) {
    f.buffers.emplace_back(end * f.bytes());
  }
  for (int s = 0; s < k.S; ++s) {
    maps.data[s] = buffer(s) < 0 ? nullptr : f.data(buffer(s), first(s));
    maps.batch_stride[s] = int64_t{channels(s)} * k.M;
    maps.pixel_stride[s] = planes ? 1 : channels(s);
  }
  return f;
}

bool aligned(const Case& k, const Maps& maps) {
  const int64_t size = element_size(k.dtype);
  for (int s = 0; s < k.S; ++s) {
    const bool strided = k.layout == Layout::channels_last && k.M > 1;
    if (maps.data[s] &&
        (reinterpret_cast<uintptr_t>(maps.data[s]) % 16 != 0 ||
         (k.N > 1 && maps.batch_stride[s] * size % 16 != 0) ||
         (strided && maps.pixel_stride[s] * size % 16 != 0))) {
      return false;
    }
  }
  return true;
}

}  // namespace epsa::cuda
