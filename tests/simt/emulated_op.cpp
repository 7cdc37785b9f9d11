// The CUDA glue and kernels under the CPU key, emulated: the tests of the
// operator then check them instead of the CPU's kernels.
#include "cuda/attention.cpp"

TORCH_LIBRARY_IMPL(epsa_fused, CPU, m) {
  m.impl("psa_attention", epsa::cuda::forward);
  m.impl("psa_attention_backward", epsa::cuda::backward);
}
