"""Is a released artifact what was released? Checked without torch and without a network.

First the bytes (sha256 of every file, no links), then the graphs (sound, their weights inside the
folder), then what the model gives for the inputs that were recorded when it was released.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from benchmarks.machine import usable_cores
from exporters import ExportError, MissingDependency
from exporters.onnx import sound
from exporters.tensorrt.engine import PLAN
from pipeline import manifest, signing
from pipeline.manifest import SIGNATURE, Damaged
from pipeline.openers import OPENERS, opener


@dataclass(frozen=True)
class Verified:
    """What was found good.

    `difference` is the largest one to the recorded outputs, relative to the largest output, and
    `tolerance` what it may be; `unopened`: there is an engine, which was not run, but the graph
    that it was built from. `signed`: whether the signature was checked; None if there is none.
    """

    files: int
    size_bytes: int
    graphs: int
    outcome: str
    difference: float
    tolerance: float
    unopened: bool
    signed: bool | None


def verify(folder: Path, public_key: Path | None = None) -> Verified:
    """Return what was found of the artifact in `folder`.

    Raises:
        Damaged: files, graphs or outputs are not those that were released, or were not signed with
            the private key of `public_key`.
        RecipeError: the key cannot be read.
        MissingDependency, NotHere, Unavailable: what runs the model is not installed, or not here.
    """
    files, about = manifest.read(folder)
    if public_key is not None:
        signing.check(folder, public_key)
    graphs = [folder / name for name in files if name.endswith(".onnx")]
    for path in graphs:
        try:
            sound.check(path)
        except ExportError as error:
            raise Damaged(str(error)) from error
    settings = folder / "inference.json"
    if not settings.is_file():
        raise Damaged(
            f"{settings}: found none, expected that of a released artifact; a stage, or an engine"
            " that was made without a recipe, has no recorded outputs"
        )
    told = _settings(settings)
    difference, tolerance = _rerun(folder, told), told["tolerance"]
    if not difference <= tolerance:
        raise Damaged(
            f"{folder}: found outputs that differ by {difference:.1e} from the recorded ones,"
            f" expected at most {tolerance:.1e}; this runtime or machine computes otherwise than"
            " the one that the artifact was measured on"
        )
    return Verified(
        files=len(files),
        size_bytes=sum(file["bytes"] for file in files.values()),
        graphs=len(graphs),
        outcome=_outcome(about),
        difference=difference,
        tolerance=tolerance,
        unopened=(folder / PLAN).is_file() and told["runtime"] != "tensorrt",
        signed=(public_key is not None) if (folder / SIGNATURE).is_file() else None,
    )


def _outcome(about: Mapping[str, Any]) -> str:
    verdict = about.get("verdict")
    return str(verdict.get("outcome", "unknown")) if isinstance(verdict, dict) else "unknown"


def _settings(path: Path) -> dict[str, Any]:
    """Return what says how the artifact runs.

    Raises:
        Damaged: something of it is missing, or is none of its kind.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"runtime": str, "device": str, "threads": int, "tolerance": float}
        wrong = [name for name, kind in kinds.items() if not isinstance(told[name], kind)]
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"{path}: found no sound settings: {error!r}") from error
    if wrong or told["runtime"] not in OPENERS or told["device"] not in {"cpu", "cuda"}:
        raise Damaged(f"{path}: found no sound settings, expected those of a released artifact")
    return dict(told)


def _rerun(folder: Path, settings: Mapping[str, Any]) -> float:
    """Return the largest difference to the recorded outputs.

    Raises:
        Damaged: there are none, or the model cannot be opened, or takes or gives others.
    """
    try:
        from pipeline.infer import golden

        opened = opener(settings["runtime"])
        threads = min(settings["threads"], usable_cores())
        predict = opened(folder, device=settings["device"], threads=threads)
    except MissingDependency:
        raise
    except ImportError as error:
        raise MissingDependency(
            f"{error.name}: not installed, expected it to run the recorded inputs"
        ) from error
    except ValueError as error:  # ModelError, which needs torch, is one
        raise Damaged(f"{folder}: cannot be opened: {error}") from error
    try:
        return golden(folder, predict)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise Damaged(f"{folder}: the recorded inputs cannot be run: {error!r}") from error
