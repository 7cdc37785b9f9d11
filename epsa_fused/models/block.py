"""EPSANet's bottleneck block, and the stages that blocks form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypedDict, cast

from torch import Tensor, nn

from .._checks import check_callable, check_flag, check_int, check_module, check_number, given
from ..modules import FusedPSAModule
from ..reference import PSAModule
from .recompute import checkpointed

NormLayer = Callable[[int], nn.Module]
ActLayer = Callable[[], nn.Module]

RELU: ActLayer = partial(nn.ReLU, inplace=True)


class BlockOptions(TypedDict, total=False):
    """The options that every :class:`EPSABlock` of a network shares; see there."""

    expansion: int
    conv_kernels: Sequence[int]
    conv_groups: Sequence[int]
    reduction: int
    fused: bool
    norm_layer: NormLayer
    act_layer: ActLayer


def check_rate(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless the argument `name` is a number in [0, 1)."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")


def make_activation(act_layer: ActLayer) -> nn.Module:
    """The layer that `act_layer` returns; TypeError if it returns none."""
    expected = "act_layer: expected a callable without arguments that returns a torch.nn.Module"
    if isinstance(act_layer, nn.Module) or not callable(act_layer):
        raise TypeError(f"{expected}, got {given(act_layer)}")
    try:
        layer = act_layer()
    except TypeError as error:
        raise TypeError(f"{expected}, got {given(act_layer)} ({error})") from error
    if not isinstance(layer, nn.Module):
        raise TypeError(f"{expected}, got one that returns {given(layer)}")
    return layer


class EPSABlock(nn.Module):
    """The bottleneck block: 1x1 convolution, PSA module, 1x1 convolution, and a shortcut.

    x [N, inplanes, H, W] -> [N, planes * expansion, H / stride, W / stride], rounded up.

    Args:
        inplanes: input channels.
        planes: channels of the PSA module, a multiple of the number of its branches.
        stride: stride of the PSA module.
        downsample: the shortcut's layers; None where input and output have the same shape.
        expansion: output channels per channel of the PSA module.
        conv_kernels, conv_groups, reduction, dilation: of the PSA module, see
            :class:`epsa_fused.PSAModule`.
        fused: whether to use :class:`epsa_fused.FusedPSAModule` or :class:`epsa_fused.PSAModule`.
        norm_layer: called with a number of channels, returns a normalisation layer.
        act_layer: called without arguments, returns the activation layer, `relu` whatever it is.
        drop_path_rate: how often training leaves a sample with its shortcut alone (stochastic
            depth, arXiv 1603.09382). Also an attribute.

    Attributes:
        grad_checkpointing: whether the backward pass computes the maps between again.

    Raises:
        ValueError, TypeError: the PSA module cannot be built from these arguments.
    """

    # blocks pickled by an older version lack these
    drop_path_rate: float = 0.0
    grad_checkpointing: bool = False

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
        act_layer: ActLayer = RELU,
        dilation: int = 1,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("inplanes", inplanes), ("planes", planes), ("stride", stride)):
            check_int(name, value, 1)
        if downsample is not None:
            check_module("downsample", downsample)
        check_int("expansion", expansion, 1)
        check_flag("fused", fused)
        check_callable("norm_layer", norm_layer)
        check_rate("drop_path_rate", drop_path_rate)
        psa = FusedPSAModule if fused else PSAModule
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = norm_layer(planes)
        self.conv2 = psa(
            planes,
            planes,
            conv_kernels,
            stride,
            conv_groups,
            reduction=reduction,
            dilation=dilation,
        )
        self.bn2 = norm_layer(planes)
        self.conv3 = nn.Conv2d(planes, planes * expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * expansion)
        self.relu = make_activation(act_layer)
        self.downsample = downsample
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(self, self._maps, x) if self.grad_checkpointing else self._maps(x)

    def _maps(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.drop_path_rate and self.training:
            out = _drop_path(out, self.drop_path_rate)
        out += identity
        return cast(Tensor, self.relu(out))

    def extra_repr(self) -> str:
        return f"drop_path_rate={self.drop_path_rate:.3g}" if self.drop_path_rate else ""


def _drop_path(x: Tensor, rate: float) -> Tensor:
    """x [N, C, H, W] with random samples set to zero, and the others scaled to the same mean."""
    kept = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - rate)
    return x * kept.div_(1 - rate)


def make_stage(
    inplanes: int,
    planes: int,
    stride: int,
    dilations: tuple[int, int],
    drop_path_rates: Sequence[float],
    options: BlockOptions,
) -> nn.Sequential:
    """A block for each of `drop_path_rates`; the first has `stride`, and a downsample if needed.

    `dilations` are those of the first block and of the others.
    """
    outplanes = planes * options["expansion"]
    downsample = None
    # where dilation replaces a stride, the same weights must fit
    if stride != 1 or dilations[0] != dilations[1] or inplanes != outplanes:
        downsample = nn.Sequential(
            nn.Conv2d(inplanes, outplanes, 1, stride=stride, bias=False),
            options["norm_layer"](outplanes),
        )
    first, *others = drop_path_rates
    stage = nn.Sequential(
        EPSABlock(
            inplanes,
            planes,
            stride,
            downsample,
            dilation=dilations[0],
            drop_path_rate=first,
            **options,
        )
    )
    for rate in others:
        stage.append(
            EPSABlock(outplanes, planes, dilation=dilations[1], drop_path_rate=rate, **options)
        )
    return stage
