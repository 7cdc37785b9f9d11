// What the backends' glue shares: tensors as the kernels' maps.
#pragma once

#include "ops/attention.h"
#include "types.h"

#define EPSA_FN inline
namespace epsa {
namespace glue {
#include "ops/attention_math.inc"

inline Dtype dtype_of(at::ScalarType t) {
  switch (t) {
#define EPSA_ENTRY(entry, type, torch_name, python_name) \
  case at::ScalarType::torch_name:                       \
    return Dtype::entry;
    EPSA_DTYPES(EPSA_ENTRY)
#undef EPSA_ENTRY
    default:
      TORCH_INTERNAL_ASSERT(false, "unchecked dtype ", t);
  }
}

// t in the given layout: as it is where a kernel can take it, else a copy.
inline at::Tensor in_layout(const at::Tensor& t, at::MemoryFormat format) {
  return is_native(t, format) ? t : t.contiguous(format);
}

// Maps serve reads and writes; a tensor that is read is never written.
inline void* data_of(const at::Tensor& t) {
  return const_cast<void*>(t.const_data_ptr());
}

inline void set_map(Maps& maps, int64_t s, void* data, const at::Tensor& t) {
  maps.data[s] = data;
  maps.batch_stride[s] = t.stride(0);
  maps.pixel_stride[s] = t.size(3) > 1 ? t.stride(3) : t.stride(2);
}

inline Maps maps_of(at::TensorList tensors) {
  Maps maps{};
  for (size_t s = 0; s < tensors.size(); ++s) {
    set_map(maps, s, data_of(tensors[s]), tensors[s]);
  }
  return maps;
}

// The branches' slots of out or grad_out [N, S*C, H, W].
inline Maps slots_of(
    const at::Tensor& t, const Problem& p, at::MemoryFormat format, bool reversed) {
  const int64_t channel_stride = format == at::MemoryFormat::Contiguous ? p.pixels() : 1;
  char* data = static_cast<char*>(data_of(t));
  Maps maps{};
  for (int s = 0; s < p.S; ++s) {
    const int64_t channel = p.C * slot_of_branch(s, static_cast<int>(p.S), reversed);
    set_map(maps, s, data + channel * channel_stride * t.element_size(), t);
  }
  return maps;
}

// The maps of the branches' gradients [N, C, H, W]. An unwanted gradient has a null map.
inline Maps wanted_maps(const std::vector<at::Tensor>& grads, const c10::List<bool>& output_mask) {
  Maps maps{};
  for (size_t s = 0; s < grads.size(); ++s) {
    if (output_mask.get(s)) {
      set_map(maps, s, data_of(grads[s]), grads[s]);
    }
  }
  return maps;
}

// With one pixel both layouts are the same bytes; lanes along the channels are
// the wider ones.
inline bool along_pixels(const Problem& p, at::MemoryFormat format) {
  return format == at::MemoryFormat::Contiguous && p.pixels() > 1;
}

}  // namespace glue
}  // namespace epsa
#undef EPSA_FN
