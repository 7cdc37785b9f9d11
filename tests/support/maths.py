"""The gradients of the attention step written out, formula by formula.

Independent of autograd and of the package: with the chain rule's terms as they are it checks the
reference, and with their absolute values it says how large the errors of a gradient may be.
"""

from __future__ import annotations

import torch
from support.cases import WEIGHT_NAMES, Inputs
from torch import Tensor


def gradients(
    inputs: Inputs,
    grad_out: Tensor | None,
    grad_attention: Tensor | None,
    *,
    branch_order: str = "reversed",
    absolute: bool = False,
) -> dict[str, Tensor]:
    """Gradients by name, as `run` of tolerance.py names them. Everything in float64.

    `absolute` takes every term of every sum as positive. The result is a gradient's size if
    nothing in it cancelled.
    """
    size = torch.abs if absolute else torch.clone
    minus = torch.add if absolute else torch.sub

    maps = torch.stack(inputs.feats, 1)  # [N, S, C, H, W]
    _, branches, c, h, w = maps.shape
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = inputs.weights
    per_branch = fc1_weight.dim() in (3, 5)
    w1 = fc1_weight.reshape(branches if per_branch else 1, -1, c)  # [S or 1, r, C]
    w2 = fc2_weight.reshape(w1.shape[0], c, -1)  # [S or 1, C, r]
    b1 = 0 if fc1_bias is None else fc1_bias.view(w1.shape[0], -1)
    b2 = 0 if fc2_bias is None else fc2_bias.view(w1.shape[0], -1)

    p = maps.mean((3, 4))  # [N, S, C]
    u = (w1 @ p.unsqueeze(3)).squeeze(3) + b1  # [N, S, r]
    hidden = u.relu()
    z = ((w2 @ hidden.unsqueeze(3)).squeeze(3) + b2).sigmoid()  # [N, S, C]
    a = z.softmax(1)

    g = torch.zeros_like(maps) if grad_out is None else grad_out.view_as(maps)
    g = size(g.flip(1) if branch_order == "reversed" else g)
    da = (g * size(maps)).sum((3, 4))
    if grad_attention is not None:
        da = da + size(grad_attention)
    dz = a * minus(da, (a * da).sum(1, keepdim=True))
    dv = dz * z * minus(torch.ones_like(z), z)
    du = (size(w2).transpose(1, 2) @ dv.unsqueeze(3)).squeeze(3) * (u > 0)
    dp = (size(w1).transpose(1, 2) @ du.unsqueeze(3)).squeeze(3)
    df = g * a[..., None, None] + dp[..., None, None] / (h * w)

    over = 0 if per_branch else (0, 1)  # weights are summed over the samples and their branches
    weights = (
        (du.unsqueeze(3) * size(p).unsqueeze(2)).sum(over),
        du.sum(over),
        (dv.unsqueeze(3) * hidden.unsqueeze(2)).sum(over),
        dv.sum(over),
    )
    result = {f"grad of feats[{s}]": df[:, s] for s in range(branches)}
    for name, value, given in zip(WEIGHT_NAMES, weights, inputs.weights, strict=True):
        if given is not None:
            result[f"grad of {name}"] = value.view(given.shape)
    return result
