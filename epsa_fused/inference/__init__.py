"""optimize_for_inference(): a model with PSA modules, prepared for serving on the CPU."""

from .model import ExportableModel, InferenceModel, InferenceReport
from .optimize import optimize_for_export, optimize_for_inference

__all__ = [
    "ExportableModel",
    "InferenceModel",
    "InferenceReport",
    "optimize_for_export",
    "optimize_for_inference",
]
