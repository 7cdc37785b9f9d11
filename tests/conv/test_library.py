"""Branches that torch's own convolution computes: in forms in which it is right."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

OP = torch.ops.epsa_fused.spc_conv.default

# torch's weight gradient of strided 1x1 convolutions reads beyond channels_last images of few
# channels. MALLOC_PERTURB_ has glibc fill such memory, or it may happen to hold zeros.
PROGRAM = """
import torch
import epsa_fused
from conv import test_library
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for channels, outputs in ((2, 3), (2, 6), (2, 16), (3, 3), (3, 6), (9, 6)):
        test_library.check_weight_grad(channels, outputs, dtype)
print("right")
"""


def make(channels: int, outputs: int, dtype: torch.dtype, kernel=1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels * outputs)
    x = torch.randn(3, channels, 8, 14, generator=generator).to(dtype)
    weight = torch.randn(outputs, channels, kernel, kernel, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last), weight


def grads(x: Tensor, weight: Tensor, stride: int, padding: int):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    ((feat,), _) = OP(x, [weight], [1], stride, [padding], [1])
    return feat, torch.autograd.grad(feat, (x, weight), torch.ones_like(feat))


def check_weight_grad(channels: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight = make(channels, outputs, dtype)
    _, expected = grads(x.double(), weight.double(), 2, 0)
    for _ in range(3):
        _, actual = grads(x, weight, 2, 0)
        for given, right in zip(actual, expected, strict=True):
            # sums of at most 84 products, each of about 1
            tolerance = 84 * 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(given.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is glibc's")
@pytest.mark.parametrize("threads", (1, 2))
def test_strided_1x1_weight_gradients_stay_in_their_memory(threads):
    environment = os.environ | {"MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert result.stdout == "right\n", (result.returncode, result.stderr[-2000:])


SETTINGS = list(itertools.product((1, 3), (0, 1, 2), (1, 2, 3)))


@pytest.mark.parametrize(("kernel", "padding", "stride"), SETTINGS)
def test_the_same_convolution(kernel, padding, stride):
    """A 1x1 kernel with a stride is the one that is computed from fewer pixels."""
    x, weight = make(5, 7, torch.float64, kernel)
    feat, (grad_x, grad_weight) = grads(x, weight, stride, padding)
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.nn.functional.conv2d(x, weight, stride=stride, padding=padding)
    torch.testing.assert_close(feat, expected)
    given = torch.autograd.grad(expected, (x, weight), torch.ones_like(expected))
    torch.testing.assert_close((grad_x, grad_weight), given)


@pytest.mark.parametrize(("padding", "stride"), ((0, 2), (1, 3)))
def test_second_derivatives_of_a_strided_1x1_kernel(padding, stride):
    x, weight = make(2, 3, torch.float64)

    def feats(x, weight):
        return OP(x, [weight], [1], stride, [padding], [1])[0][0]

    inputs = (x[:1].clone().requires_grad_(), weight.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(feats, inputs)
