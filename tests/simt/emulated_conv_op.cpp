// Registers the emulated CUDA convolutions under the CPU key, in place of the CPU's kernels.
#include "cuda/conv.cpp"
