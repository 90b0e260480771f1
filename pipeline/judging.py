"""A run is judged again, from what its report keeps: no model is run, and none is imported.

Beside report.json lie the outcomes of every gate example, of the baseline and of the candidate. The
verdict follows from these and from the report's numbers alone, the same one every time.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from benchmarks.outcomes import Outcomes
from pipeline import gate
from pipeline.budget import Budget
from pipeline.gate import EvidenceError
from pipeline.manifest import file_hash
from pipeline.report import READ, Report, Stage

EVIDENCE: Final = "evidence"
"""The folder beside report.json."""
SIDES: Final = ("baseline", "candidate")


def keep(folder: Path, baseline: Outcomes, candidate: Outcomes) -> None:
    """Write the outcomes into a folder."""
    for side, outcomes in zip(SIDES, (baseline, candidate), strict=True):
        outcomes.save(folder / _name(side))


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of what `keep` wrote, by side."""
    return {side: file_hash(folder / _name(side)) for side in SIDES}


def judge_again(path: Path, budget: Budget | None = None) -> dict[str, Any]:
    """Return the report at `path` with its verdict anew, against another budget if one is given.

    Raises:
        EvidenceError: the report, or its outcomes, are missing, damaged, or not of one run.
    """
    report = read(path)
    limits = budget or _own(report, path)
    baseline, candidate = (outcomes(path, report["evidence"][side], side) for side in SIDES)
    _paired(baseline, candidate)
    stages = TypeAdapter(tuple[Stage, ...]).validate_python(report["stages"])
    metric = stages[-1].score.metric
    checks = gate.checks(limits, metric, baseline.columns, candidate.columns, stages)
    verdict = asdict(gate.judge(checks))
    recipe = report["recipe"] | {"budget": limits.model_dump(mode="json")}
    again: dict[str, Any] = json.loads(
        json.dumps(report | {"recipe": recipe, "verdict": verdict}, allow_nan=False)
    )
    return again


def _own(report: Mapping[str, Any], path: Path) -> Budget:
    try:
        return Budget.model_validate(report["recipe"]["budget"])
    except (ValidationError, KeyError, TypeError):
        raise EvidenceError(f"{path}: found no budget in its recipe; give one") from None


def read(path: Path) -> dict[str, Any]:
    """Return the report at `path`.

    Raises:
        EvidenceError: it is missing, damaged, or of a schema that cannot be read.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvidenceError(f"{path}: no such file, expected the report.json of a run") from None
    except (OSError, ValueError) as error:
        raise EvidenceError(f"{path}: cannot be read: {error}") from None
    if not isinstance(report, dict) or report.get("schema") not in READ:
        found = report.get("schema") if isinstance(report, dict) else type(report).__name__
        expected = " or ".join(map(str, READ))
        raise EvidenceError(f"{path}: found the schema {found}, expected {expected}; run it again")
    needed = ("recipe", "stages", "evidence", "verdict", "baseline")
    missing = [key for key in needed if not report.get(key)]
    missing += [f"evidence.{side}" for side in SIDES if side not in report.get("evidence", {})]
    if missing:
        raise EvidenceError(f"{path}: found nothing under {', '.join(missing)}, expected all of it")
    try:
        TypeAdapter(Report).validate_python(report)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise EvidenceError(
            f"{path}: {where}: {first['msg']}; expected it as a run wrote it"
        ) from None
    return report


def outcomes(path: Path, expected: str, side: str) -> Outcomes:
    """Return what the gate's examples came to, of one of `SIDES` of the report at `path`.

    The file is read once: what is compared with the `expected` hash is what is judged.

    Raises:
        EvidenceError: they are not there, or not the report's.
    """
    path = path.parent / EVIDENCE / _name(side)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EvidenceError(
            f"{path}: cannot be read: {error.strerror}; it belongs beside report.json"
        ) from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise EvidenceError(f"{path}: found other outcomes than the report's, expected those")
    return Outcomes.parse(content)


def _paired(baseline: Outcomes, candidate: Outcomes) -> None:
    if baseline.ids != candidate.ids:
        raise EvidenceError("evidence: found other examples on one side, expected the same ones")
    if len(set(baseline.ids)) != len(baseline.ids):
        raise EvidenceError("evidence: found an example twice, expected each of them once")


def _name(side: str) -> str:
    return f"{side}.safetensors"
