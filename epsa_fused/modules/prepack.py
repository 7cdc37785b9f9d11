"""prepack(): the weights of all fused modules of a model packed once, for serving on the CPU."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from .fused import FusedPSAModule

_Model = TypeVar("_Model", bound=nn.Module)


def prepack(model: _Model, *args: object, **kwargs: object) -> _Model:
    """Call :meth:`FusedPSAModule.prepack` of every fused module in `model`.

    Args:
        model: in eval mode, on the CPU; may be compiled.
        args, kwargs: of one call of the model, of the size that will be served; it is called
            with them to learn the sizes of its maps. Modules it does not reach are left as they
            are.

    Returns:
        model. :func:`unpack`, `model.train()` and `model.load_state_dict()` undo it.

    Raises:
        ValueError: if the call reached no FusedPSAModule; RuntimeError: in training mode; others
            as the modules' own prepack raises them. This call has packed no module then.
    """
    sizes: dict[FusedPSAModule, tuple[int, int]] = {}

    def record(module: FusedPSAModule, args: tuple, kwargs: dict) -> None:
        sizes[module] = tuple((args[0] if args else kwargs["x"]).shape[2:])

    fused = [m for m in model.modules() if isinstance(m, FusedPSAModule)]
    if model.training or any(m.training for m in fused):
        raise RuntimeError("prepack: expected a model in eval mode, got one in training mode")
    hooks = [m.register_forward_pre_hook(record, with_kwargs=True) for m in fused]
    try:
        # a compiled model that ran before would not call the hooks
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    if not sizes:
        raise ValueError(
            f"prepack: expected a model whose call reaches a FusedPSAModule, got "
            f"{type(model).__name__} with {len(fused)} of them, none of which was called; "
            "epsa_fused.fuse() puts them in the place of other PSA modules"
        )
    try:
        for module, size in sizes.items():
            module.prepack(*size)
    except Exception:
        unpack(model)
        raise
    return model


def unpack(model: _Model) -> _Model:
    """Undo :func:`prepack`."""
    for module in model.modules():
        if isinstance(module, FusedPSAModule):
            module.unpack()
    return model
