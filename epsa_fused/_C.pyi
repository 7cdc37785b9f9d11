"""Types of the extension module built from csrc/info.cpp; the functions' docstrings are there."""

from typing import Any

MIN_BRANCHES: int
MAX_BRANCHES: int
COMPARED_WEIGHTS: int

def build_info() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def conv_plan(
    *,
    in_channels: int,
    out_channels: int,
    groups: int,
    kernel: tuple[int, int],
    height: int,
    width: int,
    stride: int = ...,
    padding: int = ...,
    dilation: int = ...,
    winograd: bool = ...,
    dtype: str = ...,
    isa: str | None = ...,
) -> dict[str, Any]: ...

class CudaDevice:
    def __init__(
        self,
        *,
        name: str,
        compute_capability: int,
        multiprocessors: int,
        threads_per_multiprocessor: int,
        blocks_per_multiprocessor: int,
        shared_per_multiprocessor: int,
        shared_per_block: int,
        l2: int,
    ) -> None: ...

def cuda_plans(
    device: CudaDevice,
    *,
    pass_: str,
    samples: int,
    branches: int,
    channels: int,
    pixels: int,
    hidden: int,
    shared: bool = ...,
    dtype: str = ...,
    layout: str = ...,
    aligned: bool | None = ...,
    pooled_given: bool = ...,
    grad_out_given: bool = ...,
    feats_wanted: bool = ...,
    weights_wanted: bool = ...,
    resident: dict[tuple[int, int], int] = ...,
) -> list[dict[str, Any]]: ...
