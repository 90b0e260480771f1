"""The engine of an artifact, made again: on another GPU, or for another version of TensorRT.

It is built from the artifact's own ONNX file, as its `engine.json` says. The verdict in the
manifest is that of the engine before; the manifest says so.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.accuracy import Track, silent
from exporters import onnx, tensorrt
from pipeline.checkpoint import ModelError
from pipeline.manifest import MANIFEST, SIGNATURE, file_hash, read
from pipeline.store import publish


def rebuild(folder: Path, *, track: Track = silent) -> dict[str, Any]:
    """Build the engine of the artifact in `folder` again, in its place, and return what is new.

    The artifact is replaced as a whole, or not at all.

    Raises:
        Damaged: the folder is not what its manifest says.
        ModelError: it holds no engine, or not the file that it was built from.
        ExportError: the engine cannot be built.
        MissingDependency, NotHere: this machine cannot build it.
    """
    folder = folder.resolve()
    _, known = read(folder)
    if not (folder / tensorrt.ENGINE).is_file():
        raise ModelError(
            f"{folder}: found no {tensorrt.ENGINE}, expected an artifact of `export` with format:"
            " tensorrt"
        )
    before = tensorrt.described(folder)
    for name, expected in before["onnx"].items():
        path = folder / onnx.MODEL.parent / name
        if not path.is_file() or file_hash(path) != expected:
            raise ModelError(f"{path}: not the file that the engine was built from, expected it")
    told = {}

    def make(target: Path) -> None:
        shutil.copytree(folder, target, dirs_exist_ok=True)
        (target / MANIFEST).unlink()
        (target / SIGNATURE).unlink(missing_ok=True)  # of what was there before
        shutil.rmtree(target / tensorrt.PLAN.parent)
        told.update(
            tensorrt.build(target / onnx.MODEL, target, before["profile"], _settings(before), track)
        )

    about = {
        **known,
        "rebuilt": {
            "machine": asdict(machine.describe()),
            "from": {key: before[key] for key in ("library", "built_on", "plan")},
            "verdict": "that of the engine before; this one was not measured",
        },
    }
    publish(make, folder, about)
    return told


def _settings(before: dict[str, Any]) -> tensorrt.Settings:
    """Return how it was built, but for the GPU that is here, if that is another."""
    known = {key: before["settings"][key] for key in tensorrt.RECORDED}
    settings = tensorrt.Settings(**known, library=before["library"]["name"])
    capabilities, here = tuple(settings.compute_capabilities), tensorrt.gpu()
    if capabilities and here is not None and float(here.compute_capability) not in capabilities:
        capabilities = (float(here.compute_capability),)
    return replace(settings, compute_capabilities=capabilities)
