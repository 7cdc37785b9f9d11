"""BatchNorm folded into the layer before it, in a graph of torch.fx."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..modules import FusedPSAModule
from .epilogue import with_epilogue
from .graph import called, finish, foldable_norm, is_relu, only_user, put


def fold_batch_norms(graph_module: GraphModule) -> list[str]:
    """Fold each BatchNorm2d, in eval mode, into the layer whose only user it is.

    A convolution gets other weights. A fused PSA module computes the BatchNorm in the pass that
    writes its output, and the ReLU behind the BatchNorm too.

    Args:
        graph_module: changed in place. The layers themselves stay as they are: copies take their
            places.

    Returns:
        The names of the BatchNorms that are gone.
    """
    folded = []
    nodes: list[Node] = list(graph_module.graph.nodes)
    for node in nodes:
        norm = foldable_norm(graph_module, node)
        before = node.args[0] if norm is not None else None
        if norm is None or not isinstance(before, Node) or len(before.users) > 1:
            continue
        if _fold(graph_module, before, node, norm):
            folded.append(str(node.target))
    finish(graph_module)
    return folded


def _fold(graph_module: GraphModule, before: Node, node: Node, norm: nn.BatchNorm2d) -> bool:
    """Fold the BatchNorm of `node` into the layer of `before`, if it can take it."""
    chain = [before, node]
    layer: nn.Module
    conv = called(graph_module, before, nn.Conv2d)
    psa = called(graph_module, before, FusedPSAModule)
    if conv is not None:
        layer = fuse_conv_bn_eval(conv, norm)
    elif psa is not None and psa._why_not_fused() is None:
        relu = only_user(node)
        if relu is not None and is_relu(graph_module, relu):
            chain.append(relu)
        layer = with_epilogue(psa, norm, relu=len(chain) == 3)
    else:
        return False
    # The call stands where the layer's stood: what it reads may change later.
    put(graph_module, f"{before.target}_normalised", layer, before, chain)
    return True
