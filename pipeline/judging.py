"""A run is judged again, from what its report keeps: no model is run, and none is imported.

Beside report.json lie the outcomes of every gate example, of the baseline and of the candidate. The
verdict follows from these and from the report's numbers alone, the same one every time.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from benchmarks.outcomes import Outcomes
from pipeline import gate
from pipeline.budget import Budget
from pipeline.evidence import Evidence, EvidenceError
from pipeline.manifest import file_hash
from pipeline.report import READ, Report, Stage

EVIDENCE: Final = "evidence"
"""The folder beside report.json."""
SIDES: Final = ("baseline", "candidate")
SLICES: Final = "slices"
PLACE: Final = (
    *(f"machine.{part}" for part in ("cpu", "cpu_flags", "cores", "gpu")),
    *(f"recipe.target.{part}" for part in ("device", "runtime", "threads", "loads")),
)
"""What must be the same where two runs were measured, to compare what they took."""


def keep(folder: Path, evidence: Evidence) -> None:
    """Write the outcomes into a folder, and into which slices their examples fall."""
    for side, outcomes in zip(SIDES, (evidence.baseline, evidence.candidate), strict=True):
        outcomes.save(folder / _name(side))
    if evidence.slices:
        text = json.dumps(dict(evidence.slices), indent=0, ensure_ascii=False)
        (folder / _name(SLICES)).write_text(text, encoding="utf-8")


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of what `keep` wrote."""
    names = (*SIDES, SLICES)
    return {n: file_hash(folder / _name(n)) for n in names if (folder / _name(n)).is_file()}


def judge_again(
    path: Path, budget: Budget | None = None, released: Path | None = None
) -> dict[str, Any]:
    """Return the report at `path` with its verdict anew.

    Args:
        path: report.json.
        budget: in place of that of the run's recipe.
        released: the report of the last release, to be judged against, too.

    Raises:
        EvidenceError: a report, or its outcomes, are missing, damaged, or not of one run.
    """
    report = read(path)
    limits = budget or _own(report, path)
    if released is not None:
        limits = gate.against_released(limits, str(released))
    evidence = _evidence(path, report)
    verdict = asdict(gate.judge(gate.checks(limits, evidence, against(limits, evidence))))
    recipe = report["recipe"] | {"budget": limits.model_dump(mode="json")}
    again: dict[str, Any] = json.loads(
        json.dumps(report | {"recipe": recipe, "verdict": verdict}, allow_nan=False)
    )
    return again


def against(budget: Budget, evidence: Evidence) -> Evidence | None:
    """Return the candidate beside the artifact that was released last, if the budget names one.

    Raises:
        EvidenceError: its report is missing or damaged, was not released, or is of another task.
    """
    if budget.regression is None:
        return None
    path = report_path(Path(budget.regression.report))
    report = read(path)
    if report["verdict"].get("outcome") != "pass":
        raise EvidenceError(
            f"{path}: found the verdict {report['verdict'].get('outcome')}, expected that of a"
            " release: pass"
        )
    other = _evidence(path, report)
    if other.candidate.ids != evidence.candidate.ids:
        raise EvidenceError(
            f"{path}: found other gate examples than this run's, expected the same ones; run the"
            " released recipe on these"
        )
    if tuple(other.labels) != tuple(evidence.labels):
        raise EvidenceError(
            f"{path}: found the labels {list(other.labels)}, expected {list(evidence.labels)}"
        )
    places = other.places[1], evidence.places[1]
    return replace(evidence, baseline=other.candidate, first=other.last, places=places)


def place(report: Mapping[str, Any]) -> dict[str, str]:
    """Return each of `PLACE` of a report, or of its `machine` and `recipe` alone, as JSON."""
    found = {}
    for name in PLACE:
        value: Any = report
        for part in name.split("."):
            value = value.get(part, {})
        found[name] = json.dumps(value)
    return found


def report_path(path: Path) -> Path:
    """Return the path of a report that is named by its file or its folder."""
    return path / "report.json" if path.is_dir() else path


def _evidence(path: Path, report: Mapping[str, Any]) -> Evidence:
    """Return what the verdict of the report at `path` rests on."""
    hashed = report["evidence"]
    baseline, candidate = (outcomes(path, side, hashed[side]) for side in SIDES)
    stages = TypeAdapter(tuple[Stage, ...]).validate_python(report["stages"])
    try:
        labels: Sequence[str] = report["data"]["labels"]
        dedicated = report["recipe"]["target"].get("dedicated", False)
        here = place(report)
    except (KeyError, TypeError, AttributeError):
        raise EvidenceError(f"{path}: found no labels or no target, expected both") from None
    slices = json.loads(_content(path, SLICES, hashed[SLICES])) if SLICES in hashed else {}
    return Evidence(
        baseline, candidate, stages[0], stages[-1], labels, slices,
        dedicated=dedicated is True, places=(here, here),
    )  # fmt: skip


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
        found = report.get("schema", "none") if isinstance(report, dict) else type(report).__name__
        expected = " or ".join(map(str, READ))
        raise EvidenceError(
            f"{path}: found the schema {found}, expected {expected}, of the report.json of a run;"
            " if it is one, run it again"
        )
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


def outcomes(path: Path, side: str, expected: str) -> Outcomes:
    """Return what the gate's examples came to, of one of `SIDES` of the report at `path`.

    Raises:
        EvidenceError: they are not there, or not those of the `expected` sha256.
    """
    content = _content(path, side, expected)
    try:
        return Outcomes.parse(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise EvidenceError(f"{path}: found no outcomes of the {side}: {error!r}") from None


def _content(path: Path, name: str, expected: str) -> bytes:
    """Return a file of the evidence, which is read once: what is compared is what is judged."""
    path = path.parent / EVIDENCE / _name(name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EvidenceError(
            f"{path}: cannot be read: {error.strerror}; it belongs beside report.json"
        ) from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise EvidenceError(f"{path}: found other outcomes than the report's, expected those")
    return content


def _name(part: str) -> str:
    return f"{part}.json" if part == SLICES else f"{part}.safetensors"
