"""torch.func transforms and forward-mode AD: the fused modules equal the reference."""

import pytest
import torch
from support.lookalikes.parts import external_psa
from support.tolerance import assert_near
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from epsa_fused import (
    FusedPSAModule,
    FusedSplitPSA,
    PSAModule,
    SplitPSA,
    psa_attention,
    psa_attention_reference,
    why_not_fused,
)

pytestmark = pytest.mark.filterwarnings("ignore:Fused.* calls layers .* a torch.func transform")
ROUNDING = 1e-12


def psa_pair():
    settings = {"conv_kernels": (1, 3), "conv_groups": (1, 2), "reduction": 2}
    fused, plain = (cls(4, 8, **settings).double() for cls in (FusedPSAModule, PSAModule))
    plain.load_state_dict(fused.state_dict())
    return fused, plain, torch.randn(3, 4, 4, 3, dtype=torch.float64)


def split_pair():
    theirs = external_psa(branches=2).double()
    fused = FusedSplitPSA(theirs.convs, theirs.se_blocks)
    plain = SplitPSA(theirs.convs, theirs.se_blocks)
    return fused, plain, torch.randn(3, 32, 2, 3, dtype=torch.float64)


PAIRS = {"psa": psa_pair, "split": split_pair}


def tangent_of(x):
    return (3 * x).cos()


def per_sample_gradients(module, x):
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, sample):
        return functional_call(module, parameters, (sample[None],)).square().sum()

    return list(vmap(grad(loss), (None, 0))(parameters, x).values())


def ensemble(module, x):
    """Several sets of weights, one batched call."""
    stacked = {name: torch.stack([p, 2 * p]).detach() for name, p in module.named_parameters()}
    return [vmap(lambda p: functional_call(module, p, (x,)))(stacked)]


def tangent_of_weights(module, x):
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    tangents = {name: tangent_of(p) for name, p in parameters.items()}
    return list(jvp(lambda p: functional_call(module, p, (x,)), (parameters,), (tangents,)))


def dual(module, x):
    with forward_ad.dual_level():
        return list(forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent_of(x)))))


def scalar(module):
    return lambda x: module(x[None]).square().sum()


TRANSFORMS = {
    "per_sample_gradients": per_sample_gradients,
    "ensemble": ensemble,
    "vmap": lambda m, x: [vmap(m)(x.reshape(3, 1, *x.shape[1:]))],
    "jvp": lambda m, x: list(jvp(m, (x,), (tangent_of(x),))),
    "tangent_of_weights": tangent_of_weights,
    "vjp": lambda m, x: list(vjp(m, x)[1](torch.ones_like(m(x)))),
    "jacrev": lambda m, x: [jacrev(m)(x[:1])],
    "jacfwd": lambda m, x: [jacfwd(m)(x[:1])],
    "hessian": lambda m, x: [hessian(scalar(m))(x[0])],
    "dual": dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("make", PAIRS)
def test_a_transform_of_a_module(make, transform):
    fused, plain, x = PAIRS[make]()
    got, expected = (TRANSFORMS[transform](m, x) for m in (fused, plain))
    for ours, theirs in zip(got, expected, strict=True):
        assert theirs.abs().max() > 0
        assert_near(ours, theirs, ROUNDING)


def test_the_reason():
    fused, _, x = psa_pair()
    seen = []

    def call(x):
        seen.append(why_not_fused(fused))
        return fused(x)

    with pytest.warns(UserWarning, match=r"calls layers .*: a torch\.func transform or"):
        jvp(call, (x,), (x,))
    assert seen == ["a torch.func transform or forward-mode differentiation is in force"]
    assert why_not_fused(fused) is None


def test_functional_call_alone_stays_fused():
    fused, _, x = psa_pair()
    reasons = []
    fused.register_forward_pre_hook(lambda m, x: reasons.append(why_not_fused(m)))
    functional_call(fused, dict(fused.named_parameters()), (x,))
    assert reasons == [None]


@pytest.mark.parametrize("transform", ("jvp", "jacrev"))
def test_a_compiled_transform(transform):
    fused, plain, x = psa_pair()
    run = torch.compile(
        lambda x: TRANSFORMS[transform](fused, x), fullgraph=True, backend="aot_eager"
    )
    for ours, theirs in zip(run(x), TRANSFORMS[transform](plain, x), strict=True):
        assert_near(ours, theirs, ROUNDING)


@pytest.mark.parametrize("per_branch", (False, True), ids=("shared", "per_branch"))
@pytest.mark.parametrize("order", ("reversed", "forward"))
def test_transforms_of_the_attention_step(order, per_branch):
    lead = (3,) if per_branch else ()
    shapes = [(*lead, 2, 4), (*lead, 2), (*lead, 4, 2), (*lead, 4)]
    se = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    feats = torch.randn(5, 2, 12, 3, 2, dtype=torch.float64)

    def attend(function):
        def call(x, *se):
            return function(x.chunk(3, 1), *se, branch_order=order, return_attention=True)

        return call

    ours, theirs = attend(psa_attention), attend(psa_attention_reference)
    tangents = (tangent_of(feats[0]), *map(tangent_of, se))

    def everything(call):
        batched = vmap(call, (0, None, None, None, None))(feats, *se)
        values, tangent = jvp(call, (feats[0], *se), tangents)
        jacobians = jacrev(call, argnums=(0, 1, 2, 3, 4))(feats[0], *se)
        return [*batched, *values, *tangent, *jacobians[0], *jacobians[1]]

    for got, expected in zip(everything(ours), everything(theirs), strict=True):
        assert expected.abs().max() > 0
        assert_near(got, expected, ROUNDING)


@pytest.mark.parametrize("return_attention", (False, True))
def test_dtypes_under_a_transform_are_those_without(return_attention):
    feats = [torch.randn(2, 8, 3, 3).bfloat16() for _ in range(2)]
    se = [torch.randn(shape).bfloat16() for shape in ((2, 8), (2,), (8, 2), (8,))]

    def call(*feats):
        return psa_attention(feats, *se, return_attention=return_attention)

    def dtypes(result):
        return [t.dtype for t in (result if return_attention else (result,))]

    batched = vmap(call)(*(f[None] for f in feats))
    assert dtypes(batched) == dtypes(call(*feats))
