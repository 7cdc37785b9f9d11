"""Convolutions with the sum and the ReLU behind them in one call of oneDNN.

torch.compile uses the same operators of PyTorch. Here they serve without a compiler.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .graph import called, finish, is_relu, only_user, put, shape_of

_SUMS = (operator.add, operator.iadd, torch.add)
_SUM_METHODS = ("add", "add_")
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")


class PointwiseConv2d(nn.Module):
    """relu(conv(x) + other), where sum and ReLU may be absent.

    Args:
        conv: a plain nn.Conv2d, on the CPU, in float32 or bfloat16. Its weight is copied into the
            order that oneDNN prefers for inputs of `input_size`; other sizes work too.
        relu: whether a ReLU follows.
        input_size: of x [N, C, H, W].
    """

    def __init__(self, conv: nn.Conv2d, relu: bool, input_size: list[int]) -> None:
        super().__init__()
        self._description = repr(conv) + (", relu" if relu else "")
        self._relu = relu
        self._out_channels = conv.out_channels
        padding = cast(tuple[int, int], conv.padding)
        settings = ([*padding], [*conv.stride], [*conv.dilation], conv.groups)
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        # an image's size plus the first, divided by the second, rounded down, plus one
        self._sizes = [
            (2 * p - r - 1, s) for p, r, s in zip(padding, reach, conv.stride, strict=True)
        ]
        with torch.no_grad():
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                conv.weight.detach(), *settings, input_size
            )
            bias = None if conv.bias is None else conv.bias.detach().clone()
        # no buffers: neither copies nor state_dicts can hold such weights
        arguments = (weight, bias, *settings)
        operators = torch.ops.mkldnn._convolution_pointwise
        self._alone, self._with_sum = operators.default, operators.binary
        self._arguments: tuple[Any, ...] = (*arguments, "relu" if relu else "none", [], "")
        self._arguments_of_conv: tuple[Any, ...] = (*arguments, "none", [], "")
        self._arguments_with_sum: tuple[Any, ...] = (
            *arguments,
            "add",
            1.0,
            "relu" if relu else None,
            [],
            None,
        )

    def extra_repr(self) -> str:
        return self._description

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if other is None:
            return cast(Tensor, self._alone(x, *self._arguments))
        # torch before 2.13 has no sum of maps of one pixel.
        if other.shape == self._shape_of_output(x) and other.shape[2:].numel() > 1:
            return cast(Tensor, self._with_sum(x, other, *self._arguments_with_sum))
        # Other sizes than the example's may broadcast, which oneDNN's sum leaves out.
        total = self._alone(x, *self._arguments_of_conv) + other
        return torch.relu(total) if self._relu else cast(Tensor, total)

    def _shape_of_output(self, x: Tensor) -> tuple[int, ...]:
        sizes = zip(x.shape[2:], self._sizes, strict=True)
        return (
            x.shape[0],
            self._out_channels,
            *((size + more) // stride + 1 for size, (more, stride) in sizes),
        )


def why_not_available(dtype: torch.dtype) -> str | None:
    """The reason why oneDNN has no packed layers of this dtype here, or None."""
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    ):
        return "this PyTorch lacks oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 for this processor"
    return None


def fuse_pointwise(graph_module: GraphModule) -> int:
    """Put a :class:`PointwiseConv2d` in the place of each plain convolution, sum and ReLU.

    Args:
        graph_module: changed in place; each node's meta["tensor_meta"] tells its shape, as
            torch.fx.passes.shape_prop does.

    Returns:
        The number of convolutions that were replaced.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        conv = called(graph_module, node, nn.Conv2d)
        if conv is not None and _is_taken(conv) and len(shape_of(node)) == 4:
            _replace(graph_module, node, conv)
            count += 1
    finish(graph_module)
    return count


def _is_taken(conv: nn.Conv2d) -> bool:
    return (
        conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.weight.device.type == "cpu"
    )


def _replace(graph_module: GraphModule, node: Node, conv: nn.Conv2d) -> None:
    chain, other = [node], None
    total = only_user(node)
    has_sum = total is not None and _is_sum(total, node)
    if has_sum:
        chain.append(cast(Node, total))
    relu = only_user(chain[-1])
    has_relu = relu is not None and is_relu(graph_module, relu)
    if has_relu:
        chain.append(cast(Node, relu))
    if _changes_something_else(graph_module, chain):
        chain, has_sum, has_relu = [node], False, False
    if has_sum:
        other = next(arg for arg in cast(Node, total).args if arg is not node)
    module = PointwiseConv2d(conv, has_relu, list(shape_of(cast(Node, node.args[0]))))
    call = put(graph_module, f"{node.target}_pointwise", module, chain[-1], chain)
    if other is not None:
        call.args = (*call.args, other)


def _changes_something_else(graph_module: GraphModule, chain: list[Node]) -> bool:
    """Whether a node between those of `chain` works in place, on a tensor of another node.

    The one call that stands for the chain would read that tensor later, or earlier.
    """
    node = chain[0]
    while node is not chain[-1]:
        node = node.next
        if node in chain:
            continue
        name = getattr(node.target, "__name__", str(node.target))
        module = graph_module.get_submodule(name) if node.op == "call_module" else None
        in_place = (
            getattr(module, "inplace", False)
            or node.kwargs.get("inplace", False)
            or (node.op != "call_module" and (name.endswith("_") or name in _IN_PLACE))
            or "out" in node.kwargs
        )
        if in_place and not (node.args and node.args[0] in chain):
            return True
    return False


def _is_sum(node: Node, conv: Node) -> bool:
    """Whether `node` adds to the convolution a different tensor of the same shape and dtype."""
    is_add = (node.op == "call_function" and node.target in _SUMS) or (
        node.op == "call_method" and node.target in _SUM_METHODS
    )
    if not is_add or node.kwargs or len(node.args) != 2:
        return False
    others = [arg for arg in node.args if arg is not conv]
    if len(others) != 1 or not isinstance(others[0], Node):
        return False
    meta = [n.meta.get("tensor_meta") for n in (conv, others[0])]
    if any(not isinstance(getattr(m, "shape", None), torch.Size) for m in meta):
        return False
    a, b = cast(list[Any], meta)
    # A sum into the other tensor would be seen by all that share its memory.
    in_place = node.target is operator.iadd or node.target == "add_"
    safe = not in_place or node.args[0] is conv
    return bool(a.shape == b.shape and a.dtype == b.dtype and safe)
