"""What the passes over a graph of torch.fx share: which module a node calls, and how to put one."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from ..modules.layers import why_layer_called

_Kind = TypeVar("_Kind", bound=nn.Module)

_RELUS = (F.relu, torch.relu, torch.relu_, F.relu_)
_RELU_METHODS = ("relu", "relu_")


def called(graph_module: GraphModule, node: object, kind: type[_Kind]) -> _Kind | None:
    """The module that `node` calls, if it computes what `kind` does and nothing else, or None."""
    if not isinstance(node, Node) or node.op != "call_module" or node.kwargs:
        return None
    module = graph_module.get_submodule(str(node.target))
    plain = why_layer_called(str(node.target), module, kind) is None
    return module if plain and isinstance(module, kind) and not is_parametrized(module) else None


def foldable_norm(graph_module: GraphModule, node: Node) -> nn.BatchNorm2d | None:
    """The BatchNorm2d that `node` calls, if it scales by fixed statistics, or None."""
    norm = called(graph_module, node, nn.BatchNorm2d)
    fixed = norm is not None and not norm.training and norm.running_mean is not None
    return norm if fixed else None


def is_relu(graph_module: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return called(graph_module, node, nn.ReLU) is not None
    plain = len(node.args) == 1 and set(node.kwargs) <= {"inplace"}
    return plain and (
        (node.op == "call_function" and node.target in _RELUS)
        or (node.op == "call_method" and node.target in _RELU_METHODS)
    )


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def shape_of(node: Node) -> tuple[int, ...]:
    """Of the tensor that `node` gives; torch.fx.passes.shape_prop has noted it."""
    return tuple(cast(Any, node.meta["tensor_meta"]).shape)


def put(
    graph_module: GraphModule, name: str, module: nn.Module, before: Node, chain: list[Node]
) -> Node:
    """Call `module` on the first node's input, in the place of a chain of nodes.

    Args:
        graph_module: gets the module under `name`, or a name like it that is free.
        module: takes the first node's arguments.
        before: the node before which the call stands.
        chain: each node is the only user of the one before it.

    Returns:
        The node of the call.
    """
    taken = {target for target, _ in graph_module.named_modules()}
    names = (f"{name}_{i}" if i else name for i in range(len(taken) + 1))
    free = next(candidate for candidate in names if candidate not in taken)
    graph_module.add_submodule(free, module)
    with graph_module.graph.inserting_before(before):
        result = graph_module.graph.call_module(free, chain[0].args)
    result.meta = dict(chain[-1].meta)
    chain[-1].replace_all_uses_with(result)
    for node in reversed(chain):
        graph_module.graph.erase_node(node)
    return result


def finish(graph_module: GraphModule) -> None:
    """Check a changed graph and compile its code."""
    graph_module.graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
