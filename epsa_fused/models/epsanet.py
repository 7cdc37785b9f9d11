"""EPSANet, the ResNet whose 3x3 convolutions are PSA modules (arXiv 2105.14447, section 3.3).

Attribute names and `state_dict` keys are those of the published code (murufeng/EPSANet): its
checkpoints load unchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from .._checks import check_callable, check_flag, check_int, check_ints, check_tensor, given
from .block import (
    RELU,
    ActLayer,
    BlockOptions,
    EPSABlock,
    NormLayer,
    check_rate,
    make_activation,
    make_stage,
)
from .features import taken_indices
from .registry import Figures, register
from .state_dict import check_state_dict, without_module_prefix

__all__ = [
    "EPSABlock",
    "EPSANet",
    "epsanet50",
    "epsanet50_large",
    "epsanet101",
    "epsanet101_large",
]

_STRIDES = (4, 8, 16, 32)  # of the four stages
_OUTPUT_STRIDES = (8, 16, 32)
_POOLS: dict[str, Callable[[], nn.Module]] = {
    "avg": partial(nn.AdaptiveAvgPool2d, 1),
    "max": partial(nn.AdaptiveMaxPool2d, 1),
    "": nn.Identity,
}


class ModelOptions(BlockOptions, total=False):
    """The options of :class:`EPSANet`; see there."""

    planes: Sequence[int]
    in_chans: int
    drop_rate: float
    drop_path_rate: float
    global_pool: str
    output_stride: int


class EPSANet(nn.Module):
    """EPSANet: images [N, in_chans, H, W] -> logits [N, num_classes].

    The images have any floating-point dtype that the convolutions take, and any H and W (the
    paper's are 224).

    Args:
        layers: the number of blocks in each of the four stages.
        num_classes: outputs of the classifier. With 0 there is no classifier, and the network
            returns the pooled features [N, num_features].
        planes: channels of the PSA modules in each stage.
        expansion, conv_kernels, conv_groups, reduction, fused, norm_layer, act_layer: of every
            :class:`EPSABlock`. The stem takes the two layers, too.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier; 0 in the published code.
        drop_path_rate: stochastic depth of the last block. It grows linearly from 0 in the first.
        global_pool: "avg", "max", or "" for none, which goes without a classifier.
        output_stride: 32, 16 or 8: how much smaller than the images the last maps are. With less
            than 32 the last stages have stride 1, and the convolutions behind a lost stride are
            dilated by it, as in timm's ResNet. The parameters stay the same.

    Attributes:
        num_features, head_hidden_size: channels of the last stage.
        pyramid_channels, pyramid_strides: of the maps that :meth:`forward_pyramid` returns.
        feature_info: the same in timm's form, with the stem first.
        grad_checkpointing: see :meth:`set_grad_checkpointing`.

    The weights of every convolution start as normal(0, sqrt(2 / (k_h * k_w * out_channels))), as
    in the published code.

    Raises:
        ValueError, TypeError: the network cannot be built; the message names the argument.
    """

    # networks pickled by an older version lack these attributes
    pyramid_strides: tuple[int, ...] = _STRIDES
    global_pool: str = "avg"
    grad_checkpointing: bool = False
    fc: nn.Linear | nn.Identity
    maxpool: nn.MaxPool2d | nn.Identity

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
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        output_stride: int = 32,
        norm_layer: NormLayer = nn.BatchNorm2d,
        act_layer: ActLayer = RELU,
    ) -> None:
        super().__init__()
        _check_configuration(layers, planes, expansion, in_chans)
        check_rate("drop_rate", drop_rate)
        check_rate("drop_path_rate", drop_path_rate)
        check_int("output_stride", output_stride)
        if output_stride not in _OUTPUT_STRIDES:
            raise ValueError(
                f"output_stride: expected one of {_OUTPUT_STRIDES}, got {output_stride}"
            )
        check_callable("norm_layer", norm_layer)
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.pyramid_channels = tuple(expansion * p for p in planes)
        self.pyramid_strides = tuple(min(stride, output_stride) for stride in _STRIDES)
        self.num_features = self.pyramid_channels[-1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": 64, "reduction": 2, "module": "relu"}
        ] + [
            {"num_chs": channels, "reduction": stride, "module": f"layer{i}"}
            for i, (channels, stride) in enumerate(
                zip(self.pyramid_channels, self.pyramid_strides, strict=True), 1
            )
        ]

        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = make_activation(act_layer)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        options: BlockOptions = {
            "expansion": expansion,
            "conv_kernels": conv_kernels,
            "conv_groups": conv_groups,
            "reduction": reduction,
            "fused": fused,
            "norm_layer": norm_layer,
            "act_layer": act_layer,
        }
        rates = [drop_path_rate * i / (sum(layers) - 1) for i in range(sum(layers))]
        inplanes, before, dilation = 64, _STRIDES[0], 1
        for i, (blocks, width, stride) in enumerate(
            zip(layers, planes, self.pyramid_strides, strict=True)
        ):
            dilations = (dilation, _STRIDES[i] // stride)  # the first block sees the maps before
            stage_rates, rates = rates[:blocks], rates[blocks:]
            stage = make_stage(inplanes, width, stride // before, dilations, stage_rates, options)
            self.add_module(f"layer{i + 1}", stage)
            inplanes, before, dilation = width * expansion, stride, dilations[1]
        self.avgpool = _POOLS["avg"]()
        self.reset_classifier(num_classes, global_pool)

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

        H / 32 and W / 32 are rounded up. Another `output_stride` replaces 32.
        """
        x = self.maxpool(self._stem(x))
        for i in range(len(self.pyramid_channels)):
            x = self._stage(i + 1, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last stage's maps -> logits, or with `pre_logits` the classifier's input."""
        x = self.avgpool(x)
        if self.global_pool:
            x = torch.flatten(x, 1)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else cast(Tensor, self.fc(x))

    def forward_pyramid(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """x [N, in_chans, H, W] -> the four stages' maps C2 to C5, named "0" to "3".

        Map i is [N, pyramid_channels[i], H / pyramid_strides[i], W / pyramid_strides[i]], rounded
        up. torchvision's FeaturePyramidNetwork(pyramid_channels, ...) takes the result.
        """
        x = self.maxpool(self._stem(x))
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for i in range(len(self.pyramid_channels)):
            x = maps[str(i)] = self._stage(i + 1, x)
        return maps

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """x [N, in_chans, H, W] -> the last stage's maps, and the maps that `indices` name.

        Map 0 is the stem's, of stride 2; maps 1 to 4 are C2 to C5.

        Args:
            x: the images.
            indices: of the maps. An int stands for the last ones, None for all.
            norm: has no effect: no normalisation follows the maps.
            stop_early: whether to leave out the stages behind the last of `indices`.
            output_fmt: "NCHW", the one there is.
            intermediates_only: whether to return the list of maps alone.

        Raises:
            TypeError, ValueError: there are no such maps, or there is no such format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {given(output_fmt)}")
        taken = taken_indices(indices, len(self.feature_info))
        x = self._stem(x)
        maps = [x] if 0 in taken else []
        x = self.maxpool(x)
        for i in range(1, max(taken) + 1 if stop_early else len(self.feature_info)):
            x = self._stage(i, x)
            if i in taken:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def _stem(self, x: Tensor) -> Tensor:
        check_tensor("EPSANet: x", x)
        return cast(Tensor, self.relu(self.bn1(self.conv1(x))))

    def _stage(self, number: int, x: Tensor) -> Tensor:
        return cast(Tensor, getattr(self, f"layer{number}")(x))

    # ---- what timm asks of its models ----

    def get_classifier(self) -> nn.Module:
        """The classifier: an nn.Linear, or an nn.Identity if num_classes is 0."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one with `num_classes` outputs; 0 removes it.

        The new one takes the device and dtype of the first convolution. `global_pool` replaces the
        pooling before it; None keeps that. "" is for no classifier: the network then returns the
        last stage's maps.
        """
        check_int("num_classes", num_classes, 0)
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in tuple(_POOLS):
            raise ValueError(f"global_pool: expected one of {tuple(_POOLS)}, got {given(pool)}")
        if num_classes and not pool:
            raise ValueError("global_pool: expected 'avg' or 'max' before a classifier, got ''")
        if pool != self.global_pool:
            self.avgpool = _POOLS[pool]().train(self.training)
            self.global_pool = pool
        like = self.conv1.weight
        self.num_classes = num_classes
        self.fc = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        ).train(self.training)

    @property
    def head_hidden_size(self) -> int:
        return self.num_features

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of parameter names for timm's layer decay: the stem, then a group per block.

        With `coarse` there is a group per stage. The classifier matches none: timm puts it last.
        """
        stage = r"^layer(\d+)"
        return {
            "stem": r"^(?:conv1|bn1|relu)\.",
            "blocks": stage if coarse else rf"{stage}\.(\d+)",
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backward pass computes each block's maps again, instead of keeping them.

        That saves memory for a second forward pass. Results, gradients and statistics of BatchNorm
        are the same.
        """
        check_flag("enable", enable)
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, EPSABlock):
                module.grad_checkpointing = enable

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages that :meth:`forward_intermediates` needs not for `indices`.

        The maps that are left keep their numbers.

        `prune_norm` has no effect. The classifier goes too, unless the last stage stays and
        `prune_head` is False.

        Returns:
            The indices, none of them negative.
        """
        taken = taken_indices(indices, len(self.feature_info))
        last = max(taken)
        for i in range(last + 1, len(self.feature_info)):
            setattr(self, f"layer{i}", nn.Sequential())
            prune_head = True
        if last == 0:
            self.maxpool = nn.Identity()
        self.feature_info = self.feature_info[: last + 1]
        self.pyramid_channels = self.pyramid_channels[:last]
        self.pyramid_strides = self.pyramid_strides[:last]
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head:
            self.reset_classifier(0, "")
        return taken

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
        state_dict = without_module_prefix(state_dict)
        # Hooks may rename keys or change shapes first.
        if not any(module._load_state_dict_pre_hooks for module in self.modules()):
            check_state_dict(self.state_dict(), state_dict, strict, assign)
        return super().load_state_dict(state_dict, strict, assign)


def _check_configuration(
    layers: Sequence[int],
    planes: Sequence[int],
    expansion: int,
    in_chans: int,
) -> None:
    """Raise ValueError or TypeError if no network can be built from these arguments."""
    for name, stages in (("layers", layers), ("planes", planes)):
        check_ints(name, stages, 1)
        if len(stages) != 4:
            raise ValueError(f"{name}: expected one number for each of 4 stages, got {stages}")
    check_int("in_chans", in_chans, 1)
    check_int("expansion", expansion, 1)


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
