"""What a module has beside its forward, and a fused one in its place would not have."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

# What a class overrides that saves more than its parameters and buffers.
_STATE_METHODS = frozenset(
    (
        *("get_extra_state", "set_extra_state", "state_dict", "load_state_dict"),
        *("_save_to_state_dict", "_load_from_state_dict"),
    )
)
# What a trial has called, what describes a module, and what copies one of its own class.
_HARMLESS = frozenset(
    (
        *("__init__", "forward", "extra_repr", "__repr__", "_get_name", "__dir__"),
        *("__getstate__", "__setstate__"),
    )
)
_METHODS = [
    name for name, value in vars(nn.Module).items() if callable(value) and name not in _HARMLESS
]


def why_lost(module: nn.Module, new: nn.Module) -> str | None:
    """The reason why `new` in the place of `module` would lose something, or None."""
    tensors = _names_of_tensors(module) - _names_of_tensors(new)
    if tensors:
        names = ", ".join(sorted(tensors))
        return f"it has parameters or buffers that the fused one has not: {names}"
    return why_methods_lost(module, new) or _why_dropouts_lost(_gone(module, new))


def why_methods_lost(module: nn.Module, new: nn.Module) -> str | None:
    """The reason why `new` in the place of `module` would lose methods of its classes, or None.

    A train() that freezes layers may show in a trial, too, or be missed only later.
    """
    lost = {name: methods for name, m in _gone(module, new).items() if (methods := _own_methods(m))}
    saving = [name for name, methods in lost.items() if not _STATE_METHODS.isdisjoint(methods)]
    if saving:
        return f"{', '.join(saving)} saves or loads its state_dict in a way of its own"
    if lost:
        own = "; ".join(f"{name} has {', '.join(methods)}" for name, methods in lost.items())
        return f"it has methods of its own in place of nn.Module's, which would be lost: {own}"
    return None


def _gone(module: nn.Module, new: nn.Module) -> dict[str, nn.Module]:
    kept = set(new.modules())
    return {name or "it": m for name, m in module.named_modules() if m not in kept}


def _names_of_tensors(module: nn.Module) -> set[str]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, _ in (*parameters, *module.named_buffers(remove_duplicate=False))}


def _why_dropouts_lost(gone: Mapping[str, nn.Module]) -> str | None:
    """One that drops nothing has no part in a trial. A schedule may raise its rate later."""
    names = [
        name
        for name, m in gone.items()
        if "drop" in type(m).__name__.lower() and not m._modules  # DropPath and its like, too
    ]
    if not names:
        return None
    return (
        f"its {', '.join(names)} would be lost, and a later change of the rate would do nothing; "
        "it fuses with an nn.Identity in that place"
    )


def _own_methods(module: nn.Module) -> list[str]:
    own = vars(module)
    return [name for name in _METHODS if callable(own.get(name)) or _overrides(type(module), name)]


def _overrides(cls: type[nn.Module], name: str) -> bool:
    """Whether a class outside torch has this method of its own."""
    if getattr(cls, name) is getattr(nn.Module, name):
        return False
    owner = next(base for base in cls.__mro__ if name in vars(base))
    is_text = isinstance(vars(owner)[name], str | int | float)  # a label, say `type = "psa"`
    return not is_text and not owner.__module__.startswith("torch.")
