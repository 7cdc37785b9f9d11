"""Models and images for the tests of serving, and how good a served model must be."""

import copy

import torch
from support import published
from torch import nn

DTYPES = (torch.float32, torch.bfloat16)


def images(batch: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def with_statistics(model: nn.Module) -> nn.Module:
    """BatchNorms start as the identity, which folding could leave out without notice."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


class Net(nn.Module):
    """A foreign network around a PSA module of the published code."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.psa = published.PSAModule(channels, channels)
        self.norm = nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return (self.last(self.norm(self.psa(x)).relu()) + x).relu()


def plain(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).to(dtype)(x.to(dtype)).double()


def assert_as_good_as_the_model(served, model, x, dtype):
    exact, usual = plain(model, x, torch.float64), plain(model, x, dtype)
    allowed = 3 * (usual - exact).abs().max() + 8 * torch.finfo(dtype).eps * exact.abs().max()
    out = served(x)
    assert out.dtype == next(model.parameters()).dtype
    assert not out.requires_grad
    assert (out.double() - exact).abs().max() <= allowed


class Subclass(torch.Tensor):
    pass
