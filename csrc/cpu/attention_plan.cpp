#include "cpu/attention_plan.h"

#include <algorithm>

namespace epsa::cpu {

Geometry make_geometry(
    int branches, int64_t channels, int64_t pixels, int64_t hidden, Layout layout) {
  // Elements of one unit. Large units hide the cost of starting one; small units let
  // several threads share a small sample.
  constexpr int64_t kPlaneElements = 16384, kPixelElements = 8192;
  // Bounds the partial sums, which must stay small beside the maps.
  constexpr int64_t kMaxChunks = 256;
  const int64_t wanted = layout == Layout::contiguous
      ? kPlaneElements
      : std::max<int64_t>(1, kPixelElements / (branches * channels));
  const int64_t least = (pixels + kMaxChunks - 1) / kMaxChunks;
  const int64_t chunk = std::max(wanted, least);
  return {branches, channels, pixels, hidden, layout, chunk, (pixels + chunk - 1) / chunk};
}

}  // namespace epsa::cpu
