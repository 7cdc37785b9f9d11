"""EPSANet, the ResNet whose 3x3 convolutions are PSA modules (arXiv 2105.14447, section 3.3).

Attribute names and `state_dict` keys are those of the published code (murufeng/EPSANet): its
checkpoints load unchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from typing_extensions import Unpack

from .._checks import (
    check_callable,
    check_flag,
    check_int,
    check_ints,
    check_module,
    check_number,
    check_tensor,
)
from ..modules import FusedPSAModule
from ..reference import PSAModule
from .registry import Figures, register

__all__ = [
    "EPSABlock",
    "EPSANet",
    "epsanet50",
    "epsanet50_large",
    "epsanet101",
    "epsanet101_large",
]

NormLayer = Callable[[int], nn.Module]

# An error message shows at most this many keys of each kind.
_SHOWN_KEYS = 4


class BlockOptions(TypedDict, total=False):
    """The options that every :class:`EPSABlock` of a network shares; see there."""

    expansion: int
    conv_kernels: Sequence[int]
    conv_groups: Sequence[int]
    reduction: int
    fused: bool
    norm_layer: NormLayer


class ModelOptions(BlockOptions, total=False):
    """The options of :class:`EPSANet`; see there."""

    planes: Sequence[int]
    in_chans: int
    drop_rate: float


class EPSABlock(nn.Module):
    """The bottleneck block: 1x1 convolution, PSA module, 1x1 convolution, and a shortcut.

    x [N, inplanes, H, W] -> [N, planes * expansion, H / stride, W / stride], rounded up.

    Args:
        inplanes: input channels.
        planes: channels of the PSA module, a multiple of the number of its branches.
        stride: stride of the PSA module.
        downsample: the shortcut's layers; None where input and output have the same shape.
        expansion: output channels per channel of the PSA module.
        conv_kernels, conv_groups, reduction: of the PSA module, see :class:`epsa_fused.PSAModule`.
        fused: whether to use :class:`epsa_fused.FusedPSAModule` or :class:`epsa_fused.PSAModule`.
        norm_layer: called with a number of channels, returns a normalisation layer.

    Raises:
        ValueError, TypeError: the PSA module cannot be built from these arguments.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        expansion: int = 4,
        conv_kernels: Sequence[int] = (3, 5, 7, 9),
        conv_groups: Sequence[int] = (1, 4, 8, 16),
        reduction: int = 16,
        fused: bool = True,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        for name, value in (("inplanes", inplanes), ("planes", planes), ("stride", stride)):
            check_int(name, value, 1)
        if downsample is not None:
            check_module("downsample", downsample)
        check_int("expansion", expansion, 1)
        check_flag("fused", fused)
        check_callable("norm_layer", norm_layer)
        psa = FusedPSAModule if fused else PSAModule
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = norm_layer(planes)
        self.conv2 = psa(planes, planes, conv_kernels, stride, conv_groups, reduction=reduction)
        self.bn2 = norm_layer(planes)
        self.conv3 = nn.Conv2d(planes, planes * expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return cast(Tensor, self.relu(out))


class EPSANet(nn.Module):
    """EPSANet: images [N, in_chans, H, W] -> logits [N, num_classes].

    The images have any floating-point dtype that the convolutions take, and any H and W (the
    paper's are 224).

    Args:
        layers: the number of blocks in each of the four stages.
        num_classes: outputs of the classifier. With 0 there is no classifier, and the network
            returns the pooled features [N, num_features].
        planes: channels of the PSA modules in each stage.
        expansion, conv_kernels, conv_groups, reduction, fused, norm_layer: of every
            :class:`EPSABlock`.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier; 0 in the published code.

    Attributes:
        num_features: channels of the last stage.
        pyramid_channels, pyramid_strides: of the maps that :meth:`forward_pyramid` returns.
        feature_info: the same in timm's form, with the stem first.

    The weights of every convolution start as normal(0, sqrt(2 / (k_h * k_w * out_channels))), as
    in the published code.

    Raises:
        ValueError, TypeError: the network cannot be built; the message names the argument.
    """

    pyramid_strides = (4, 8, 16, 32)
    fc: nn.Linear | nn.Identity

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        planes: Sequence[int] = (64, 128, 256, 512),
        expansion: int = 4,
        conv_kernels: Sequence[int] = (3, 5, 7, 9),
        conv_groups: Sequence[int] = (1, 4, 8, 16),
        reduction: int = 16,
        fused: bool = True,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        _check_configuration(layers, planes, expansion, in_chans, drop_rate)
        check_callable("norm_layer", norm_layer)
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.pyramid_channels = tuple(expansion * p for p in planes)
        self.num_features = self.pyramid_channels[-1]
        self.feature_info = [{"num_chs": 64, "reduction": 2, "module": "relu"}] + [
            {"num_chs": channels, "reduction": stride, "module": f"layer{i}"}
            for i, (channels, stride) in enumerate(
                zip(self.pyramid_channels, self.pyramid_strides, strict=True), 1
            )
        ]

        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        options: BlockOptions = {
            "expansion": expansion,
            "conv_kernels": conv_kernels,
            "conv_groups": conv_groups,
            "reduction": reduction,
            "fused": fused,
            "norm_layer": norm_layer,
        }
        inplanes = 64
        for i, (blocks, width) in enumerate(zip(layers, planes, strict=True)):
            stage = _make_stage(inplanes, width, blocks, 1 if i == 0 else 2, options)
            self.add_module(f"layer{i + 1}", stage)
            inplanes = width * expansion
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.reset_classifier(num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                height, width = module.kernel_size
                std = (2 / (height * width * module.out_channels)) ** 0.5
                nn.init.normal_(module.weight, 0, std)

    # ---- computation ----

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_chans, H, W] -> logits [N, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """x [N, in_chans, H, W] -> the last stage's maps [N, num_features, H / 32, W / 32].

        H / 32 and W / 32 are rounded up.
        """
        return self.forward_pyramid(x)["3"]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last stage's maps -> logits, or with `pre_logits` the classifier's input."""
        x = torch.flatten(self.avgpool(x), 1)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else cast(Tensor, self.fc(x))

    def forward_pyramid(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """x [N, in_chans, H, W] -> the four stages' maps C2 to C5, named "0" to "3".

        Map i is [N, pyramid_channels[i], H / pyramid_strides[i], W / pyramid_strides[i]], rounded
        up. torchvision's FeaturePyramidNetwork(pyramid_channels, ...) takes the result.
        """
        check_tensor("EPSANet: x", x)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for i in range(4):
            x = maps[str(i)] = getattr(self, f"layer{i + 1}")(x)
        return maps

    # ---- the classifier, by timm's names ----

    def get_classifier(self) -> nn.Module:
        """The classifier: an nn.Linear, or an nn.Identity if num_classes is 0."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one with `num_classes` outputs; 0 removes it.

        The new one takes the device and dtype of the first convolution. timm passes `global_pool`:
        "avg" or None keeps the network's average pooling, anything else raises ValueError.
        """
        check_int("num_classes", num_classes, 0)
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool: expected 'avg', the one there is, got {global_pool!r}")
        like = self.conv1.weight
        self.num_classes = num_classes
        self.fc = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )

    # ---- checkpoints ----

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a `state_dict`, also one saved from a model in (Distributed)DataParallel.

        The prefix "module." is dropped if every key has it.

        Raises:
            TypeError: a key is no string.
            RuntimeError: keys or shapes differ, or a value cannot be copied: one without data (on
                meta), a sparse or quantized one, integers for a weight. The message lists them.
                Nothing is loaded then, unlike with nn.Module. The exception is a model with
                load_state_dict_pre_hooks: those may change the state_dict, so nn.Module checks
                it. With `strict=False` keys may differ, shapes may not.
        """
        if not isinstance(state_dict, Mapping):
            return super().load_state_dict(state_dict, strict, assign)  # raises its own error
        for key in state_dict:
            if not isinstance(key, str):
                raise TypeError(
                    f"EPSANet: expected strings as keys of the state_dict, got {key!r}, "
                    "nothing was loaded"
                )
        state_dict = _without_module_prefix(state_dict)
        # Hooks may rename keys or change shapes first.
        if not any(module._load_state_dict_pre_hooks for module in self.modules()):
            self._check_state_dict(state_dict, strict, assign)
        return super().load_state_dict(state_dict, strict, assign)

    def _check_state_dict(self, state_dict: Mapping[str, Any], strict: bool, assign: bool) -> None:
        """Raise RuntimeError where nn.Module.load_state_dict would fail halfway."""

        def shape(value: Any) -> str:
            if not isinstance(value, Tensor) or value.is_nested:  # a nested one has no shape
                return type(value).__name__
            return str(list(value.shape))

        own = self.state_dict()
        # BatchNorm adds num_batches_tracked to checkpoints older than that buffer. torchvision's
        # FrozenBatchNorm2d has running_mean and drops num_batches_tracked.
        count, mean = "num_batches_tracked", "running_mean"
        missing = [k for k in own if k not in state_dict and not k.endswith(count)]
        unexpected = [
            k for k in state_dict if k not in own and k.removesuffix(count) + mean not in own
        ]
        both = [k for k in own if k in state_dict]
        other = [k for k in both if shape(own[k]) != shape(state_dict[k])]
        kinds = {k: _why_not_copied(state_dict[k], own[k], assign) for k in both if k not in other}
        problems = [
            _shortened(
                "of another shape",
                [f"{k} {shape(state_dict[k])}, expected {shape(own[k])}" for k in other],
            ),
            _shortened("of another kind", [f"{k} {why}" for k, why in kinds.items() if why]),
        ]
        if strict:
            problems += [
                _shortened("missing", [f"{k} {shape(own[k])}" for k in missing]),
                _shortened("unexpected", [f"{k} {shape(state_dict[k])}" for k in unexpected]),
            ]
        if not any(problems):
            return
        hint = ""
        if isinstance(state_dict.get("state_dict"), Mapping):
            hint = '. This is a training checkpoint: load its entry "state_dict"'
        raise RuntimeError(
            "EPSANet: the state_dict does not fit this architecture, nothing was loaded. "
            + "; ".join(filter(None, problems))
            + hint
        )


def _check_configuration(
    layers: Sequence[int],
    planes: Sequence[int],
    expansion: int,
    in_chans: int,
    drop_rate: float,
) -> None:
    """Raise ValueError or TypeError if no network can be built from these arguments."""
    for name, stages in (("layers", layers), ("planes", planes)):
        check_ints(name, stages, 1)
        if len(stages) != 4:
            raise ValueError(f"{name}: expected one number for each of 4 stages, got {stages}")
    check_int("in_chans", in_chans, 1)
    check_int("expansion", expansion, 1)
    check_number("drop_rate", drop_rate)
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate: expected a number in [0, 1), got {drop_rate}")


def _make_stage(
    inplanes: int, planes: int, blocks: int, stride: int, options: BlockOptions
) -> nn.Sequential:
    """`blocks` blocks; the first has `stride`, and a downsample if shapes change."""
    outplanes = planes * options["expansion"]
    downsample = None
    if stride != 1 or inplanes != outplanes:
        downsample = nn.Sequential(
            nn.Conv2d(inplanes, outplanes, 1, stride=stride, bias=False),
            options["norm_layer"](outplanes),
        )
    first = EPSABlock(inplanes, planes, stride, downsample, **options)
    return nn.Sequential(
        first, *(EPSABlock(outplanes, planes, **options) for _ in range(blocks - 1))
    )


def _without_module_prefix(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    if not state_dict or not all(key.startswith("module.") for key in state_dict):
        return state_dict
    stripped: Any = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):  # the versions of the layers
        stripped._metadata = OrderedDict(state_dict._metadata)
    consume_prefix_in_state_dict_if_present(stripped, "module.")
    return cast(Mapping[str, Any], stripped)


def _why_not_copied(value: Tensor, own: Tensor, assign: bool) -> str | None:
    """What keeps `value` from being loaded into `own`, a tensor of the same shape, or None."""
    if value.is_meta and not own.is_meta and not assign:
        return "without data (on meta)"
    if value.is_quantized != own.is_quantized or value.layout != own.layout:
        kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        return f"{kind}, expected {own.dtype} in {own.layout}"
    for kind in ("is_floating_point", "is_complex"):
        if getattr(value, kind)() != getattr(own, kind)():
            return f"{value.dtype}, expected {own.dtype}"
    if not assign:
        try:
            torch.empty_like(own).copy_(value)
        except Exception as error:  # a subclass of Tensor may raise anything
            return f"that cannot be copied ({type(value).__name__}: {error})"
    return None


def _shortened(kind: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:_SHOWN_KEYS])}{more}"


