// Registers the emulated CUDA kernels under the CPU key. The operators' tests then check them
// instead of the CPU's kernels. EPSA_SIMT_CONVOLUTIONS takes the convolutions, too.
#include "cuda/attention.cpp"
#include "cuda/conv.cpp"

#include <cstdlib>

TORCH_LIBRARY_IMPL(epsa_fused, CPU, m) {
  m.impl("psa_attention", epsa::flat<epsa::cuda::forward>());
  m.impl("psa_attention_backward", epsa::flat<epsa::cuda::backward>());
  if (std::getenv("EPSA_SIMT_CONVOLUTIONS")) {
    m.impl("spc_conv", epsa::flat<epsa::cuda::conv>());
    m.impl("spc_conv_backward", epsa::flat<epsa::cuda::conv_backward>());
    m.impl("psa_forward", epsa::flat<epsa::cuda::module>());
  }
}
