// Elements as they lie in memory. All inputs are numbers that every type holds.
#pragma once

#include "cuda/plan.h"

namespace epsa::cuda {

void encode(double x, Dtype dtype, unsigned char* to);
double decode(Dtype dtype, const unsigned char* from);

// The largest relative error of one rounding.
double unit(Dtype dtype);

}  // namespace epsa::cuda
