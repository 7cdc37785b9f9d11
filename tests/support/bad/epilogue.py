"""What psa_attention and psa_forward refuse of an epilogue."""

import torch
from support.cases import BY_NAME, make_inputs
from support.epilogue import factors
from support.errors import HERE, Arguments, Refusals, at, on_meta, raising
from support.modules import arguments, build, image
from torch import Tensor

from epsa_fused import PSAModule

ATTENTION = torch.ops.epsa_fused.psa_attention.default
MODULE = torch.ops.epsa_fused.psa_forward.default


def named(*arguments: object) -> Arguments:
    """The last three are the epilogue's."""
    names = [f"argument_{i}" for i in range(len(arguments) - 3)]
    return dict(zip((*names, "scale", "shift", "relu"), arguments, strict=True))


def attention(device: str) -> Arguments:
    inputs = make_inputs(BY_NAME["odd"], torch.float32, device=device)
    return named(*inputs.args, True, None, *factors(15, torch.float32, device), True)


def module(device: str) -> Arguments:
    psa, x = build("stage3", PSAModule).to(device), image("stage3").to(device)
    return named(*arguments(psa, x), None, True, *factors(256, torch.float32, device), True)


BAD = raising(
    ValueError,
    {
        "scale_alone": (
            at("shift", lambda t: None),
            r"scale is given and shift is not, expected both or none",
        ),
        "shift_alone": (
            at("scale", lambda t: None),
            r"shift is given and scale is not, expected both or none",
        ),
        "length": (
            at("scale", lambda t: t[1:]),
            r"scale has shape \[\d+\], expected \[\d+\] \(\[S\*C\]\)",
        ),
        "rank": (
            at("shift", lambda t: t[:, None]),
            r"shift has shape \[\d+, 1\], expected \[\d+\] \(\[S\*C\]\)",
        ),
    },
) | raising(
    TypeError,
    {
        "dtype": (
            at("shift", Tensor.double),
            r"shift has dtype Double, expected Float, the accumulation type of Float features",
        ),
        "half": (at("scale", Tensor.bfloat16), r"scale has dtype BFloat16, expected Float"),
    },
)
BAD |= raising(
    RuntimeError,
    {
        f"{name}_device": (at(name, on_meta), rf"{name} is on meta, expected {HERE}, the device of")
        for name in ("scale", "shift")
    },
)
SUITES = {
    "psa_attention_epilogue": Refusals(
        ATTENTION, attention, BAD, ("cpu", "cuda"), differentiable=False
    ),
    "psa_forward_epilogue": Refusals(MODULE, module, BAD, differentiable=False),
}
