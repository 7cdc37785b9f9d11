// The tensors of a case in device memory. Each buffer has exactly its tensor's size,
// so that a sanitizer sees every access beyond it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cases/device.h"
#include "cases/reference.h"

namespace epsa::cuda {

// Device memory of exactly its size, and what the host puts there before a launch.
class Buffer {
 public:
  explicit Buffer(size_t bytes)
      : before(bytes, 0xff),  // NaN, also in gaps and in results
        written(bytes, false),
        memory_(allocate(std::max<size_t>(bytes, 1)), release) {}

  unsigned char* data() const { return static_cast<unsigned char*>(memory_.get()); }
  void upload() const { copy(data(), before.data(), before.size()); }
  std::vector<unsigned char> download() const {
    std::vector<unsigned char> bytes(before.size());
    copy(bytes.data(), data(), bytes.size());
    return bytes;
  }

  // Did a launch change bytes that it must not write?
  bool spoilt(const std::vector<unsigned char>& after) const {
    for (size_t i = 0; i < before.size(); ++i) {
      if (!written[i] && after[i] != before[i]) {
        return true;
      }
    }
    return false;
  }

  std::vector<unsigned char> before;
  std::vector<bool> written;  // the bytes that a launch must write

 private:
  std::unique_ptr<void, void (*)(void*)> memory_;
};

// A tensor that takes part in a launch, or the maps of all branches.
struct Field {
  Tensor tensor;
  Dtype dtype;
  bool output;
  std::vector<Buffer> buffers;
  // The place of each value: an element of a buffer. The buffer is -1 where a
  // gradient is not asked for.
  std::vector<int> buffer;
  std::vector<int64_t> index;

  int64_t bytes() const { return element_size(dtype); }
  void add(int of_buffer, int64_t at) {
    buffer.push_back(of_buffer);
    index.push_back(at);
  }
  unsigned char* data(int of_buffer, int64_t at) const {
    return buffers[of_buffer].data() + at * bytes();
  }
};

Field dense(Tensor tensor, Dtype dtype, bool output, size_t elements);

// The maps of all branches, and the kernels' view of them. With `slots` they lie in
// one tensor of the output's shape.
Field fields_of_maps(const Case& k, Tensor tensor, bool output, bool slots, Maps& maps);

// Can every access to the maps have 16 bytes?
bool aligned(const Case& k, const Maps& maps);

}  // namespace epsa::cuda
