"""FusedPSAModule: the PSA module with its convolutions and its attention step fused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .ops import psa_attention
from .reference import PSAModule, SEWeight, is_reversed

# The layers that the fused operator computes in one go.
_SE_LAYERS = {
    "avg_pool": nn.AdaptiveAvgPool2d,
    "fc1": nn.Conv2d,
    "relu": nn.ReLU,
    "fc2": nn.Conv2d,
    "sigmoid": nn.Sigmoid,
}


def _why_not_fused(name: str, module: nn.Module | None, expected: type[nn.Module]) -> str | None:
    """Why calling `module` may do something else than the fused operator does in its place."""
    if module is None:
        return f"{name} is missing"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"{name} has hooks, which a fused call would leave out"
    if type(module).forward is not expected.forward or "forward" in module.__dict__:
        return (
            f"{name} is a {type(module).__name__} with a forward of its own, "
            f"expected that of {expected.__name__}"
        )
    # what Conv2d.forward calls: weight standardisation and other paddings are put there
    if isinstance(module, nn.Conv2d) and (
        type(module)._conv_forward is not nn.Conv2d._conv_forward
        or "_conv_forward" in module.__dict__
    ):
        return f"{name} is a {type(module).__name__} with a _conv_forward of its own"
    return None


def _is_plain(conv: nn.Module) -> bool:
    """Whether calling the layer is the convolution that its weight and settings say."""
    return (
        _why_not_fused("conv", conv, nn.Conv2d) is None
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(len(set(both)) == 1 for both in (conv.stride, conv.padding, conv.dilation))
        and type(conv.weight).__name__ != "DTensor"
    )


def why_se_not_fused(
    name: str, se: nn.Module | None, expected: type[nn.Module], layers: Iterable[str] = _SE_LAYERS
) -> str | None:
    """Why calling the SE network `se`, named `name`, may do something else than the fused operator
    does with its weights; `layers` are what it calls its layers, in the order of _SE_LAYERS."""
    why = _why_not_fused(name, se, expected)
    names = [f"{name}.{layer}" for layer in layers]
    if why is None:
        modules = [se._modules.get(layer) for layer in layers]
        for layer, module, kind in zip(names, modules, _SE_LAYERS.values(), strict=True):
            why = why or _why_not_fused(layer, module, kind)
    if why is not None:
        return why
    pool, fc1, _, fc2, _ = modules
    if pool.output_size not in (1, (1, 1)):
        return f"{names[0]} has output_size {pool.output_size}, expected 1"
    for layer, module in ((names[1], fc1), (names[3], fc2)):
        if module.padding != (0, 0) or module.groups != 1:
            return (
                f"{layer} has padding {module.padding} and groups {module.groups}, "
                "expected a plain 1x1 convolution"
            )
        for parameter in ("weight", "bias"):
            # by its name: importing the class DTensor takes a second
            if type(getattr(module, parameter)).__name__ == "DTensor":
                return f"{layer}.{parameter} is a DTensor (a shard), expected a whole tensor"
    return None


class FusedPSAModule(PSAModule):
    """Pyramid Squeeze Attention, fused: a drop-in for the published PSAModule.

    Constructor, `state_dict` keys and output are those of :class:`PSAModule` (see there) and of
    the published code; the attention step is :func:`epsa_fused.psa_attention`. On the CPU the
    whole module is one operator, psa_forward: where no gradient can be asked for, the
    convolutions write into the output's slots and each sample is reweighted in place; else it is
    :func:`epsa_fused.convolution.spc_conv` and the attention step. That needs plain convolutions,
    all of one stride: if one has hooks, a bias, was replaced or is sharded, each of them is called
    as the layer it is, as on other devices.

    The fused attention reads the parameters of `se.fc1` and `se.fc2` and does not call the
    submodules of `se`. Where a call would mean something else (hooks, a replaced layer such as a
    LoRA or quantisation wrapper, a sharded parameter), forward raises RuntimeError instead of
    leaving that out; use :class:`PSAModule` there, or hook, wrap or shard (FSDP2's fully_shard)
    the whole module or a parent of it.

    Args (besides those of :class:`PSAModule`):
        save_output: keep for the backward pass the output instead of the branches' maps, half of
            the memory of both; a layer behind that keeps its input (BatchNorm, a convolution)
            shares it. CPU and plain convolutions only, and what follows must not change the
            output in place (autograd raises an error if it does). In half precision the
            attention's gradient then comes from the rounded output. Also an attribute.
    """

    # Of the class too: modules that were pickled by a version without them.
    save_output: bool = False
    _packed: Tensor | None = None
    _packed_from: Sequence[Tensor] = ()  # keeps the addresses of the packed weights taken

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
        save_output: bool = False,
    ) -> None:
        super().__init__(
            inplans,
            planes,
            conv_kernels,
            stride,
            conv_groups,
            reduction=reduction,
            branch_order=branch_order,
        )
        self.save_output = save_output

    def extra_repr(self) -> str:
        states = (", save_output=True" if self.save_output else "") + (
            ", prepacked" if self._packed is not None else ""
        )
        return super().extra_repr() + states

    def forward(self, x: Tensor) -> Tensor:
        """x [N, inplans, H, W] -> [N, planes, H', W']."""
        convs = self._convs()
        plain = self._are_plain(convs)
        save_output = (
            self.save_output
            and torch.is_grad_enabled()
            and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        )
        if x.device.type != "cpu" or not plain:
            if save_output:
                raise NotImplementedError(
                    "FusedPSAModule: save_output=True expects a CPU tensor and plain convolutions "
                    f"of one stride, got x on {x.device} and "
                    f"{'plain' if plain else 'other'} convolutions"
                )
            return self.attention([conv(x) for conv in convs])
        self._check_se()
        fc1, fc2 = self.se.fc1, self.se.fc2
        arguments = (
            x,
            *_arguments(convs),
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            is_reversed(self.branch_order),
        )
        if save_output:
            return torch.ops.epsa_fused.psa_save_output.default(*arguments)[0]
        # packed weights hold for this process, an exported program for others too
        packed = None if torch.compiler.is_exporting() else self._packed
        return torch.ops.epsa_fused.psa_forward.default(*arguments, packed)

    def attention(self, feats: list[Tensor]) -> Tensor:
        self._check_se()
        fc1, fc2 = self.se.fc1, self.se.fc2
        return psa_attention(
            feats, fc1.weight, fc1.bias, fc2.weight, fc2.bias, branch_order=self.branch_order
        )

    # ---- serving: weights packed ahead ----

    def prepack(self, height: int, width: int) -> FusedPSAModule:
        """Pack the convolutions' weights once, instead of in every call: for serving on the CPU.

        Calls that can ask for no gradient use the packed copy, which takes about as much memory as
        the weights in float32 (twice that where output channels do not fill vectors). `train()`,
        `load_state_dict()`, moving or casting the module, and :meth:`unpack` drop it; copies and
        pickles of the module have none, exported programs neither. Weights that were replaced or
        changed since are noticed, and packed by the call as before; only changes behind autograd's
        back (`weight.data.mul_(2)`, or in place in inference mode) are not: prepack again after
        those. Under autocast, which casts the weights, calls pack as before.

        Args:
            height, width: of the maps x that will be served; others work, maybe less fast.

        Raises:
            RuntimeError: in training mode, on another device than the CPU, or with convolutions
                that are not plain (hooks, a bias, a wrapper, several strides).
            ValueError: for sizes below 1, or a dtype or stride that has no kernel to pack for.
        """
        if min(height, width) < 1:
            raise ValueError(
                f"FusedPSAModule.prepack: expected a height and width of at least 1, "
                f"got {height} and {width}"
            )
        convs = self._convs()
        if self.training:
            raise RuntimeError("FusedPSAModule.prepack: expected eval mode, got training mode")
        if not self._are_plain(convs):
            raise RuntimeError(
                "FusedPSAModule.prepack: expected plain convolutions of one stride, got "
                + ", ".join(map(repr, convs))
            )
        weight = convs[0].weight
        if weight.device.type != "cpu":
            raise RuntimeError(
                f"FusedPSAModule.prepack: expected weights on the CPU, got {weight.device}"
            )
        with torch.no_grad():
            x = weight.new_empty((1, weight.shape[1] * convs[0].groups, height, width))
            self._packed = torch.ops.epsa_fused.spc_prepack.default(x, *_arguments(convs))
            self._packed_from = [conv.weight.detach() for conv in convs]
        return self

    def unpack(self) -> FusedPSAModule:
        """Undo :meth:`prepack`."""
        self._packed, self._packed_from = None, ()
        return self

    def train(self, mode: bool = True) -> FusedPSAModule:
        if mode:
            self.unpack()
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs) -> FusedPSAModule:
        self.unpack()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_packed": None, "_packed_from": ()}

    # ---- parts ----

    def _convs(self) -> list[nn.Module]:
        return [getattr(self, f"conv_{i + 1}") for i in range(self.branches)]

    @staticmethod
    def _are_plain(convs: list[nn.Module]) -> bool:
        return all(map(_is_plain, convs)) and len({conv.stride for conv in convs}) == 1

    def _check_se(self) -> None:
        why = why_se_not_fused("se", self.se, SEWeight)
        if why is not None:
            raise RuntimeError(
                f"FusedPSAModule: {why}. Use epsa_fused.PSAModule for this model, or hook, wrap "
                "or shard the whole FusedPSAModule."
            )


def _arguments(convs: list[nn.Conv2d]) -> tuple:
    """Weights and settings, as the operators take them."""
    return (
        [conv.weight for conv in convs],
        [conv.groups for conv in convs],
        convs[0].stride[0],
        [conv.padding[0] for conv in convs],
        [conv.dilation[0] for conv in convs],
    )
