"""Detect objects: train torchvision's Faster R-CNN on an EPSANet-50, here to find one flower.

python examples/detection.py

It needs torchvision, and scikit-learn for the photograph.
"""

import torch
from sklearn.datasets import load_sample_image
from torchvision.models.detection import FasterRCNN
from torchvision.ops import box_iou

from epsa_fused import epsanet50
from epsa_fused.detection import fpn_backbone

torch.manual_seed(0)
image = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1) / 255  # [3, 427, 640]
target = {"boxes": torch.tensor([[168.0, 84.0, 447.0, 359.0]]), "labels": torch.tensor([1])}

# From random weights, everything is trained. With a classifier's weights leave the options out.
backbone = fpn_backbone(epsanet50(), trainable_layers=5, frozen_statistics=False)
small = {"min_size": 160, "rpn_post_nms_top_n_train": 200, "box_batch_size_per_image": 64}
detector = FasterRCNN(backbone, num_classes=2, **small)  # the flower and the background
optimizer = torch.optim.SGD(detector.parameters(), lr=0.01, momentum=0.9)
for step in range(40):
    optimizer.zero_grad()
    loss = sum(detector([image], [target]).values())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(detector.parameters(), 10)
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss:.2f}")

detector.eval()
with torch.no_grad():
    (found,) = detector([image])
overlap = box_iou(target["boxes"], found["boxes"][:1]).item()
print(f"best box {found['boxes'][0].tolist()}, score {found['scores'][0]:.2f}, IoU {overlap:.2f}")
