"""The folder of a sweep: the plan, a folder for each of its runs, one store for all of them.

`plan.json` holds every recipe as it is to be run; a run is done when its report is of that recipe
and what lies beside it is whole. Nothing here needs torch, so that the runs can be started, and
joined, wherever the folder can be read.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pipeline import judging, manifest
from pipeline.evidence import EvidenceError
from pipeline.manifest import fingerprint
from pipeline.reading import RecipeError
from pipeline.writing import write_text

PLAN, RECIPE, LOG = "plan.json", "recipe.yaml", "run.log"
SCHEMA: Final = 1
INDICES: Final = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")
"""Where Slurm's arrays and Kubernetes' indexed jobs say which one it is."""

State = Literal["done", "missing", "damaged", "stale"]


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    `picked` is what was picked for each value that the sweep's recipe leaves open, in words;
    `recipe` the JSON of the recipe, with all defaults.
    """

    index: int
    folder: Path
    picked: Mapping[str, str]
    recipe: Mapping[str, Any]


@dataclass(frozen=True)
class Standing:
    """How a run stands; with a report if it is done, else with the reason."""

    state: State
    report: Mapping[str, Any] | None = None
    reason: str = ""


def write(folder: Path, picked: Sequence[Mapping[str, str]], recipes: Sequence[Any]) -> None:
    """Write a plan, unless it is there.

    Raises:
        RecipeError: the folder holds something else.
    """
    plan: dict[str, Any] = {
        "schema": SCHEMA,
        "runs": [
            {"picked": dict(words), "recipe": recipe}
            for words, recipe in zip(picked, recipes, strict=True)
        ],
    }
    plan["sha256"] = fingerprint(plan)
    if (folder / PLAN).is_file():
        if _content(folder)["sha256"] != plan["sha256"]:
            raise RecipeError(
                f"{folder}: found the plan of other runs, expected the same or none; name another"
                " folder with --output"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"{folder}: found files but no {PLAN}, expected a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / PLAN, json.dumps(plan, indent=1) + "\n")


def members(folder: Path) -> tuple[Member, ...]:
    """Return the runs of a sweep.

    Raises:
        RecipeError: there is no plan, or it was changed.
    """
    runs = _content(folder)["runs"]
    digits = max(3, len(str(len(runs) - 1)))
    return tuple(
        Member(index, folder / f"{index:0{digits}}", run["picked"], run["recipe"])
        for index, run in enumerate(runs)
    )


def plan_hash(folder: Path) -> str:
    """Return the sha256 of the plan.

    Raises:
        RecipeError: there is no plan, or it was changed.
    """
    return str(_content(folder)["sha256"])


def member(folder: Path, index: int | None, environment: Mapping[str, str]) -> Member:
    """Return the run with an index, unless given that of the scheduler.

    Raises:
        RecipeError: there is no index, or no such run.
    """
    found = members(folder)
    if index is None:
        told = [environment[name] for name in INDICES if name in environment]
        if not told or not told[0].isdecimal():
            raise RecipeError(
                f"sweep run: found no index, expected --index, one of {', '.join(INDICES)} in the"
                " environment, or --executor"
            )
        index = int(told[0])
    if not 0 <= index < len(found):
        raise RecipeError(f"{folder}: found the index {index}, expected 0 to {len(found) - 1}")
    return found[index]


def standing(run: Member) -> Standing:
    """Return how a run stands: its report, the evidence and the artifact are read and compared."""
    path = run.folder / "report.json"
    if not path.is_file():
        return Standing("missing", reason="found no report: not run, or not to its end")
    try:
        report = judging.read(path)
        if report["recipe"] != run.recipe:
            return Standing("stale", reason="found a report of another recipe than the plan's")
        if judging.hashes(run.folder / judging.EVIDENCE) != report["evidence"]:
            return Standing("damaged", reason="found other evidence than its report's")
        if report["verdict"]["outcome"] == "pass":
            manifest.read(run.folder / "artifact")
    except (EvidenceError, manifest.Damaged) as error:
        return Standing("damaged", reason=str(error).partition("\n")[0])
    return Standing("done", report)


@contextmanager
def alone(run: Member) -> Iterator[None]:
    """Hold a run for oneself, and wait for whoever does it."""
    run.folder.mkdir(exist_ok=True)
    with (run.folder / ".running").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _content(folder: Path) -> dict[str, Any]:
    path = folder / PLAN
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        whole = fingerprint({k: v for k, v in plan.items() if k != "sha256"}) == plan["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(f"{path}: no such file, expected one of `secateur sweep plan`") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise RecipeError(f"{path}: cannot be read as a plan: {error!r}") from None
    if not whole or plan.get("schema") != SCHEMA:
        raise RecipeError(
            f"{path}: found another content than its own sha256 says, expected it as"
            " `secateur sweep plan` wrote it; plan again into another folder"
        )
    return dict(plan)
