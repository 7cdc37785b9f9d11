"""EPSANet in torchvision's detectors, so that they are those of the paper (arXiv 2105.14447).

The paper gives their sizes, not their settings. The settings here are those of MMDetection's
configurations for ResNet-50 (mask_rcnn_r50_fpn.py and retinanet_r50_fpn.py: frozen_stages=1,
norm_cfg with requires_grad, norm_eval, 80 classes, extra levels "on_input"); with them the numbers
of parameters, counted as mmcv's get_model_complexity_info does, are the published ones.

torchvision is imported when it is asked for: it is no dependency of this package.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .epsanet import EPSANet, check_int

# The parts of EPSANet that are frozen together, from the image on.
_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


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
    """An EPSANet with a feature pyramid network on top, as torchvision's detectors take it.

    The result, a torchvision BackboneWithFPN, maps images [N, in_chans, H, W] to an ordered dict
    of maps [N, out_channels, H / s, W / s], rounded up: "0", "1" ... for the returned layers
    (s = 4, 8, 16, 32 for layers 1 to 4), then what `extra_blocks` appends::

        from epsa_fused import epsanet50
        from epsa_fused.detection import foreground_only, fpn_backbone
        from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7

        model = epsanet50()  # and load the weights of a classifier into it
        faster = FasterRCNN(fpn_backbone(model), num_classes=81)  # 80 and the background
        mask = MaskRCNN(fpn_backbone(model), num_classes=81)
        foreground_only(mask)  # leaves out weights whose results nothing reads

        p6 = LastLevelP6P7(model.num_features, 256)  # of C5; (256, 256) takes it from P5
        pyramid = fpn_backbone(model, returned_layers=(2, 3, 4), extra_blocks=p6)
        retina = RetinaNet(pyramid, num_classes=80)  # labels 0 to 79, no background

    Args:
        model: the network; its classifier is left out. It is copied and stays as it is; the
            copy's `state_dict` keys get the prefix "body.". The FPN gets its device and dtype.
        trainable_layers: how many of layer4, layer3, layer2, layer1 and the stem, in that order,
            are trained. The others are frozen: no gradients, and BatchNorm always normalises with
            its stored statistics. 3, torchvision's and MMDetection's default too, freezes the
            stem and layer1; 5 trains all.
        returned_layers: ascending numbers of the layers that the pyramid is made of, 1 to 4.
        extra_blocks: torchvision ExtraFPNBlock that appends levels; None for LastLevelMaxPool,
            which subsamples the last one. torchvision's LastLevelP6P7(model.num_features, 256)
            is what RetinaNet takes.
        out_channels: channels of every map of the pyramid.
        frozen_statistics: whether BatchNorm keeps its stored statistics in the trained layers
            too, in training mode as well; weight and bias are trained there. Right for a
            classifier's weights: a detector's batches, a few images a process, are too small for
            statistics of their own. False, with trainable_layers=5, to train from nothing. Other
            normalisations stay as they are.
        in_chans: channels of the images. The model's must be the same: torchvision's detectors
            normalise with three values, and would spread one channel over three without a word;
            for others than 3 give them `image_mean` and `image_std` of that many.

    In frozen layers that is what torchvision's own helpers do, for a trained backbone. Theirs,
    with FrozenBatchNorm2d everywhere, fix BatchNorm's weight and bias in the trained layers too;
    :class:`FixedBatchNorm2d` leaves those to `trainable_layers`: the published numbers hold them.

    Raises:
        ImportError: torchvision is missing or does not work with this torch.
        TypeError, ValueError: an argument that does not fit; the message says what was expected.
    """
    if not isinstance(model, EPSANet):
        raise TypeError(
            f"model: expected an epsa_fused.EPSANet, got {type(model).__module__}."
            f"{type(model).__qualname__}; load the weights of other EPSANets into one"
        )
    check_int("trainable_layers", trainable_layers, 0, len(_STAGES))
    check_int("out_channels", out_channels, 1)
    returned = list(returned_layers) if isinstance(returned_layers, Sequence) else []
    if not returned or returned != [layer for layer in (1, 2, 3, 4) if layer in returned]:
        raise ValueError(
            "returned_layers: expected ascending numbers of layers 1 to 4, such as (2, 3, 4), "
            f"got {returned_layers}"
        )
    if model.in_chans != in_chans:
        raise ValueError(
            f"in_chans: expected a model for images of {in_chans} channels, got one for "
            f"{model.in_chans}; for such images give in_chans={model.in_chans} here, and the "
            f"detector image_mean and image_std of {model.in_chans} values (3 are its default)"
        )
    backbones = _torchvision_backbones()

    model = copy.deepcopy(model)
    for i, names in enumerate(_STAGES):
        frozen = i < len(_STAGES) - trainable_layers
        for name in names:
            if frozen:
                getattr(model, name).requires_grad_(False)
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
    return backbone


class FixedBatchNorm2d(nn.Module):
    """What `norm`, a BatchNorm, computes in evaluation, in training as well.

    x [N, C, H, W] -> the same shape. It takes over the parameters and buffers of `norm`, under
    the same names: `state_dict` keys do not change, and weight and bias are trained as far as
    they require gradients. No subclass of nn.BatchNorm2d, so that SyncBatchNorm's
    convert_sync_batchnorm leaves it alone.

    Raises:
        TypeError: `norm` is not that, or stores no statistics.
    """

    def __init__(self, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> None:
        super().__init__()
        # a subclass with a forward of its own may do more, such as an activation
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


def foreground_only(detector: nn.Module) -> nn.Module:
    """Take the background's boxes and masks out of a torchvision FasterRCNN or MaskRCNN.

    torchvision's predictors compute a box and a mask also for class 0, the background, and nothing
    reads them. This cuts their weights off and puts zeros in the place of the results: losses,
    gradients and detections stay what they were, with 4 * (1024 + 1) parameters less in the box
    predictor and 256 + 1 in the mask predictor. The published numbers are without.

    Args:
        detector: it is changed in place, and returned. Do it before the optimizer gets the
            parameters. The layers' `state_dict` keys change too: `bbox_pred.0.weight`.

    Raises:
        TypeError: not a detector with torchvision's predictors, or this was done to it before.
    """
    heads = getattr(detector, "roi_heads", None)
    box = getattr(heads, "box_predictor", None)
    mask = getattr(heads, "mask_predictor", None)  # None in a FasterRCNN
    cut = [("box_predictor", box, "bbox_pred", nn.Linear, 4)]
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
    """`layer` with zeros for its first output channels, and without their weights."""
    for name in ("weight", "bias"):
        old = getattr(layer, name)
        kept = nn.Parameter(old.detach()[channels:].clone(), old.requires_grad)
        setattr(layer, name, kept)
    if isinstance(layer, nn.Linear):
        layer.out_features -= channels
        return nn.Sequential(layer, nn.ConstantPad1d((channels, 0), 0.0))
    layer.out_channels -= channels
    # it pads the last three axes, of which the channels of [R, C, H, W] are the first
    return nn.Sequential(layer, nn.ConstantPad3d((0, 0, 0, 0, channels, 0), 0.0))


def _with_fixed_statistics(module: nn.Module) -> nn.Module:
    """The module with FixedBatchNorm2d in place of every BatchNorm that stores statistics."""
    if isinstance(module, _BatchNorm) and module.running_mean is not None:
        return FixedBatchNorm2d(module)
    for name, child in module.named_children():
        setattr(module, name, _with_fixed_statistics(child))
    return module


def _torchvision_backbones() -> ModuleType:
    try:
        from torchvision.models.detection import backbone_utils
    except (ImportError, RuntimeError) as error:  # RuntimeError: made for another torch
        raise ImportError(
            "fpn_backbone needs torchvision, which cannot be imported. Install the version made "
            f"for torch {torch.__version__}: pip install torchvision picks it, if torch itself "
            f"came from the same index. The import failed: {error}"
        ) from error
    return backbone_utils
