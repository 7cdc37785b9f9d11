"""The hooks of a module that fuse() and unfuse() replace: which go along, and which cannot."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# nn.Module's containers of hooks around a call. What comes in the module's place takes them over.
CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# Hooks around the state_dict are bound to the module that they were registered on.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def hand_on(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the hooks of `old`: the same containers, so that handles keep working."""
    for hooks in (*CALL_HOOKS, "_is_full_backward_hook"):
        new.__dict__[hooks] = old.__dict__[hooks]


def hooks_that_stay_behind(replaced: Iterable[nn.Module]) -> list[str]:
    """The containers of hooks that mean nothing on what comes in the place of these modules."""
    lost = []
    for module in replaced:
        lost += _hooks(module, _STATE_HOOKS)
        # Non-full backward hooks hang on the autograd node of the old module's output.
        if module._backward_hooks and not module._is_full_backward_hook:
            lost.append("_backward_hooks")
    return lost


def refuse_hooks(name: str, old: nn.Module, new: nn.Module, called: Iterable[nn.Module]) -> None:
    """Raise RuntimeError for hooks that `new` in the place of `old` cannot keep.

    Args:
        name: of `old`, for messages.
        old, new: the modules.
        called: what `new` calls of the modules in `old`, with all that they hold.
    """
    inside = {m for module in called for m in module.modules()}
    for path, layer in old.named_modules(prefix=name):
        read = layer is not old and layer not in inside and not isinstance(layer, nn.ModuleList)
        if read and _hooks(layer, CALL_HOOKS):
            raise RuntimeError(
                f"fuse: {path} has hooks, and the operators do not call it: "
                "remove them first. Nothing was changed."
            )
    kept = set(new.modules())
    lost = hooks_that_stay_behind(m for m in old.modules() if m not in kept)
    if lost:
        raise RuntimeError(
            f"fuse: {name or 'the model'} has hooks in {', '.join(lost)}, which belong to the "
            "module that they were registered on: remove them first. Nothing was changed."
        )


def _hooks(module: nn.Module, kinds: tuple[str, ...]) -> list[str]:
    return [kind for kind in kinds if getattr(module, kind, None)]
