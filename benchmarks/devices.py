"""Devices and EPSANet's shapes, for questions to the launch plan without a GPU."""

from __future__ import annotations

from epsa_fused import _C

KIB, MIB = 2**10, 2**20


def _device(
    name: str, compute_capability: int, multiprocessors: int, l2_mib: int, bandwidth: int
) -> tuple[_C.CudaDevice, int]:
    """Limits of a multiprocessor: "Technical Specifications per Compute Capability" in the CUDA
    programming guide (8.9 and 12.0 alike)."""
    geforce = compute_capability in (89, 120)
    kib = {80: 164, 89: 100, 90: 228, 100: 228, 120: 100}[compute_capability]
    device = _C.CudaDevice(
        name=name,
        compute_capability=compute_capability,
        multiprocessors=multiprocessors,
        threads_per_multiprocessor=1536 if geforce else 2048,
        blocks_per_multiprocessor=24 if geforce else 32,
        shared_per_multiprocessor=kib * KIB,
        shared_per_block=(kib - 1) * KIB,
        l2=l2_mib * MIB,
    )
    return device, bandwidth


# Multiprocessors and L2 are the devices' own reports, for the RTX 5090 its white paper. The H200
# reports 60 MB of L2, the H100 50. The bandwidths in GB/s come from NVIDIA's data sheets.
_TABLE = {
    "a100": _device("A100 SXM 80GB", 80, 108, 40, 2039),
    "h100": _device("H100 SXM", 90, 132, 50, 3350),
    "h200": _device("H200 SXM", 90, 132, 60, 4800),
    "b200": _device("B200", 100, 148, 126, 8000),
    "rtx4090": _device("RTX 4090", 89, 128, 72, 1008),
    "rtx5090": _device("RTX 5090", 120, 170, 96, 1792),
}
DEVICES = {key: device for key, (device, _) in _TABLE.items()}
BANDWIDTH = {key: bandwidth for key, (_, bandwidth) in _TABLE.items()}

# (planes, H = W) of the stages of EPSANet-50 and -101 for 224 x 224 images. Each of four branches
# has planes / 4 channels. The *_large variants have twice the planes. Each SE has C // 16 hidden
# units.
BRANCHES = 4
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
LARGE_STAGES = tuple((2 * planes, size) for planes, size in STAGES)
