// Tensors without strided memory reach no kernel: sparse, quantized, mkldnn and nested ones.
#pragma once

#include <torch/library.h>

#include <string>

namespace epsa {

bool is_foreign(const at::Tensor& t);

// Lets the operator refuse such tensors by its argument's name, where the dispatcher would list its
// backends.
void refuse_foreign(torch::Library& m, const std::string& name);

}  // namespace epsa
