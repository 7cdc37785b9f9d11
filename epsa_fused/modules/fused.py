"""FusedPSAModule: the PSA module with fused convolutions and a fused attention step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from typing_extensions import Self

from .._arguments import ModuleArguments, SEArguments
from .._checks import check_flag, check_int, check_tensor
from .._library import COMPARED_WEIGHTS, HAS_CUDA, MAX_BRANCHES
from .._winograd import winograd_allowed
from ..functional import psa_attention
from ..reference import PSAModule, SEWeight, asks_for_attention, is_reversed
from .calling import warn_once, why_here
from .layers import (
    has_bias,
    is_plain,
    submodule,
    why_conv_not_taken,
    why_layer_called,
    why_not_plain,
    why_se_called,
)
from .tracing import NotScriptable, as_leaf

_CONV_NAMES = tuple(f"conv_{i + 1}" for i in range(MAX_BRANCHES))


class FusedPSAModule(NotScriptable, PSAModule):
    """Pyramid Squeeze Attention, fused: a drop-in for the published PSAModule.

    Constructor, `state_dict` keys and output are those of :class:`PSAModule` and of the published
    code. x [N, inplans, H, W] -> [N, planes, H', W'], in x's dtype.

    On the CPU the whole module is one operator, psa_forward. Without gradients the convolutions
    write into the output, and each sample is reweighted in place. With gradients the operator runs
    :func:`epsa_fused.convolution.spc_conv` and :func:`epsa_fused.psa_attention`. The operator needs
    convolutions of one stride. Other convolutions are called as layers.

    On a CUDA device the operator runs for bfloat16 and float16, also of autocast. Tensor cores
    compute its grouped convolutions: of stride 1, with kernels of 5, 7 and 9, and groups of 4 to
    256 channels with a quarter of outputs. PyTorch computes the others, and all gradients of
    convolutions. Other dtypes and devices call the layers. The attention step is fused there.

    The operators read the layers' weights, each once a call, and call no layer. Where a call of a
    layer may mean something else, :class:`PSAModule`'s own forward runs instead, which calls the
    layers: with hooks on a layer or on all modules, a replaced or wrapped layer, a forward of its
    own, a sharded parameter or another subclass of Tensor. So it does under `torch.func`
    transforms and in forward-mode differentiation. A UserWarning says so once for each module and
    reason, and `repr` shows the reason. :func:`epsa_fused.why_not_fused` tells it too. If only
    convolutions are concerned, the attention step stays fused.

    Args:
        inplans, planes, conv_kernels, stride, conv_groups, reduction, branch_order, dilation: as
            of :class:`PSAModule`.
        save_output: whether to keep the output for the backward pass, instead of the branches'
            maps. That halves the memory if the next layer keeps its input anyway, as BatchNorm
            and convolutions do. It needs the CPU's operator: forward raises NotImplementedError
            where the layers would be called with gradients, or where convolutions have biases. The
            next layer must not change the output in place: autograd raises an error then. In half
            precision the attention's gradient is computed from the rounded output. Also an
            attribute.
        winograd: whether Winograd's method may compute 3x3 convolutions on the CPU. None: as
            :func:`epsa_fused.set_winograd` says. Also an attribute.

    Raises:
        ValueError, TypeError: the module cannot be built; the message names the argument.
    """

    # The class has defaults too: modules pickled by an older version lack these attributes.
    save_output: bool = False
    winograd: bool | None = None
    _packed: Tensor | None = None
    _frozen: tuple[Tensor, ...] | None = None  # the weights that were packed, if they are frozen

    def __init__(
        self,
        inplans: int,
        planes: int,
        conv_kernels: Sequence[int] = (3, 5, 7, 9),
        stride: int = 1,
        conv_groups: Sequence[int] = (1, 4, 8, 16),
        *,
        reduction: int = 16,
        branch_order: str = "reversed",
        dilation: int = 1,
        save_output: bool = False,
        winograd: bool | None = None,
    ) -> None:
        super().__init__(
            inplans,
            planes,
            conv_kernels,
            stride,
            conv_groups,
            reduction=reduction,
            branch_order=branch_order,
            dilation=dilation,
        )
        check_flag("save_output", save_output)
        self.save_output = save_output
        winograd_allowed(winograd)  # checks it
        self.winograd = winograd

    def extra_repr(self) -> str:
        why = self._why_not_fused()
        states = (
            (", save_output=True" if self.save_output else "")
            + (f", winograd={self.winograd}" if self.winograd is not None else "")
            + (", prepacked" if self._packed is not None else "")
            + (f", not fused: {why}" if why is not None else "")
        )
        return super().extra_repr() + states

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x [N, inplans, H, W] -> [N, planes, H', W'].

        With `return_attention` also the attention [N, S, C], indexed by branch (not by slot), in
        float32 (float64 for float64). Both are differentiable. The call is as fused as without,
        but it packs weights itself that were packed ahead. Convolutions with biases run before the
        attention step, not with it.

        Raises:
            NotImplementedError: `save_output`, and the CPU's operator cannot compute the module; or
                `return_attention` beside it with gradients, which keep no map to differentiate.
        """
        asked = asks_for_attention("FusedPSAModule", return_attention)
        if isinstance(x, Proxy):
            leaf = as_leaf(self, x, asked)
            return super().forward(x, bool(asked)) if leaf is None else leaf
        check_tensor("FusedPSAModule: x", x)
        if self.save_output is not False:
            check_flag("FusedPSAModule: save_output", self.save_output)
        save_output = (
            self.save_output
            and torch.is_grad_enabled()
            and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        )
        why = why_not_plain("x", x) or self._why_called()
        if why is not None:
            if save_output:
                raise _no_save_output(why)
            warn_once(self, why)
            return super().forward(x, bool(asked))
        taken = x.device.type == "cpu" or _has_cuda_kernel(x)
        if save_output and x.device.type != "cpu":
            raise _no_save_output(f"x is on {x.device}")
        why = self._why_not_taken()
        if not taken or why is not None:
            if save_output:
                raise _no_save_output(cast(str, why))
            return self._fused_attention(self._feats(x), bool(asked))
        convs = cast(list[nn.Conv2d], self._convs())  # as _why_called has seen
        if save_output:
            for name, conv in zip(self._conv_names(), convs, strict=True):
                if has_bias(conv):
                    raise _no_save_output(f"{name} has a bias")
            if asked is True:
                raise _no_save_output("return_attention asks for the gradient of the attention")
            arguments, _ = self._arguments(x, convs)
            winograd = winograd_allowed(self.winograd)
            out, _, attention = torch.ops.epsa_fused.psa_save_output.default(*arguments, winograd)
            return (out, attention) if asked else out
        if asked:
            return self._call_for_attention(x, convs)
        return self._call_operator(x, convs)

    @overload
    def attention(self, feats: list[Tensor], return_attention: Literal[False] = ...) -> Tensor: ...
    @overload
    def attention(
        self, feats: list[Tensor], return_attention: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def attention(
        self, feats: list[Tensor], return_attention: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def attention(
        self, feats: list[Tensor], return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The attention step on the branches' maps, S x [N, C, H, W] -> [N, S*C, H, W].

        With `return_attention` also the attention [N, S, C].
        """
        why = self._why_attention_called()
        if why is not None:
            warn_once(self, why)
        if why is not None or not all(map(is_plain, feats)):
            return super().attention(feats, return_attention)  # torch.fx gets the layers, too
        return self._fused_attention(feats, return_attention)

    # ---- serving: weights packed ahead ----

    def prepack(self, height: int, width: int, *, frozen: bool = False) -> Self:
        """Pack the convolutions' weights once instead of in every call: for serving on the CPU.

        Calls without gradients use the packed copy. It takes about as much memory as the weights
        in float32, or twice that if output channels do not fill vectors.

        `train()`, `load_state_dict()`, :meth:`unpack`, moving and casting drop it. Copies, pickles
        and exported programs have none. Each call compares a 64-bit checksum of the weights, so no
        way of changing them gives an old result. Where they differ, and under autocast, which
        casts them, the call packs itself: prepack again then. A call without Winograd's method
        leaves weights unused that were packed for it.

        Args:
            height, width: of the maps x that will be served; other sizes work, maybe more slowly.
            frozen: your promise that the weights stay as they are. Calls then compare their
                objects and versions only. Changes by `.data`, numpy, DLPack and optimizers with
                `fused=True` leave no version. Calls return the old result after them.

        Raises:
            RuntimeError: in training mode, on another device than the CPU, or with convolutions
                that are not plain (hooks, a wrapper, several strides). Also for `frozen`
                weights that are no parameters, as a parametrisation makes them, or have no
                version, as tensors of `torch.inference_mode` have none.
            ValueError: for sizes below 1, or a dtype or stride without a kernel to pack for. Also
                for more than 2**18 weights that are not `frozen`: to compare them costs more
                than to pack them.
        """
        check_flag("FusedPSAModule.prepack: frozen", frozen)
        check_int("FusedPSAModule.prepack: height", height, 1)
        check_int("FusedPSAModule.prepack: width", width, 1)
        convs = self._convs()
        if self.training:
            raise RuntimeError("FusedPSAModule.prepack: expected eval mode, got training mode")
        plain = self._plain_convs()
        if plain is None:
            raise RuntimeError(
                "FusedPSAModule.prepack: expected plain convolutions of one stride, got "
                + ", ".join(map(repr, convs))
            )
        weights, settings = [conv.weight for conv in plain], _settings(plain)
        weight = weights[0]
        if weight.device.type != "cpu":
            raise RuntimeError(
                f"FusedPSAModule.prepack: expected weights on the CPU, got {weight.device}"
            )
        if not (frozen or self._may_be_compared()):
            raise ValueError(
                f"FusedPSAModule.prepack: expected at most {COMPARED_WEIGHTS} weights, or "
                f"frozen=True, got {self._conv_weights()} weights: to compare them in each call "
                "costs more than to pack them"
            )
        if frozen:
            _check_can_be_frozen(self._conv_names(), plain, weights)
        with torch.no_grad():
            x = weight.new_empty((1, weight.shape[1] * plain[0].groups, height, width))
            self._packed = torch.ops.epsa_fused.spc_prepack.default(
                x, weights, *settings, frozen, winograd_allowed(self.winograd)
            )
        self._frozen = tuple(weights) if frozen else None
        return self

    def unpack(self) -> Self:
        """Undo :meth:`prepack`."""
        self._packed = self._frozen = None
        return self

    def train(self, mode: bool = True) -> Self:
        if mode:
            type(self).unpack(self)  # a child of AdoptedPSA may have its name
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        type(self).unpack(self)
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        type(self).unpack(self)
        super()._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None, "_frozen": None}

    def _packed_for(self, weights: Sequence[Tensor]) -> Tensor | None:
        """The packed weights; None where the frozen weights were others. The operator compares the
        bytes or versions."""
        if self._frozen is None or all(a is b for a, b in zip(self._frozen, weights, strict=True)):
            return self._packed
        return None

    def _conv_weights(self) -> int:
        return sum(p.numel() for conv in self._convs() for p in conv.parameters())

    def _may_be_compared(self) -> bool:
        """Whether comparing the weights in each call costs less than packing them."""
        return self._conv_weights() <= COMPARED_WEIGHTS

    # ---- parts ----

    def _has_convs_as_branches(self) -> bool:
        """Whether each branch is one convolution of the input; those of AdoptedPSA may be more."""
        return True

    def _conv_names(self) -> Sequence[str]:
        return _CONV_NAMES[: self.branches]

    def _convs(self) -> list[nn.Module]:
        children = self._modules  # attributes would cost small calls some microseconds
        return [cast(nn.Module, children[name]) for name in self._conv_names()]

    def _why_convs_called(self) -> str | None:
        for name in self._conv_names():
            why = why_layer_called(name, submodule(self, name), nn.Conv2d)
            if why is not None:
                return why
        return None

    def _why_not_taken(self) -> str | None:
        """The reason why the operator cannot take the convolutions' settings, or None."""
        convs = cast(list[nn.Conv2d], self._convs())
        for name, conv in zip(self._conv_names(), convs, strict=True):
            why = why_conv_not_taken(name, conv)
            if why is not None:
                return why
            if conv.stride != convs[0].stride:
                first = self._conv_names()[0]
                return f"{name} has stride {conv.stride}, and {first} has {convs[0].stride}"
        return None

    def _why_se_called(self) -> str | None:
        return why_se_called("se", self._modules.get("se"), SEWeight)

    def _why_attention_called(self) -> str | None:
        return why_here() or self._why_se_called()

    def _why_called(self) -> str | None:
        """The reason why layers must be called, or None."""
        why = self._why_attention_called() or self._why_convs_called()
        if why is not None:
            return why
        if self._overrides_attention() or "attention" in self.__dict__:
            return "it has an attention of its own"
        return None

    def _overrides_attention(self) -> bool:
        return type(self).attention is not FusedPSAModule.attention

    def _why_not_fused(self) -> str | None:
        return self._why_called() or self._why_not_taken()

    def _plain_convs(self) -> list[nn.Conv2d] | None:
        """The convolutions if the operator may read them in place of their calls, else None."""
        if self._why_convs_called() is not None or self._why_not_taken() is not None:
            return None
        return cast(list[nn.Conv2d], self._convs())

    def _call_operator(self, x: Tensor, convs: list[nn.Conv2d], *epilogue: Any) -> Tensor:
        """psa_forward. `epilogue`: scale, shift and relu, or nothing."""
        arguments, bias = self._arguments(x, convs)
        # Packed weights belong to this process; an exported program also runs in others.
        local = x.device.type == "cpu" and not torch.compiler.is_exporting()
        packed = self._packed_for(arguments.weights) if local else None
        operator = torch.ops.epsa_fused.psa_forward.default
        winograd = winograd_allowed(self.winograd)
        if bias is not None:  # by its place: a keyword costs some microseconds
            epilogue = (*(epilogue or (None, None, False)), bias)
        return cast(Tensor, operator(*arguments, packed, winograd, *epilogue))

    def _arguments(
        self, x: Tensor, convs: list[nn.Conv2d]
    ) -> tuple[ModuleArguments, Tensor | None]:
        """The operators' arguments, and the convolutions' bias [S*C]."""
        weights, bias = _read(convs)
        rest = (*_settings(convs), *self._se_arguments(), is_reversed(self.branch_order))
        return ModuleArguments(x, weights, *rest), bias

    def _se_arguments(self) -> SEArguments:
        fc1, fc2 = self.se.fc1, self.se.fc2
        return fc1.weight, fc1.bias, fc2.weight, fc2.bias

    def _call_for_attention(self, x: Tensor, convs: list[nn.Conv2d]) -> tuple[Tensor, Tensor]:
        """As _call_operator, and the attention [N, S, C]."""
        arguments, bias = self._arguments(x, convs)
        winograd = winograd_allowed(self.winograd)
        grad = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        if x.device.type == "cpu" and not grad and bias is None:
            operator = torch.ops.epsa_fused.psa_save_output.default
            out, _, attention = operator(*arguments, winograd)
        else:  # what psa_forward runs, too
            feats, pooled = torch.ops.epsa_fused.spc_conv.default(*arguments[:6], winograd, bias)
            operator = torch.ops.epsa_fused.psa_attention.default
            out, _, attention = operator(feats, *arguments[6:], pooled)
        return out, attention

    def _fused_attention(
        self, feats: list[Tensor], return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        return psa_attention(
            feats,
            *self._se_arguments(),
            branch_order=self.branch_order,
            return_attention=return_attention,
        )


def _check_can_be_frozen(
    names: Sequence[str], convs: list[nn.Conv2d], weights: list[Tensor]
) -> None:
    for name, conv, weight in zip(names, convs, weights, strict=True):
        computed = conv._parameters.get("weight") is not weight
        if computed or weight.is_inference():
            raise RuntimeError(
                "FusedPSAModule.prepack: frozen=True expects parameters with a version, got "
                f"{name}.weight that "
                + ("is computed" if computed else "torch.inference_mode made")
            )


def _has_cuda_kernel(x: Tensor) -> bool:
    """Whether the operator may compute convolutions of x on a GPU: in 16-bit floats."""
    if x.device.type != "cuda" or not HAS_CUDA:
        return False
    dtype = x.dtype
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return dtype in (torch.bfloat16, torch.float16)


def _no_save_output(why: str) -> NotImplementedError:
    # The layers would keep the maps that save_output promises not to keep.
    return NotImplementedError(
        "FusedPSAModule: save_output=True expects a CPU tensor, plain convolutions of one stride "
        f"without bias and a plain SE: {why}"
    )


def _read(convs: list[nn.Conv2d]) -> tuple[list[Tensor], Tensor | None]:
    """The weights, and the biases of all branches [S*C]: zeros for absent ones, None without any.

    Each is read once and in the order of the layers' calls, for parametrisations that draw random
    numbers.
    """
    reads = [(conv.weight, conv.bias if has_bias(conv) else None) for conv in convs]
    weights = [weight for weight, _ in reads]
    biases = [bias for _, bias in reads if bias is not None]
    if not biases:
        return weights, None
    if len(biases) < len(reads):
        zeros = biases[0].new_zeros(weights[0].shape[0])
        biases = [zeros if bias is None else bias for _, bias in reads]
    return weights, torch.cat(biases)


def _settings(convs: list[nn.Conv2d]) -> tuple[list[int], int, list[int], list[int]]:
    """Groups, stride, padding and dilation, as the operators take them."""
    return (
        [conv.groups for conv in convs],
        convs[0].stride[0],
        [cast(int, conv.padding[0]) for conv in convs],
        [conv.dilation[0] for conv in convs],
    )
