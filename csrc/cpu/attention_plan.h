// How the CPU cuts the attention's maps into units of work: a pure function of shapes. No
// torch header.
#pragma once

#include <cstdint>

#include "types.h"

namespace epsa::cpu {

struct Geometry {
  int branches;      // S
  int64_t channels;  // C, of one branch
  int64_t pixels;    // M = H * W
  int64_t hidden;    // r
  Layout layout;
  // contiguous: a unit is `chunk` pixels of one plane; units are ordered (s, c, chunk).
  // channels_last: a unit is `chunk` pixels of all branches.
  int64_t chunk;
  int64_t chunks;

  int64_t units() const {
    return layout == Layout::contiguous ? branches * channels * chunks : chunks;
  }
  // Partial sums of one sample: [S, C, chunks], in channels_last [S, chunks, C].
  int64_t partials() const { return branches * channels * chunks; }
};

Geometry make_geometry(
    int branches, int64_t channels, int64_t pixels, int64_t hidden, Layout layout);

}  // namespace epsa::cpu
