"""Linear layers of bfloat16 with weights that oneDNN packed.

torch.compile uses the same operator of PyTorch. Here it serves without a compiler.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .graph import called, finish, put, shape_of

# PyTorch leaves so many products of bfloat16 to loops of its own, which then beat a call of oneDNN.
_FEW_PRODUCTS = 16**3


class PackedLinear(nn.Module):
    """A linear layer as one call of oneDNN.

    Args:
        linear: a plain nn.Linear, on the CPU, in bfloat16. Its weight is copied into the order
            that oneDNN prefers for `rows`; other numbers work too.
        rows: of the input, which is [..., in_features].
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self._description = repr(linear)
        self._in_features = linear.in_features
        self._operator = torch.ops.mkldnn._linear_pointwise.default
        with torch.no_grad():
            weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
            bias = None if linear.bias is None else linear.bias.detach()
        # no buffers: neither copies nor state_dicts can hold such weights
        self._arguments: tuple[Any, ...] = (weight, bias, "none", [], "")

    def extra_repr(self) -> str:
        return self._description

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self._in_features:  # oneDNN's message would not name the sizes
            raise RuntimeError(
                f"PackedLinear: expected x of {self._in_features} features, got {list(x.shape)}"
            )
        return cast(Tensor, self._operator(x, *self._arguments))


def pack_linear(graph_module: GraphModule) -> int:
    """Put a :class:`PackedLinear` in the place of each plain linear layer of bfloat16.

    PyTorch packs a weight of bfloat16 in each call. One of float32 stays where it is, and few rows,
    such as a classifier's, are slower by oneDNN. So those layers are left alone.

    Args:
        graph_module: changed in place; each node's meta["tensor_meta"] tells its shape, as
            torch.fx.passes.shape_prop does.

    Returns:
        The number of layers that were replaced.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        linear = called(graph_module, node, nn.Linear)
        if linear is None or linear.weight.dtype != torch.bfloat16:
            continue
        rows = math.prod(shape_of(cast(Node, node.args[0]))[:-1])
        if rows * linear.weight.numel() > _FEW_PRODUCTS:
            put(graph_module, f"{node.target}_packed", PackedLinear(linear, rows), node, [node])
            count += 1
    finish(graph_module)
    return count
