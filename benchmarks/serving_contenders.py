"""What EPSANet-50 is served with on a CPU.

Nothing heavy is imported before a contender is loaded: its imports count as a part of its start.
OpenVINO and ONNX Runtime load a file that was converted ahead, as their users have it. The others
make the network, with random weights, and prepare it themselves.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

OURS = "optimize_for_inference"
IMAGES, ONNX_FILE, OPENVINO_FILE = "images.npy", "model.onnx", "model.xml"

Run = Callable[[], Any]  # one call; it gives the logits as a tensor or as an array


@dataclass(frozen=True)
class Setting:
    """dtype: float32 or bfloat16. folder: what prepare() wrote."""

    dtype: str
    threads: int
    folder: Path


@dataclass(frozen=True)
class Contender:
    """load: everything but the first call. convert: writes into a folder what is read by load."""

    load: Callable[[Setting], Run]
    convert: Callable[[Path, Tensor], None] | None = None
    package: str = "torch"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def network(fused: bool, dtype: torch.dtype) -> nn.Module:
    """EPSANet-50 of the same weights each time, in eval mode and channels_last."""
    import torch
    from torch import nn

    import epsa_fused

    torch.manual_seed(0)
    model = epsa_fused.epsanet50(fused=fused).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, and logits stay of size 1
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.normal_(module.running_mean, 0, 0.05)
    return model.to(dtype).to(memory_format=torch.channels_last)


def images_of(setting: Setting) -> Tensor:
    """The images in channels_last and the setting's dtype; no call needs gradients from here on."""
    import numpy as np
    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(setting.threads)
    images = torch.from_numpy(np.load(setting.folder / IMAGES))
    return images.contiguous(memory_format=torch.channels_last).to(getattr(torch, setting.dtype))


def published(setting: Setting) -> Run:
    images = images_of(setting)
    model = network(False, images.dtype)
    return lambda: model(images)


def published_frozen(setting: Setting) -> Run:
    import torch
    import torch._inductor.config

    images = images_of(setting)
    compiled = torch.compile(network(False, images.dtype), dynamic=False)

    def run() -> Tensor:
        return compiled(images)

    with torch._inductor.config.patch(freezing=True):  # the first call compiles
        run()
    return run


def fused(setting: Setting) -> Run:
    import epsa_fused

    images = images_of(setting)
    model = epsa_fused.prepack(network(True, images.dtype), images, frozen=True)
    return lambda: model(images)


def optimised(setting: Setting, compile: bool = True) -> Run:
    import torch

    import epsa_fused

    images = images_of(setting)
    served = epsa_fused.optimize_for_inference(
        network(True, torch.float32), images.float(), dtype=images.dtype, compile=compile
    )
    return lambda: served(images)


def without_compiler(setting: Setting) -> Run:
    return optimised(setting, compile=False)


def to_openvino(folder: Path, images: Tensor) -> None:
    import openvino as ov
    import torch

    logging.getLogger("nncf").setLevel(logging.ERROR)
    converted = ov.convert_model(
        network(False, torch.float32), example_input=images, input=[list(images.shape)]
    )
    ov.save_model(converted, folder / OPENVINO_FILE, compress_to_fp16=False)


def openvino(setting: Setting) -> Run:
    import numpy as np
    import openvino as ov

    options = {
        "INFERENCE_PRECISION_HINT": ov.Type.bf16 if setting.dtype == "bfloat16" else ov.Type.f32,
        "INFERENCE_NUM_THREADS": setting.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(setting.folder / OPENVINO_FILE, "CPU", options)
    request = compiled.create_infer_request()
    given = np.load(setting.folder / IMAGES)
    return lambda: request.infer([given])[0]


def to_onnx(folder: Path, images: Tensor) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network(False, torch.float32), (images,), folder / ONNX_FILE, dynamo=False
        )


def onnx_runtime(setting: Setting) -> Run:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = setting.threads
    session = ort.InferenceSession(
        setting.folder / ONNX_FILE, options, providers=["CPUExecutionProvider"]
    )
    given = {session.get_inputs()[0].name: np.load(setting.folder / IMAGES)}
    return lambda: session.run(None, given)[0]


# In the order of the ladder in docs/serving.md. The two that take no part in it are the last.
CONTENDERS: dict[str, Contender] = {
    "published": Contender(published),
    "published, frozen": Contender(published_frozen),
    "fused, packed": Contender(fused),
    f"{OURS}, compile=False": Contender(without_compiler),
    OURS: Contender(optimised),
    "OpenVINO": Contender(openvino, to_openvino, "openvino"),
    "ONNX Runtime": Contender(onnx_runtime, to_onnx, "onnxruntime", ("float32",)),
}


def why_not(name: str, dtype: str) -> str | None:
    """Why a contender takes no part; None if it does."""
    contender = CONTENDERS[name]
    if dtype not in contender.dtypes:
        return f"no {dtype}"
    needed = [contender.package, *(["onnx"] if contender.convert is to_onnx else [])]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def prepare(folder: Path, images: Tensor, names: Iterable[str]) -> None:
    """Write the images, float32 and contiguous, and the files of those contenders."""
    import numpy as np

    np.save(folder / IMAGES, images.numpy())
    for name in names:
        convert = CONTENDERS[name].convert
        if convert:
            convert(folder, images)


def versions() -> str:
    found = []
    for package in dict.fromkeys(contender.package for contender in CONTENDERS.values()):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