# ---- the published models ----

_LARGE: ModelOptions = {
    "planes": (128, 256, 512, 1024),
    "expansion": 2,
    "conv_kernels": (3, 5, 5, 7),
    "conv_groups": (32, 32, 32, 32),
}


@register(Figures(22_561_715, 3_597_860_864, 22.56, 3.62, 77.49, 93.54))
def epsanet50(num_classes: int = 1000, **options: Unpack[ModelOptions]) -> EPSANet:
    """EPSANet-50 (small): 22.56 M parameters, 3.60 G multiply-adds at 224x224.

    Args:
        num_classes: outputs of the classifier, 0 for none.
        options: of :class:`EPSANet`, such as fused, in_chans, drop_rate and norm_layer.
    """
    return EPSANet((3, 4, 6, 3), num_classes, **options)


@register(Figures(27_899_518, 4_692_901_888, 27.90, 4.72, 78.64, 94.18))
def epsanet50_large(num_classes: int = 1000, **options: Unpack[ModelOptions]) -> EPSANet:
    """EPSANet-50 (large): 27.90 M parameters, 4.69 G multiply-adds at 224x224.

    The published code never held the large models. This configuration (planes 128 to 1024,
    expansion 2, kernels 3, 5, 5, 7 in 32 groups each) was inferred: it gives exactly the published
    numbers of parameters at both depths.

    Args:
        num_classes, options: as of :func:`epsanet50`.
    """
    return EPSANet((3, 4, 6, 3), num_classes, **(_LARGE | options))


@register(Figures(38_900_279, 6_788_050_944, 38.90, 6.82, 78.43, 94.11))
def epsanet101(num_classes: int = 1000, **options: Unpack[ModelOptions]) -> EPSANet:
    """EPSANet-101 (small): 38.90 M parameters, 6.79 G multiply-adds at 224x224.

    Args:
        num_classes, options: as of :func:`epsanet50`.
    """
    return EPSANet((3, 4, 23, 3), num_classes, **options)


@register(Figures(49_592_198, 8_923_742_208, 49.59, 8.97, 79.38, 94.58))
def epsanet101_large(num_classes: int = 1000, **options: Unpack[ModelOptions]) -> EPSANet:
    """EPSANet-101 (large): 49.59 M parameters, 8.92 G multiply-adds at 224x224.

    Its configuration was inferred, see :func:`epsanet50_large`.

    Args:
        num_classes, options: as of :func:`epsanet50`.
    """
    return EPSANet((3, 4, 23, 3), num_classes, **(_LARGE | options))
