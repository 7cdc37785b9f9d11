// Registers the emulated CUDA kernels under the CPU key. The operator's tests then
// check them instead of the CPU's kernels.
#include "cuda/attention.cpp"

TORCH_LIBRARY_IMPL(epsa_fused, CPU, m) {
  m.impl("psa_attention", epsa::flat<epsa::cuda::forward>());
  m.impl("psa_attention_backward", epsa::flat<epsa::cuda::backward>());
}
