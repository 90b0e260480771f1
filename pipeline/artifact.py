"""What is deployed: the last stage's files, and all that their users need around them.

    onnx/model.onnx     the model, where the ecosystem's servers look for it
    config.json, tokenizer.json ...
    inference.json      task, labels, and the session options that it was measured with
    infer.py            answers, with onnxruntime, numpy and tokenizers alone
    greedy.py           how a model that generates does so
    golden.npz          inputs and the outputs that they gave here
    triton/             a model repository
    README.md           the model card, with the measured numbers
    manifest.json       sha256 of every file, source, recipe, versions, machine, verdict

The recorded outputs are gone through once more by infer.py's own code before anything is published.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.examples import Arrays, collate
from benchmarks.worker import Predictor
from exporters import ExportError, onnx
from exporters.onnx import greedy, sound, triton
from exporters.onnx.session import CONFIG, PROVIDERS
from pipeline import card, infer
from pipeline.manifest import MANIFEST
from pipeline.openers import opener
from pipeline.work import Artifact, Work

ROWS: Final = 4
"""Recorded inputs."""
TOKENS: Final = 16
"""Of a recorded input whose outputs are those of a vocabulary."""
TOLERANCE: Final = 1e-3
"""The least difference that counts, relative to the largest output."""
LARGEST_TOLERANCE: Final = 0.5
"""With more, outputs could be anything."""
MARGIN: Final = 4.0
"""How much further apart than here two machines may be."""


def write(folder: Path, work: Work, last: Artifact, report: Mapping[str, Any]) -> None:
    """Write the artifact of a run into an empty folder.

    Args:
        folder: empty.
        work: of the run.
        last: the stage that is deployed.
        report: the JSON of report.json.

    Raises:
        ExportError: the model does not give here what it gave a moment ago.
    """
    shutil.copytree(last.entry.folder, folder, dirs_exist_ok=True)
    (folder / MANIFEST).unlink()  # the artifact gets its own
    # A torch model is deployed as such, whatever it was measured in.
    runtime = "torch" if last.format == "torch" else work.recipe.target.runtime
    for path in sorted(folder.glob("onnx/*.onnx")):
        sound.check(path)
    settings = _settings(work, runtime) | {"tolerance": _record(folder, work, runtime)}
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    (folder / infer.SETTINGS).write_text(text, encoding="utf-8")
    if "session" in settings:
        _deploy(folder, work, settings)
    answers = (folder / "infer.py").is_file()
    text = card.card(report, name(work), settings, answers=answers)
    (folder / "README.md").write_text(text, encoding="utf-8")


def without_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe as JSON that names files and folders of this machine by their names alone."""

    def named(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: named(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [named(each) for each in value]
        if isinstance(value, str) and (os.sep in value or "~" in value):
            path = Path(value).expanduser()
            return path.resolve().name if path.is_absolute() or path.exists() else value
        return value

    return {key: named(value) for key, value in recipe.items()}


def name(work: Work) -> str:
    """Return a name for the model, of letters, digits, `.`, `_` and `-`."""
    source = work.recipe.model.source.removeprefix("builtin:")
    return re.sub(r"[^\w.-]+", "-", Path(source).expanduser().resolve().name).lstrip(".") or "model"


def _deploy(folder: Path, work: Work, settings: Mapping[str, Any]) -> None:
    """Write what runs the graphs elsewhere, and run it once here."""
    target = work.recipe.target
    for path in sorted((folder / onnx.MODEL.parent).glob("*.onnx")):
        side = "" if path.name == onnx.MODEL.name else f"-{path.stem.removesuffix('_model')}"
        triton.write(
            path,
            folder / "triton",
            name(work) + side,
            device=target.device,
            threads=work.threads,
            rows=max(load.batch for load in target.loads),
        )
    told = "tokenizer.json" if "sequence" in work.task.axes else "preprocessor_config.json"
    if settings["task"] not in infer.ANSWERS or not (folder / told).is_file():
        return
    shutil.copyfile(infer.__file__, folder / "infer.py")
    if work.task.reduction == "next_token":
        shutil.copyfile(greedy.__file__, folder / "greedy.py")
    try_out(folder)


def try_out(folder: Path) -> None:
    """Run the recorded inputs once by what users run.

    Raises:
        ExportError: the outputs are not those that were recorded.
    """
    model = infer.Model(folder)
    difference, tolerance = infer.golden(folder, model.run), model.settings["tolerance"]
    if not difference <= tolerance:
        raise ExportError(
            f"{folder / onnx.MODEL}: found outputs that differ by {difference:.1e} from one session"
            f" to the next, expected at most {tolerance:.1e}"
        )


def _settings(work: Work, runtime: str) -> dict[str, Any]:
    target = work.recipe.target
    settings: dict[str, Any] = {
        "task": work.recipe.task.kind,
        "max_length": work.recipe.task.max_length,
        "labels": work.labels,
        "pad": work.padding["input_ids"],
        "runtime": runtime,
        "device": target.device,
        "threads": work.threads,
    }
    if work.task.reduction == "next_token":
        settings["begin"] = getattr(work.processor, "bos_token_id", None)
    if runtime == "onnxruntime":
        settings |= {"providers": [PROVIDERS[target.device]], "session": dict(CONFIG)}
    return settings


def _record(folder: Path, work: Work, runtime: str) -> float:
    """Write inputs with the outputs for them, and return how far others may be from these.

    That is some times the difference between ONNX Runtime's graph as it is and as it optimizes it:
    int8 rounds otherwise in each, as it does on another CPU.
    """
    target, inputs = work.recipe.target, _inputs(work)
    options: dict[str, Any] = {"device": target.device, "threads": work.threads}
    outputs = others = _outputs(opener(runtime)(folder, **options), inputs)
    if runtime == "onnxruntime":
        others = _outputs(onnx.open_predictor(folder, **options, optimize=False), inputs)
    recorded = {f"input.{key}": array for key, array in inputs.items()}
    recorded |= {f"output.{key}": array for key, array in outputs.items()}
    np.savez(folder / infer.GOLDEN, allow_pickle=False, **recorded)
    apart = [
        float(np.abs(others[key] - array).max()) / max(float(np.abs(array).max()), 1e-6)
        for key, array in outputs.items()
    ]
    if not max(apart) <= LARGEST_TOLERANCE:
        raise ExportError(
            f"{folder / onnx.MODEL}: found outputs that differ by {max(apart):.1e} of the largest"
            " one between the graph as it is and as ONNX Runtime optimizes it, expected at most"
            f" {LARGEST_TOLERANCE:.1e}; no recorded output could tell a wrong one"
        )
    return min(max(TOLERANCE, MARGIN * max(apart)), LARGEST_TOLERANCE)


def _inputs(work: Work) -> Arrays:
    """Return a few inputs of the gate split as a batch."""
    rows, tokens = ROWS, work.recipe.task.max_length
    if work.task.reduction != "none":
        rows, tokens = 1, TOKENS
    windows = [w.inputs for example in work.examples("gate")[:rows] for w in example.windows][:rows]
    if "sequence" in work.task.axes:
        windows = [{key: array[:tokens] for key, array in window.items()} for window in windows]
    return collate(windows, work.padding)


def _outputs(predict: Predictor, inputs: Arrays) -> Arrays:
    return {
        key: np.asarray(array)
        for key, array in predict(inputs).items()
        if not key.startswith("present.")
    }
