// From a problem to a running kernel, by raw addresses and a stream. It needs no torch
// header.
#pragma once

#include <string>
#include <vector>

#include "cuda/params.h"
#include "cuda/plan.h"

namespace epsa::cuda {

// Throws std::runtime_error where CUDA does.
Device device_properties(int device);

// The first of admitted_plans() on the current device, whose number is `device`. The choice is
// remembered.
Plan choose_plan(const Problem& problem, int device);

// Prepares the kernels of plans() and ranks those that fit on the current device by the blocks
// that it holds: partitioned and shared devices have less room. Throws std::runtime_error for a
// device older than sm_80, or one that this library has no kernels for.
std::vector<Candidate> admitted_plans(const Problem& problem, const Device& device);

// Prepares the kernel for the plan. Returns how many blocks the current device
// holds at once; 0: the plan does not fit. A streaming plan is cut down to that
// number of blocks.
int admit(const Problem& problem, Plan& plan, const Device& device);

// One line, for error messages.
std::string describe(const Plan& plan);

// Clears a streaming plan's counters in `memory` (workspace(problem, plan).bytes, aligned
// to 16), which may hold anything else, and launches the kernel on the stream (a cudaStream_t). The
// caller sets the tensors in `params`; the rest is filled in here. If the launch fails, it throws
// std::runtime_error with the plan.
void launch(const Problem& problem, const Plan& plan, Params& params, void* memory, void* stream);

}  // namespace epsa::cuda
