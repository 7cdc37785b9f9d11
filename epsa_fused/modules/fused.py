"""FusedPSAModule: the PSA module with its convolutions and its attention step fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional import psa_attention
from ..reference import PSAModule, SEWeight, is_reversed
from .layers import is_plain_conv, why_se_not_fused


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
        return all(map(is_plain_conv, convs)) and len({conv.stride for conv in convs}) == 1

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
