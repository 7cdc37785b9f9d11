// Per-element maths of the PSA attention step, written once for every backend.
//
// V is a scalar (float, double) or a GCC vector of them. The file has no
// include guard on purpose: each backend includes it inside its own namespace,
// the CPU once per instruction set. (A vector function compiled for a smaller
// instruction set is split into narrow pieces before it can be inlined.)
//
// EPSA_FN is the backend's "always inline" (and host/device) specifier.

// Output slot of a branch. The seed code prepends when it concatenates, so its
// output holds the branches in reversed order, and trained weights rely on it.
EPSA_FN int slot_of_branch(int branch, int branches, bool reversed) {
  return reversed ? branches - 1 - branch : branch;
}

// max(u, 0) that keeps NaN, as torch.relu does.
template <class V>
EPSA_FN V relu(V u) {
  return u < V{} ? V{} : u;
}

// d relu: `hidden` is relu(u). A NaN lets the gradient pass, as in PyTorch.
template <class V>
EPSA_FN V relu_grad(V grad, V hidden) {
  return hidden <= V{} ? V{} : grad;
}

// sigmoid(v), given exp(-v).
template <class V>
EPSA_FN V sigmoid_from_exp(V exp_neg_v) {
  return 1 / (1 + exp_neg_v);
}

template <class V>
EPSA_FN V sigmoid_grad(V grad, V z) {
  return grad * z * (1 - z);
}

// One entry of the softmax's gradient; dot is sum_t a_t * da_t.
template <class V>
EPSA_FN V softmax_grad(V a, V da, V dot) {
  return a * (da - dot);
}

// out = F * a
template <class V>
EPSA_FN V reweight(V feature, V attention) {
  return feature * attention;
}

// dF = g * a + dp / M: through the product, and through the pooled mean.
template <class V>
EPSA_FN V reweight_grad(V grad, V attention, V pooled_grad) {
  return grad * attention + pooled_grad;
}
