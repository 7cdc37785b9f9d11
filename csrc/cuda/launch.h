// From a problem to a running kernel, with raw addresses and a stream: the CUDA
// part that needs no torch header.
#pragma once

#include <string>

#include "cuda/params.h"
#include "cuda/plan.h"

namespace epsa::cuda {

// Throws std::runtime_error where CUDA does.
Device device_properties(int device);

// The first of plans() that the current device, whose number is given, can hold
// (its occupancy decides: partitions and shared devices have less to give). What
// was chosen is remembered. Throws std::runtime_error for a device older than
// sm_80 or one that this library holds no kernels for.
Plan choose_plan(const Problem& problem, int device);

// How many blocks of a plan the device, which is the current one, can hold at
// once; 0: none. Else the kernel is ready for the plan, and a streaming plan has
// no more blocks than fit.
int admit(const Problem& problem, Plan& plan, const Device& device);

// One line, for error messages.
std::string describe(const Plan& plan);

// Clears the counters in `memory` (workspace(problem, plan).bytes, aligned to 16)
// and launches the kernel on the stream (a cudaStream_t). The tensors in
// `params` are set, the rest is filled in. Throws std::runtime_error, with the
// plan, if the launch fails.
void launch(
    const Problem& problem, const Plan& plan, Params& params, void* memory,
    void* stream);

}  // namespace epsa::cuda
