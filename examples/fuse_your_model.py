"""Fuse the PSA modules of a model that you have: the same weights and results in less time.

python examples/fuse_your_model.py
"""

import torch

import epsa_fused

model = epsa_fused.epsanet50(fused=False).eval()  # your model here
images = torch.randn(2, 3, 224, 224)

fused = epsa_fused.fuse(model)  # shares its parameters; `model` stays as it is
print(fused.fuse_report)  # what was replaced, what was left alone, and why
with torch.no_grad():
    expected, logits = model(images), fused(images)
print(f"largest difference: {(logits - expected).abs().max() / expected.abs().max():.0e}")
