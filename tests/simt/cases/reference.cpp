#include "cases/reference.h"

#include <algorithm>
#include <cstdint>

namespace epsa::cuda {

Values make_inputs(const Case& k) {
  uint64_t state = 0x9e3779b97f4a7c15u;
  const auto draw = [&state](size_t size, double scale, double mean = 0) {
    Numbers values(size);
    for (Number& x : values) {  // eight bits, even if mean = scale
      state = state * 6364136223846793005u + 1442695040888963407u;
      x = mean + static_cast<int>((state >> 33) % 257 - 128) / 128.0 * scale;
    }
    return values;
  };
  const size_t vector = size_t(k.N) * k.S * k.C;
  const size_t matrix = size_t(k.sets()) * k.r * k.C;
  Values v(kTensors);
  v[kFeats] = draw(vector * k.M, 2);
  v[kFc1] = draw(matrix, 0.5);
  v[kFc1Bias] = draw(k.fc1_bias ? k.sets() * k.r : 0, 0.5, 0.5);  // few negative
  v[kFc2] = draw(matrix, 1);
  v[kFc2Bias] = draw(k.fc2_bias ? k.sets() * k.C : 0, 0.5);
  v[kGradOut] = draw(k.grad_out ? vector * k.M : 0, 2);
  v[kGradAttention] = draw(k.grad_attention ? vector : 0, 1);
  v[kPooled] = draw(k.pooled_given ? vector : 0, 0.5);
  v[kScale] = draw(k.affine ? k.S * k.C : 0, 2);
  v[kShift] = draw(k.affine ? k.S * k.C : 0, 0.5);
  return v;
}

namespace {

Number bias(const Numbers& b, int i) {
  return b.empty() ? Number() : b[i];
}

// One sample of a case, forward and backward.
class Sample {
 public:
  Sample(const Case& k, Values& v, int n)
      : k(k),
        v(v),
        n(n),
        hidden(k.S * k.r),
        z(k.S * k.C),
        da(k.S * k.C),
        pooled(&v[kPooled][n * k.S * k.C]),
        attention(&v[kAttention][n * k.S * k.C]) {}

  void squeeze() {
    for (int i = 0; i < k.S * k.C; ++i) {
      for (int m = 0; m < k.M; ++m) {
        pooled[i] += map(kFeats, i)[m] / k.M;
      }
    }
  }

  // hidden and z of one branch
  void excite(int s) {
    const int b = k.shared ? 0 : s;
    for (int j = 0; j < k.r; ++j) {
      Number u = bias(v[kFc1Bias], b * k.r + j);
      for (int c = 0; c < k.C; ++c) {
        u += v[kFc1][(b * k.r + j) * k.C + c] * pooled[s * k.C + c];
      }
      hidden[s * k.r + j] = {std::max(u.value, 0.0), u.size};
    }
    for (int c = 0; c < k.C; ++c) {
      Number x = bias(v[kFc2Bias], b * k.C + c);
      for (int j = 0; j < k.r; ++j) {
        x += v[kFc2][(b * k.C + c) * k.r + j] * hidden[s * k.r + j];
      }
      z[s * k.C + c] = {1 / (1 + std::exp(-x.value)), 1 + x.size};
    }
  }

  // attention, out and da of the channel i = s * C + c
  void reweight(int i) {
    double sum = 0;
    for (int t = i % k.C; t < k.S * k.C; t += k.C) {
      sum += std::exp(z[t].value);
    }
    attention[i] = {std::exp(z[i].value) / sum, z[i].size};
    for (int m = 0; m < k.M; ++m) {
      map(kOut, i)[m] = epilogue(i, map(kFeats, i)[m] * attention[i]);
      if (k.grad_out) {
        da[i] += map(kGradOut, i)[m] * map(kFeats, i)[m];
      }
    }
    if (k.grad_attention) {
      da[i] += v[kGradAttention][n * k.S * k.C + i];
    }
  }

  // All gradients that pass through one branch.
  void backward(int s) {
    const int b = k.shared ? 0 : s;
    const Numbers dv = grad_excitation(s);
    Numbers du(k.r);
    for (int c = 0; c < k.C; ++c) {
      for (int j = 0; j < k.r; ++j) {
        const int w = (b * k.C + c) * k.r + j;
        v[kGradFc2][w] += dv[c] * hidden[s * k.r + j];
        if (hidden[s * k.r + j].value > 0) {
          du[j] += dv[c] * v[kFc2][w];
        }
      }
      if (k.fc2_bias) {
        v[kGradFc2Bias][b * k.C + c] += dv[c];
      }
    }
    for (int j = 0; k.fc1_bias && j < k.r; ++j) {
      v[kGradFc1Bias][b * k.r + j] += du[j];
    }
    for (int c = 0; c < k.C; ++c) {
      const int i = s * k.C + c;
      Number dp;
      for (int j = 0; j < k.r; ++j) {
        const int w = (b * k.r + j) * k.C + c;
        dp += du[j] * v[kFc1][w];
        v[kGradFc1][w] += du[j] * pooled[i];
      }
      grad_feats(i, dp);
    }
  }

 private:
  // The epilogue of the channel i = s * C + c: scale and shift have the order of the output's
  // slots.
  Number epilogue(int i, Number x) const {
    const int s = i / k.C, slot = k.reversed ? k.S - 1 - s : s;
    if (k.affine) {
      const int channel = slot * k.C + i % k.C;
      x = x * v[kScale][channel] + v[kShift][channel];
    }
    return k.relu ? Number(std::max(x.value, 0.0), x.size) : x;
  }

  Number* map(Tensor t, int i) { return &v[t][(n * k.S * k.C + i) * k.M]; }

  // The gradient of the sigmoid's input, for each channel of a branch.
  Numbers grad_excitation(int s) const {
    Numbers dv(k.C);
    for (int c = 0; c < k.C; ++c) {
      Number dot;
      for (int t = 0; t < k.S; ++t) {
        dot += attention[t * k.C + c] * da[t * k.C + c];
      }
      const int i = s * k.C + c;
      dv[c] = attention[i] * (da[i] - dot) * z[i] * (1 - z[i]);
    }
    return dv;
  }

  void grad_feats(int i, Number grad_pooled) {
    for (int m = 0; m < k.M; ++m) {
      map(kGradFeats, i)[m] = grad_pooled / k.M;
      if (k.grad_out) {
        map(kGradFeats, i)[m] += map(kGradOut, i)[m] * attention[i];
      }
    }
  }

  const Case& k;
  Values& v;
  const int n;
  Numbers hidden, z, da;
  Number *pooled, *attention;
};

}  // namespace

void reference(const Case& k, Values& v) {
  for (const Tensor t : {kPooled, kAttention}) {
    v[t].resize(size_t(k.N) * k.S * k.C);
  }
  v[kOut].resize(v[kFeats].size());
  v[kGradFeats].resize(v[kFeats].size());
  v[kGradFc1].resize(v[kFc1].size());
  v[kGradFc2].resize(v[kFc2].size());
  v[kGradFc1Bias].resize(v[kFc1Bias].size());
  v[kGradFc2Bias].resize(v[kFc2Bias].size());
  for (int n = 0; n < k.N; ++n) {
    Sample sample(k, v, n);
    if (!k.pooled_given) {
      sample.squeeze();
    }
    for (int s = 0; s < k.S; ++s) {
      sample.excite(s);
    }
    for (int i = 0; i < k.S * k.C; ++i) {
      sample.reweight(i);
    }
    for (int s = 0; s < k.S; ++s) {
      sample.backward(s);
    }
  }
}

}  // namespace epsa::cuda
