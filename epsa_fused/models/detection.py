"""EPSANet in torchvision's detectors, with the sizes of the paper's (arXiv 2105.14447).

The paper gives the detectors' sizes, not their settings. The settings here are MMDetection's for
ResNet-50 (mask_rcnn_r50_fpn.py and retinanet_r50_fpn.py: frozen_stages=1, norm_cfg with
requires_grad, norm_eval, 80 classes, extra levels "on_input"). With them the numbers of parameters
are the published ones, counted as by mmcv's get_model_complexity_info.

torchvision is no dependency of this package: the functions import it when they are called.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import ModuleType
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._checks import check_int
from .block import EPSABlock
from .epsanet import EPSANet

_Detector = TypeVar("_Detector", bound=nn.Module)

# The parts of EPSANet that are frozen together, starting at the image.
_STAGES = (("conv1", "bn1", "relu"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


def fpn_backbone(
    model: EPSANet,
    *,
    trainable_layers: int = 3,
    returned_layers: Sequence[int] = (1, 2, 3, 4),
    extra_blocks: nn.Module | None = None,
    out_channels: int = 256,
    frozen_statistics: bool = True,
    in_chans: int = 3,
) -> nn.Module:
    """An EPSANet with a feature pyramid network (FPN) on top, for torchvision's detectors.

    The result is a torchvision BackboneWithFPN. It maps images [N, in_chans, H, W] to an ordered
    dict of maps [N, out_channels, H / s, W / s], with sizes rounded up. Keys "0", "1", ... are the
    returned layers (s = 4, 8, 16, 32 for layers 1 to 4, or the model's `pyramid_strides`); the
    levels of `extra_blocks` follow::

        from epsa_fused import epsanet50
        from epsa_fused.detection import foreground_only, fpn_backbone
        from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7

        model = epsanet50()  # and load the weights of a classifier into it
        faster = FasterRCNN(fpn_backbone(model), num_classes=81)  # 80 and the background
        mask = MaskRCNN(fpn_backbone(model), num_classes=81)
        foreground_only(mask)  # removes weights whose results nothing reads

        p6 = LastLevelP6P7(model.num_features, 256)  # of C5; (256, 256) takes it from P5
        pyramid = fpn_backbone(model, returned_layers=(2, 3, 4), extra_blocks=p6)
        retina = RetinaNet(pyramid, num_classes=80)  # labels 0 to 79, no background

    Args:
        model: the network. It is copied without its classifier, and stays unchanged. The copy's
            `state_dict` keys get the prefix "body.". The FPN takes the model's device and dtype.
        trainable_layers: the number of parts to train, in the order layer4, layer3, layer2, layer1,
            stem. The other parts are frozen: they get no gradients, and their BatchNorm always
            normalises with its stored statistics. 3, the default of torchvision and MMDetection
            too, freezes the stem and layer1; 5 trains everything.
        returned_layers: ascending numbers, 1 to 4, of the layers that form the pyramid.
        extra_blocks: torchvision ExtraFPNBlock that appends levels. None stands for
            LastLevelMaxPool, which subsamples the last level. RetinaNet takes torchvision's
            LastLevelP6P7(model.num_features, 256).
        out_channels: channels of every map of the pyramid.
        frozen_statistics: whether BatchNorm keeps its stored statistics in the trained layers too,
            also in training mode. Its weight and bias are trained there. True suits weights of a
            classifier: a detector's batches, a few images per process, are too small for
            statistics of their own. False, with trainable_layers=5, suits training from scratch.
            Other normalisations stay unchanged.
        in_chans: channels of the images, equal to the model's. torchvision's detectors normalise
            with three values, and would silently spread one channel over three. For another
            number give the detectors `image_mean` and `image_std` of that length.

    torchvision's own helpers freeze a trained backbone with FrozenBatchNorm2d everywhere, which
    also fixes BatchNorm's weight and bias in the trained layers. :class:`FixedBatchNorm2d` trains
    those; the published numbers of parameters include them.

    Raises:
        ImportError: torchvision is missing or does not work with this torch.
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    _check_model(model, in_chans)
    returned = _checked_layers(trainable_layers, returned_layers, out_channels)
    backbones = _torchvision_backbones()

    model = copy.deepcopy(model)
    for i, names in enumerate(_STAGES):
        frozen = i < len(_STAGES) - trainable_layers
        for name in names:
            if frozen:
                part = getattr(model, name).requires_grad_(False)
                for block in part.modules():
                    if isinstance(block, EPSABlock):
                        block.drop_path_rate = 0.0
            if frozen or frozen_statistics:
                setattr(model, name, _with_fixed_statistics(getattr(model, name)))
    backbone = backbones.BackboneWithFPN(
        model,
        {f"layer{layer}": str(i) for i, layer in enumerate(returned)},
        [model.pyramid_channels[layer - 1] for layer in returned],
        out_channels,
        extra_blocks,
    )
    backbone.fpn.to(model.conv1.weight)  # its device and dtype
    return cast(nn.Module, backbone)


def _check_model(model: object, in_chans: int) -> None:
    if not isinstance(model, EPSANet):
        raise TypeError(
            f"model: expected an epsa_fused.EPSANet, got {type(model).__module__}."
            f"{type(model).__qualname__}; load the weights of other EPSANets into one"
        )
    if len(model.pyramid_channels) != 4:
        raise ValueError(
            "model: expected four stages, got "
            f"{len(model.pyramid_channels)}: the others were pruned"
        )
    if model.in_chans != in_chans:
        raise ValueError(
            f"in_chans: expected a model for images of {in_chans} channels, got one for "
            f"{model.in_chans}; for such images give in_chans={model.in_chans} here, and the "
            f"detector image_mean and image_std of {model.in_chans} values (3 are its default)"
        )


def _checked_layers(
    trainable_layers: int, returned_layers: Sequence[int], out_channels: int
) -> list[int]:
    """The returned layers as a list; TypeError or ValueError if an argument does not fit."""
    check_int("trainable_layers", trainable_layers, 0, len(_STAGES))
    check_int("out_channels", out_channels, 1)
    returned = list(returned_layers) if isinstance(returned_layers, Sequence) else []
    if not returned or returned != [layer for layer in (1, 2, 3, 4) if layer in returned]:
        raise ValueError(
            "returned_layers: expected ascending numbers of layers 1 to 4, such as (2, 3, 4), "
            f"got {returned_layers}"
        )
    return returned


class FixedBatchNorm2d(nn.Module):
    """A BatchNorm that always normalises with its stored statistics, in training mode too.

    x [N, C, H, W] -> the same shape and dtype. It takes over the parameters and buffers of `norm`
    by name, so `state_dict` keys stay. Weight and bias are trained if they require gradients. It
    does not derive from nn.BatchNorm2d: SyncBatchNorm's convert_sync_batchnorm leaves it alone.

    Args:
        norm: the BatchNorm to replace.

    Raises:
        TypeError: `norm` has another class or stores no statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        # A subclass with another forward may do more, such as an activation.
        plain = type(norm).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
        if not plain or norm.running_mean is None:
            raise TypeError(
                "FixedBatchNorm2d: expected an nn.BatchNorm2d or nn.SyncBatchNorm that stores "
                f"statistics, got {norm}"
            )
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )

    def extra_repr(self) -> str:
        return f"{self.running_mean.numel()}, eps={self.eps}"


def foreground_only(detector: _Detector) -> _Detector:
    """Remove the background's boxes and masks from a torchvision FasterRCNN or MaskRCNN.

    torchvision's predictors also compute a box and a mask for class 0, the background, but nothing
    reads them. This function removes their weights and puts zeros in their results. Losses,
    gradients and detections stay the same. The box predictor loses 4 * (1024 + 1) parameters, the
    mask predictor 256 + 1. The published numbers of parameters are without them.

    Args:
        detector: is changed in place. Call this before the optimizer gets the parameters. The
            `state_dict` keys of the layers change too, such as `bbox_pred.0.weight`.

    Returns:
        detector.

    Raises:
        TypeError: the detector has other predictors than torchvision's, or was changed before.
    """
    heads = getattr(detector, "roi_heads", None)
    box = getattr(heads, "box_predictor", None)
    mask = getattr(heads, "mask_predictor", None)  # None in a FasterRCNN
    cut: list[tuple[str, object, str, type[nn.Module], int]] = [
        ("box_predictor", box, "bbox_pred", nn.Linear, 4)
    ]
    if mask is not None:
        cut.append(("mask_predictor", mask, "mask_fcn_logits", nn.Conv2d, 1))
    for predictor, module, name, kind, _ in cut:
        layer = getattr(module, name, None)
        if type(layer) is not kind:
            raise TypeError(
                f"detector: expected torchvision's, with roi_heads.{predictor}.{name} of type "
                f"{kind.__name__}, got {type(detector).__name__} with {type(layer).__name__} there"
            )
    for _, module, name, _, channels in cut:
        setattr(module, name, _zeros_for_first(getattr(module, name), channels))
    return detector


def _zeros_for_first(layer: nn.Linear | nn.Conv2d, channels: int) -> nn.Sequential:
    """`layer` without the weights of its first output channels, which become zeros."""
    for name in ("weight", "bias"):
        old = getattr(layer, name)
        kept = nn.Parameter(old.detach()[channels:].clone(), old.requires_grad)
        setattr(layer, name, kept)
    if isinstance(layer, nn.Linear):
        layer.out_features -= channels
        return nn.Sequential(layer, nn.ConstantPad1d((channels, 0), 0.0))
    layer.out_channels -= channels
    # ConstantPad3d pads the last three axes; the channels of [R, C, H, W] are the first of them.
    return nn.Sequential(layer, nn.ConstantPad3d((0, 0, 0, 0, channels, 0), 0.0))


def _with_fixed_statistics(module: nn.Module) -> nn.Module:
    """The module with FixedBatchNorm2d for every BatchNorm that stores statistics."""
    if isinstance(module, _BatchNorm) and module.running_mean is not None:
        return FixedBatchNorm2d(module)
    for name, child in module.named_children():
        setattr(module, name, _with_fixed_statistics(child))
    return module


def _torchvision_backbones() -> ModuleType:
    try:
        from torchvision.models.detection import backbone_utils
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise ImportError(
            "fpn_backbone needs torchvision, which cannot be imported. Install the version made "
            f"for torch {torch.__version__}: pip install torchvision picks it, if torch itself "
            f"came from the same index. The import failed: {error}"
        ) from error
    return cast(ModuleType, backbone_utils)
