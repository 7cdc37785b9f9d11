// The SE MLP and the softmax across branches, and their gradients. One block
// computes one sample. Vectors lie in shared or in global memory. Each function
// that writes one ends in a barrier.
#pragma once

#include "cuda/sums.cuh"

namespace epsa::cuda {

EPSA_DEVICE int weight_set(const Params& p, int s) {
  return p.shared ? 0 : s;
}

// h = relu(W1 p + b1)
template <class T>
EPSA_DEVICE void hidden_units(const Params& p, const Acc<T>* pooled, Acc<T>* hidden) {
  using A = Acc<T>;
  const int lane = thread_id() % kWarp, warps = block_threads() / kWarp;
  const int units = p.branches * p.hidden;
  for (int k = thread_id() / kWarp; k < units; k += warps) {
    const int s = k / p.hidden, j = k % p.hidden;
    const int unit = weight_set(p, s) * p.hidden + j;
    A sum = 0;
    for (int c = lane; c < p.channels; c += kWarp) {
      sum += weight<T>(p, p.fc1, unit * p.channels + c) * pooled[s * p.channels + c];
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const A bias = p.fc1_bias ? weight<T>(p, p.fc1_bias, unit) : A(0);
      hidden[k] = relu(sum + bias);
    }
  }
  barrier();
}

// z = sigmoid(W2 h + b2) of one channel
template <class T>
EPSA_DEVICE Acc<T> excitation(const Params& p, const Acc<T>* hidden, int s, int c) {
  using A = Acc<T>;
  const int channel = weight_set(p, s) * p.channels + c;
  A v = p.fc2_bias ? weight<T>(p, p.fc2_bias, channel) : A(0);
  for (int j = 0; j < p.hidden; ++j) {
    v += weight<T>(p, p.fc2, channel * p.hidden + j) * hidden[s * p.hidden + j];
  }
  return sigmoid_from_exp(simt::exponential(-v));
}

// pooled [S, C] -> attention [S, C]; hidden [S, r] and scores [S, C] are scratch
template <class T>
EPSA_DEVICE void gate(
    const Params& p, const Acc<T>* pooled, Acc<T>* hidden, Acc<T>* scores, Acc<T>* attention) {
  using A = Acc<T>;
  hidden_units<T>(p, pooled, hidden);
  const int vector = p.branches * p.channels;
  for (int i = thread_id(); i < vector; i += block_threads()) {
    // z lies in (0, 1), so exp needs no shift by the maximum
    scores[i] = simt::exponential(excitation<T>(p, hidden, i / p.channels, i % p.channels));
  }
  barrier();
  for (int i = thread_id(); i < vector; i += block_threads()) {
    A sum = 0;
    for (int k = i % p.channels; k < vector; k += p.channels) {
      sum += scores[k];
    }
    attention[i] = scores[i] / sum;
  }
  barrier();
}

// What an epilogue multiplies and adds: factors and summands [S, C] in the order of the
// branches. The factors may be where the scores were.
template <class T>
EPSA_DEVICE void epilogue(
    const Params& p, const Acc<T>* attention, Acc<T>* factors, Acc<T>* summands) {
  using A = Acc<T>;
  const auto* scale = static_cast<const A*>(p.scale);
  const auto* shift = static_cast<const A*>(p.shift);
  for (int i = thread_id(); i < p.branches * p.channels; i += block_threads()) {
    const int slot = slot_of_branch(i / p.channels, p.branches, p.reversed);
    const int k = slot * p.channels + i % p.channels;
    factors[i] = scale ? attention[i] * scale[k] : attention[i];
    summands[i] = shift ? shift[k] : A(0);
  }
  barrier();
}

// da [S, C] -> hidden [S, r], grad_v [S, C], grad_u [S, r], grad_pooled [S, C] / M.
// On entry da is this sample's gradient through the output alone.
template <class T>
EPSA_DEVICE void gate_grad(
    const Params& p, const Acc<T>* grad_attention, const Acc<T>* pooled, const Acc<T>* attention,
    Acc<T>* da, Acc<T>* hidden, Acc<T>* grad_v, Acc<T>* grad_u, Acc<T>* grad_pooled) {
  using A = Acc<T>;
  const int vector = p.branches * p.channels;
  if (grad_attention) {
    for (int i = thread_id(); i < vector; i += block_threads()) {
      da[i] += grad_attention[i];
    }
  }
  hidden_units<T>(p, pooled, hidden);  // its barrier serves da as well
  for (int i = thread_id(); i < vector; i += block_threads()) {
    A dot = 0;
    for (int k = i % p.channels; k < vector; k += p.channels) {
      dot += attention[k] * da[k];
    }
    const A dz = softmax_grad(attention[i], da[i], dot);
    const A z = excitation<T>(p, hidden, i / p.channels, i % p.channels);
    grad_v[i] = sigmoid_grad(dz, z);
  }
  barrier();
  const int lane = thread_id() % kWarp, warps = block_threads() / kWarp;
  const int units = p.branches * p.hidden;
  for (int k = thread_id() / kWarp; k < units; k += warps) {
    const int s = k / p.hidden, j = k % p.hidden;
    const int first = weight_set(p, s) * p.channels;
    A sum = 0;
    for (int c = lane; c < p.channels; c += kWarp) {
      sum += grad_v[s * p.channels + c] * weight<T>(p, p.fc2, (first + c) * p.hidden + j);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      grad_u[k] = relu_grad(sum, hidden[k]);
    }
  }
  barrier();
  for (int i = thread_id(); i < vector; i += block_threads()) {
    const int s = i / p.channels, c = i % p.channels;
    const int first = weight_set(p, s) * p.hidden;
    A sum = 0;
    for (int j = 0; j < p.hidden; ++j) {
      sum += weight<T>(p, p.fc1, (first + j) * p.channels + c) * grad_u[s * p.hidden + j];
    }
    grad_pooled[i] = sum / static_cast<A>(p.pixels);
  }
  barrier();
}

}  // namespace epsa::cuda
