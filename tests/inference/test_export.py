"""optimize_for_export(): a folded and packed module that torch.export takes."""

import pytest
import torch
from support.inference import Net, assert_as_good_as_the_model, images, with_statistics

from epsa_fused import optimize_for_export


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_what_is_exported_computes_what_the_model_does(dtype):
    """From float32 in any layout to float32, of any batch."""
    torch.manual_seed(0)
    model = with_statistics(Net())
    optimized = optimize_for_export(model, images(), dtype=dtype)
    assert optimized.report.folded == ["stem.1", "norm"] and optimized.report.packed == 1
    assert str(optimized.report).startswith(f"optimize_for_export: {dtype}, error ")
    program = torch.export.export(
        optimized, (images(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    names = {str(node.target) for node in program.graph.nodes}
    assert "epsa_fused.psa_forward.default" in names
    assert not any("batch_norm" in name for name in names)
    exported = program.module()
    for x in (images(), images(3), images().contiguous(memory_format=torch.channels_last)):
        assert torch.equal(exported(x), optimized(x))
        assert_as_good_as_the_model(optimized, model, x, dtype)


def test_errors_name_the_function():
    with pytest.raises(RuntimeError, match=r"^optimize_for_export: expected a model in eval mode"):
        optimize_for_export(Net().train(), images())
    with pytest.raises(ValueError, match=r"^optimize_for_export: dtype: expected torch.float32 or"):
        optimize_for_export(Net().eval(), images(), dtype=torch.float16)
