"""TensorRT engines, built from an ONNX file and run by our own predictor.

One code path serves TensorRT 10 and 11 and TensorRT for RTX. Networks are strongly typed: every
precision is in the graph, by casts and by Q/DQ pairs, and none is chosen by the builder. TensorRT
builds on the GPU that will run the engine; TensorRT for RTX builds ahead of time, on any machine,
for the GPUs that are named. Either way an engine is bound to GPU and library version, and a folder
keeps the graph beside it, so that the engine can be made again.
"""

from exporters.tensorrt.build import RECORDED, Settings, available, build, profile
from exporters.tensorrt.engine import ENGINE, PLAN, check, described, open_predictor, open_resident
from exporters.tensorrt.library import gpu

__all__ = [
    "ENGINE",
    "PLAN",
    "RECORDED",
    "Settings",
    "available",
    "build",
    "check",
    "described",
    "gpu",
    "open_predictor",
    "open_resident",
    "profile",
]
