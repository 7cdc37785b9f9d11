"""EPSANet in torchvision's detectors; see :mod:`epsa_fused.models.detection`."""

from .models.detection import FixedBatchNorm2d, foreground_only, fpn_backbone

__all__ = ["FixedBatchNorm2d", "foreground_only", "fpn_backbone"]
