"""prepack(): pack the weights of all fused modules of a model once, for serving on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .._checks import check_flag, check_module, check_tensor
from .._library import COMPARED_WEIGHTS
from .fused import FusedPSAModule
from .split import FusedSplitPSA

_Model = TypeVar("_Model", bound=nn.Module)


def prepack(model: _Model, *args: object, frozen: bool = False, **kwargs: object) -> _Model:
    """Call :meth:`FusedPSAModule.prepack` of every fused module in `model`.

    The model is called once with `args` and `kwargs`, which shows the sizes of its maps. Modules
    that this call does not reach stay as they are. So do modules that are fused in part, whose
    branches are called. Unless `frozen`, those of more than 2**18 weights do too: to compare so
    many in each call costs more than to pack them.

    Args:
        model: in eval mode, on the CPU; it may be compiled.
        args, kwargs: of one call of the model, with inputs of the size that will be served.
        frozen: your promise that the weights stay as they are, which saves comparing them.

    Returns:
        model. :func:`unpack`, `model.train()` and `model.load_state_dict()` undo the packing.

    Raises:
        ValueError: all modules are fused in part, or the call reached none that can be packed.
        RuntimeError: the model is in training mode.

    Other errors come from the modules' own prepack. After an error no module is packed.
    """
    check_module("prepack: model", model)
    check_flag("prepack: frozen", frozen)
    sizes: dict[FusedPSAModule, tuple[int, int]] = {}

    def record(module: FusedPSAModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("x")
        check_tensor(f"prepack: x of {type(module).__name__}", x)
        height, width = cast(Tensor, x).shape[2:]
        sizes[module] = height, width

    found = [m for m in model.modules() if isinstance(m, FusedPSAModule | FusedSplitPSA)]
    fused = [m for m in found if isinstance(m, FusedPSAModule) and m._has_convs_as_branches()]
    if model.training or any(m.training for m in fused):
        raise RuntimeError("prepack: expected a model in eval mode, got one in training mode")
    if found and not fused:
        raise ValueError(
            "prepack: expected a FusedPSAModule with convolutions as branches, got "
            f"{type(model).__name__} with {len(found)} fused in part: their branches are called, "
            "and no operator has weights to pack"
        )
    hooks = [m.register_forward_pre_hook(record, with_kwargs=True) for m in fused]
    try:
        # A compiled model that ran before would not call the hooks.
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
    if not frozen and not any(m._may_be_compared() for m in sizes):
        raise ValueError(
            f"prepack: expected frozen=True, or a module of at most {COMPARED_WEIGHTS} weights, "
            "got larger ones only: to compare them in each call costs more than to pack them"
        )
    try:
        for module, size in sizes.items():
            if frozen or module._may_be_compared():
                _method(module, "prepack")(*size, frozen=frozen)
    except BaseException:  # an interruption too leaves no module packed; the error goes on
        unpack(model)
        raise
    return model


def unpack(model: _Model) -> _Model:
    """Undo :func:`prepack`; returns model."""
    check_module("unpack: model", model)
    for module in model.modules():
        if isinstance(module, FusedPSAModule):
            _method(module, "unpack")()
    return model


def _method(module: FusedPSAModule, name: str) -> Callable[..., FusedPSAModule]:
    """The module's method, where a child has its name, too."""
    own = vars(module).get(name)
    return partial(getattr(type(module), name), module) if own is None else own
