"""why_not_fused(): the answer to "why is this slow?"."""

from __future__ import annotations

from torch import nn

from .fused import FusedPSAModule
from .split import FusedSplitPSA


def why_not_fused(module: nn.Module) -> str | None:
    """The reason why a call of `module` would now call layers, not only fused operators; or None.

    A layer is called where a call may mean something else than its weights and settings: with hooks
    on it or on all modules, a replaced or wrapped layer, a forward of its own, or a sharded
    parameter or another subclass of Tensor. So it is under `torch.func` transforms, in forward-mode
    differentiation and under the TorchScript-based ONNX exporter. `repr(module)` shows the reason
    too. A tracer of torch.fx and an input of a subclass belong to one call: no reason tells them.

    A convolution that the CPU's operator does not take is a reason as well. It has another padding
    mode, settings that differ in height and width, or a stride of its own. So is a branch
    of :class:`epsa_fused.modules.FusedAdoptedPSA` that is more than a convolution. The branches are
    then called, and the attention step stays fused. Nothing warns of that.

    Args:
        module: a :class:`FusedPSAModule` or :class:`FusedSplitPSA`.

    Raises:
        TypeError: `module` is another one. Ask for each fused module of `model.modules()`.
    """
    if not isinstance(module, FusedPSAModule | FusedSplitPSA):
        raise TypeError(
            "why_not_fused: expected a FusedPSAModule or a FusedSplitPSA, got "
            f"{type(module).__name__}; ask for each of them in model.modules()"
        )
    return module._why_not_fused()
