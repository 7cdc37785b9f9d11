"""The PSA modules that the tests build, their images, and the operators' arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from support.cases import WEIGHT_NAMES, Inputs
from support.maths import gradients
from torch import Tensor, nn

from epsa_fused import _C, FusedPSAModule

KERNELS, GROUPS = (3, 5, 7, 9), (1, 4, 8, 16)


@dataclass(frozen=True)
class ModuleCase:
    """x [N, inplans, H, W], and the module's branches of planes / branches channels each."""

    inplans: int
    planes: int
    x: tuple[int, int, int]  # N, H, W
    kernels: tuple[int, ...] = KERNELS
    groups: tuple[int, ...] = GROUPS
    stride: int = 1

    def computed_in_place(self) -> bool:
        """Whether no branch is computed by PyTorch's library."""
        methods = [
            _C.conv_plan(
                in_channels=self.inplans,
                out_channels=self.planes // len(self.kernels),
                groups=g,
                kernel=(k, k),
                height=self.x[1],
                width=self.x[2],
                stride=self.stride,
                padding=k // 2,
            )["method"]
            for k, g in zip(self.kernels, self.groups, strict=True)
        ]
        return "library" not in methods


EIGHT = {"kernels": (1, 3, 3, 5, 5, 7, 9, 11), "groups": (1, 1, 2, 4, 8, 4, 2, 1)}
CASES = {
    "stage1": ModuleCase(64, 64, (3, 11, 56)),
    "stage2": ModuleCase(128, 128, (2, 28, 28)),
    "stage2_first": ModuleCase(128, 128, (2, 28, 28), stride=2),
    "stage3": ModuleCase(256, 256, (3, 14, 14)),
    "stage4": ModuleCase(512, 512, (1, 7, 7)),
    "stride_2": ModuleCase(128, 128, (2, 9, 14), stride=2),
    "large": ModuleCase(128, 128, (2, 9, 10), (3, 5, 5, 7), (32, 32, 32, 32)),
    "two_branches": ModuleCase(32, 32, (5, 6, 5), (1, 3), (1, 2)),
    "eight_branches": ModuleCase(64, 128, (2, 5, 19), **EIGHT),
    "one_pixel": ModuleCase(64, 64, (4, 1, 1)),
    "a_branch_for_the_library": ModuleCase(24, 36, (2, 8, 9), (3, 3, 5), (1, 12, 3)),
    "stride_3": ModuleCase(32, 64, (2, 10, 11), stride=3),
    "empty": ModuleCase(64, 64, (0, 7, 7)),
}


def build(
    name: str,
    cls: type[nn.Module] = FusedPSAModule,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> nn.Module:
    """A module of a case, of the same weights whatever the class and dtype."""
    torch.manual_seed(0)
    case = CASES[name]
    settings = (case.kernels, case.stride, case.groups)
    return cls(case.inplans, case.planes, *settings, reduction=4, **options).to(dtype)


def image(
    name: str,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    n, h, w = CASES[name].x
    x = torch.randn(n, CASES[name].inplans, h, w, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).to(memory_format=memory_format)


def convolutions_of(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for name, layer in module.named_children() if name.startswith("conv_")]


def se_weights(module: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fc1, fc2 = module.se.fc1, module.se.fc2
    return fc1.weight, fc1.bias, fc2.weight, fc2.bias


def convolution_arguments(module: nn.Module) -> tuple:
    """Weights and settings, as the operators take them."""
    convs = convolutions_of(module)
    return (
        [c.weight for c in convs],
        [c.groups for c in convs],
        convs[0].stride[0],
        [c.padding[0] for c in convs],
        [c.dilation[0] for c in convs],
    )


def arguments(module: nn.Module, x: Tensor) -> tuple:
    """All arguments of psa_forward and psa_save_output; no tensor asks for its gradient."""
    weights, *settings = convolution_arguments(module)
    se = [w.detach() for w in se_weights(module)]
    return x, [w.detach() for w in weights], *settings, *se, module.branch_order == "reversed"


def gradient_sizes(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """What each parameter's gradient would be if nothing in it cancelled (maths.py)."""
    convs = convolutions_of(module)
    inputs = Inputs([c(x) for c in convs], list(se_weights(module)))
    result = gradients(inputs.double(), grad, None, absolute=True)
    sizes = {f"se.{name.replace('_', '.')}": result[f"grad of {name}"] for name in WEIGHT_NAMES}
    for i, conv in enumerate(convs):
        df = result[f"grad of feats[{i}]"]
        sizes[f"conv_{i + 1}.weight"] = torch.nn.grad.conv2d_weight(
            x.abs(), conv.weight.shape, df, conv.stride, conv.padding, groups=conv.groups
        )
    return sizes
