"""Streams, graphs, several devices, real sizes: only a GPU can show these.

The operator's tests (test_forward.py, test_backward.py, ...) run on the GPU too.
test_simt_kernels.py runs the kernels without one.
"""

import pytest
import torch
from conftest import DEVICES
from support.cases import BY_NAME, DTYPES, PLAIN_LAYOUTS, Case, make_inputs, name_of
from support.processes import run_code
from support.tolerance import check, make_cotangents, run

from epsa_fused import psa_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and a build with CUDA kernels"),
]

STAGES = [(16, 56), (32, 28), (64, 14), (128, 7)]  # C and H = W of EPSANet's four stages
STAGE_CASES = [
    Case(f"n{n}_c{c}_{size}", n, 4, c, size, size, max(1, c // 16))
    for n in (1, 33)
    for c, size in STAGES
] + [Case("detection", 2, 4, 16, 200, 334, 1), Case("odd_detection", 1, 4, 16, 201, 333, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("case", STAGE_CASES, ids=name_of)
def test_stage_shapes(case, layout, dtype):
    inputs = make_inputs(case, dtype, layout, device="cuda")
    check(inputs, *make_cotangents(case, dtype, layout.out_format, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("case", STAGE_CASES, ids=name_of)
def test_results_are_bitwise_the_same_from_run_to_run(case, layout, dtype):
    inputs = make_inputs(case, dtype, layout, device="cuda")
    cotangents = make_cotangents(case, dtype, layout.out_format, "cuda")
    expected = run(psa_attention, inputs, *cotangents)
    for _ in range(10):
        for name, result in run(psa_attention, inputs, *cotangents).items():
            assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("case", [STAGE_CASES[0], STAGE_CASES[4], STAGE_CASES[-1]], ids=name_of)
def test_a_graph_captures_it(case):
    inputs = make_inputs(case, device="cuda")
    grad_out, _ = make_cotangents(case, torch.float32, device="cuda")

    def step():
        return run(psa_attention, inputs, grad_out)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for result in captured.values():
            result.fill_(float("nan"))
        graph.replay()
        eager = step()  # beside the replay: each has counters of its own
        for name, result in captured.items():
            assert torch.equal(result, expected[name]), name
            assert torch.equal(eager[name], expected[name]), name


def test_a_first_call_is_captured():
    """Without a warm-up: in a process whose first call of the operator is inside a capture."""
    output = run_code("""if True:
        import torch
        from epsa_fused import psa_attention
        feats = [torch.randn(2, 16, 9, 9, device="cuda") for _ in range(4)]
        fc1, fc2 = torch.randn(2, 16, device="cuda"), torch.randn(16, 2, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = psa_attention(feats, fc1, None, fc2, None)
        out.fill_(float("nan"))
        graph.replay()
        print(torch.equal(out, psa_attention(feats, fc1, None, fc2, None)))
    """)
    assert output.splitlines()[-1] == "True"


def test_several_streams_at_once():
    cases = [STAGE_CASES[4], STAGE_CASES[-2], STAGE_CASES[5], STAGE_CASES[-1]]
    inputs = [make_inputs(case, device="cuda") for case in cases]
    cotangents = [make_cotangents(case, torch.float32, device="cuda")[:1] for case in cases]
    expected = [run(psa_attention, i, *g) for i, g in zip(inputs, cotangents, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        results = []
        for stream, i, g in zip(streams, inputs, cotangents, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(psa_attention, i, *g))
        torch.cuda.synchronize()
        for result, wanted in zip(results, expected, strict=True):
            assert all(torch.equal(result[name], wanted[name]) for name in wanted)


def test_no_synchronisation():
    inputs = make_inputs(STAGE_CASES[0], device="cuda")
    grad_out, _ = make_cotangents(STAGE_CASES[0], torch.float32, device="cuda")
    expected = run(psa_attention, inputs, grad_out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run(psa_attention, inputs, grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.skipif("cuda" not in DEVICES or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    inputs = make_inputs(BY_NAME["odd"], device="cuda:1")
    with torch.cuda.device(0):
        result = check(inputs, *make_cotangents(BY_NAME["odd"], torch.float32, device="cuda:1"))
    assert result["out"].device == torch.device("cuda:1")


def test_tensors_on_the_cpu_and_the_gpu():
    inputs = make_inputs(BY_NAME["odd"], device="cuda")
    with pytest.raises(RuntimeError, match=r"feats\[1\] is on cpu, expected cuda:0"):
        psa_attention([inputs.feats[0], inputs.feats[1].cpu(), *inputs.feats[2:]], *inputs.weights)
    with pytest.raises(RuntimeError, match="fc2_weight is on cpu, expected cuda:0"):
        weights = list(inputs.weights)
        weights[2] = weights[2].cpu()
        psa_attention(inputs.feats, *weights)


def test_only_the_output_is_allocated():
    """pooled, attention and the workspace are small beside it."""
    inputs = make_inputs(Case("large", 16, 4, 16, 56, 56, 1), device="cuda")
    psa_attention(*inputs.args)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = psa_attention(*inputs.args)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= out.nbytes * 1.05


@pytest.mark.slow
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_more_than_2_to_the_31_elements(layout):
    """One map serves as both branches. Slices are compared: there is no room for two results."""
    n, c, size = 3, 64, 3400
    needed = 2 * 3 * n * c * size**2 + 2**30
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, there are {free / 2**30:.0f}")
    x = torch.empty(
        (n, c, size, size), dtype=torch.bfloat16, device="cuda", memory_format=layout.out_format
    ).normal_()
    assert x.numel() > 2**31
    weights = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((4, c), (4,), (c, 4), (c,))
    ]
    out, attention = psa_attention([x, x], *weights, return_attention=True)
    for i in range(n):
        for k in (0, c - 1):
            for s in range(2):
                expected = x[i, k].float() * attention[i, s, k]
                assert torch.equal(out[i, (1 - s) * c + k], expected.bfloat16())
