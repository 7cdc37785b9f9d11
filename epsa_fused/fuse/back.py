"""unfuse(): put the plain modules back, the inverse of fuse()."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from .._checks import check_flag, check_module
from ..modules import FusedPSAModule, FusedSplitPSA, SplitPSA
from ..modules.adopted import AdoptedPSA, FusedAdoptedPSA
from ..reference import PSAModule
from .held import Held
from .hooks import hooks_that_stay_behind
from .tree import replace, same_tensors_in_another_tree, why_not_compiled

_Model = TypeVar("_Model", bound=nn.Module)
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    FusedPSAModule: PSAModule,
    FusedSplitPSA: SplitPSA,
    FusedAdoptedPSA: AdoptedPSA,
}
# What only a fused module needs. The setting of Winograd's method waits for the next fuse().
_DROPPED = ("save_output", "_packed", "_frozen", "_compiled_call_impl")
# What a module may have set on itself, in place of its class's.
_OVERRIDES = ("forward", "attention")
_OWN = "of a subclass or with methods of its own"


def unfuse(model: _Model, *, inplace: bool = False) -> _Model:
    """Replace every fused module in `model` by a plain one with the same parameters.

    :class:`epsa_fused.FusedPSAModule` becomes :class:`epsa_fused.PSAModule`, and
    :class:`epsa_fused.FusedSplitPSA` becomes :class:`epsa_fused.SplitPSA`. What was adopted from
    another class becomes :class:`epsa_fused.modules.AdoptedPSA`. Those call their layers and need
    no operator of this package, for tools that cannot take one. :func:`epsa_fused.fuse` makes them
    fused again.

    Layers stay the same objects, also replaced and wrapped ones. So parameters, dtype, device,
    training flags, hooks, `state_dict` keys and optimizers stay. `save_output` and packed weights
    are dropped, and a setting of `winograd` waits for the next fuse().

    Args:
        model: any module. A model in DistributedDataParallel needs `inplace`.
        inplace: whether to change `model` itself. Otherwise it stays unchanged, and the result is
            another module tree with the SAME parameters and buffers.

    Returns:
        The plain model, without `fuse_report`. If `model` is itself a fused module, the result is
        the plain module.

    Warns:
        UserWarning: there is nothing to replace; or a fused module is left alone, as it is of a
            subclass, or has a forward or an attention of its own, or is held where nothing can
            replace it; or a module's `compile()` was called, and the result needs another call.

    Raises:
        TypeError: `model` is no module.
        ValueError: `inplace`, and `model` itself is to be replaced.
        RuntimeError: a fused module has hooks around its `state_dict`, which cannot be kept.
            Without `inplace` also for DistributedDataParallel, and if it cannot be copied. The
            model is unchanged then.
    """
    check_module("unfuse: model", model)
    check_flag("inplace", inplace)
    before = dict(model.named_modules())
    why_stays = Held(model, closed=filter(_is_fused, before.values())).why_stays
    if not inplace:
        model = same_tensors_in_another_tree(model, "unfuse")
    plain: dict[nn.Module, nn.Module] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        if not _is_fused(module):
            continue
        if type(module) not in _PLAIN or not module.__dict__.keys().isdisjoint(_OVERRIDES):
            left.append(f"{name or type(module).__name__}, {_OWN}")
            continue
        if name in why_stays:
            left.append(f"{name}: {why_stays[name]}")
            continue
        lost = hooks_that_stay_behind([module])
        if lost:
            raise RuntimeError(
                f"unfuse: {name or 'the model'} has hooks in {', '.join(lost)}, which belong to "
                "the module that they were registered on: remove them first. Nothing was changed."
            )
        plain[module] = _plain(module)
    model = replace(model, plain, "unfuse", inplace)
    model.__dict__.pop("fuse_report", None)
    if left:
        warnings.warn(
            f"unfuse: left alone {'; '.join(left)}",
            UserWarning,
            stacklevel=2,
        )
    elif not plain:
        warnings.warn(
            f"unfuse: {type(model).__name__} has no fused module and is unchanged",
            UserWarning,
            stacklevel=2,
        )
    not_compiled = why_not_compiled(model, before)
    if not_compiled is not None:
        warnings.warn(f"unfuse: {not_compiled}", UserWarning, stacklevel=2)
    return model


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, FusedPSAModule | FusedSplitPSA)


def _plain(module: nn.Module) -> nn.Module:
    """A plain module with the attributes of `module`: the same layers and containers of hooks."""
    fused = type(module)
    plain = _PLAIN[fused].__new__(_PLAIN[fused])
    state = {name: v for name, v in module.__dict__.items() if name not in _DROPPED}
    if state.get("winograd", False) is None:
        del state["winograd"]
    plain.__dict__.update(state, _modules=dict(module._modules))
    return plain
