"""`search`: the fastest, or smallest, artifact within the budget, among the recipes of a file.

Candidates are proposed by Optuna, or listed if there are no more of them than trials. Each is
looked at in three steps, the cheapest first (trials.py), and left as soon as another one makes it
needless (front.py). All of that judges by the selection split. The best one then meets the gate
split, in a run like any other, and if that is no pass the next one does, `finalists` of them at
most, also if a search goes on, each at confidence 1 - (1 - confidence) / finalists: so one that
loses more than the budget is accepted with probability 1 - confidence at most, however many were
tried (Bonferroni).

Nothing is kept but the store: a search that was killed makes the same proposals again, and finds
there what it knew of them, but for failures.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from benchmarks.accuracy import Track, silent
from benchmarks.worker import WorkerError
from exporters import ExportError
from pipeline import front, ledger, processes, search_page, search_report, space
from pipeline.budget import Budget
from pipeline.checkpoint import ModelError
from pipeline.finetuning import TrainingError
from pipeline.front import Candidate, Finalist, Found, Settings
from pipeline.inventory import STAGES
from pipeline.mistakes import explain
from pipeline.proposals import Proposals
from pipeline.quantization import QuantizationError
from pipeline.reading import RecipeError
from pipeline.recipe import Recipe
from pipeline.runner import check_target, default_output, run
from pipeline.space import Space
from pipeline.store import withdraw
from pipeline.trials import digest, foresee, measure, screen
from pipeline.work import Work
from pipeline.writing import write_text

FAILURES: Final = (
    ModelError,
    QuantizationError,
    ExportError,
    TrainingError,
    WorkerError,
    FloatingPointError,
)
"""What a candidate may end by, while the search goes on."""
ASKED: Final = 20
"""So many times the trials are proposals made at most: some are no recipe, or were made before."""


def search(
    path: str | Path,
    output: str | Path | None = None,
    *,
    trials: int | None = None,
    seconds: float | None = None,
    tell: Callable[[Found], None] = lambda _: None,
    track: Track = silent,
) -> Found:
    """Search, run the best candidate, and return all that was found.

    Writes below `output` what `run` writes, and search.json, search.md and search.html, after every
    candidate.

    Args:
        path: of a recipe with open values.
        output: the folder for everything that is written.
        trials: in place of the file's.
        seconds: in place of the file's.
        tell: is told what was found, after every candidate and every finalist.
        track: shows progress.

    Raises:
        RecipeError: what the file says cannot be searched, or makes no sense.
        DataError, ModelError, Unavailable, NotHere, MissingDependency, EvidenceError, WorkerError,
            OSError: as of `run`.
    """
    opened, settings, recipes = read(path)
    first = recipes[0]
    limits = {"trials": trials, "seconds": seconds}
    settings = settings.model_copy(update={n: v for n, v in limits.items() if v is not None})
    for recipe in recipes:
        check_target(recipe)
    output = Path(output or default_output(path))
    # With notes of its own in the store: those of the finalists' runs are not all that it uses.
    work = Work(first, output, fresh=False, track=track, store=output / STAGES)
    confidence = as_finalist(first, settings).budget.confidence
    found = Found(first, work.metric, settings, confidence, ())

    def note(**changes: Any) -> Found:
        now = replace(found, **changes)
        _write(now, output)
        tell(now)
        return now

    proposals = Proposals(opened, settings.trials, first.seed)
    for candidates in _explore(work, opened, settings, proposals):
        found = note(candidates=candidates)
    found = replace(found, fewer=_fewer(found, proposals))
    why = ""
    for candidate in front.finalists(found.candidates, settings.best):
        judged = {*ledger.judged(output, (each.id for each in work.examples("gate")))}
        if len(judged | {digest(work, candidate.recipe)}) > settings.finalists:
            why = f"the gate split has judged {len(judged)} candidates, as many as `finalists`"
            break
        report = run(as_finalist(candidate.recipe, settings), output, track=track)
        found = note(finalists=(*found.finalists, Finalist(candidate, report)))
        if report.verdict.outcome == "pass":
            break
    if not found.finalists:
        withdraw(output / "artifact")  # that of an earlier search
    work.store.finish()
    return note(ended=True, note=why)


def _write(found: Found, output: Path) -> None:
    content = search_report.content(found)
    write_text(output / "search.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_text(output / "search.md", search_report.markdown(content))
    write_text(output / "search.html", search_page.page(content))


def read(path: str | Path) -> tuple[Space, Settings, list[Recipe]]:
    """Return the space of a file, how it is searched, and recipes with every choice and end.

    Raises:
        RecipeError: it cannot be searched.
    """
    opened, content = space.read(path)
    try:
        settings = Settings.model_validate(content)
    except ValidationError as error:
        raise RecipeError(
            explain(opened.path, error, {"": [Settings]}).replace("\n  ", "\n  search.")
        ) from None
    recipes = opened.check()
    first = recipes[0]
    where = opened.path
    if not opened.open:
        raise RecipeError(
            f"{where}: found no open value, expected one (choose, from); or use `secateur run`"
        )
    if processes.count() > 1:
        raise RecipeError(f"{where}: found {processes.count()} processes, expected one to search")
    if first.task.splits.selection is None:
        raise RecipeError(
            f"{where}: expected task.splits.selection, on which candidates are judged"
        )
    if not first.budget.of_quality:
        raise RecipeError(
            f"{where}: budget: found no limit of quality, expected one, such as max_drop; without"
            " it the smallest model is the best"
        )
    open_at = min(int(place.split(".")[1]) for place in opened.open)
    if open_at < first.baseline_at:
        raise RecipeError(
            f"{where}: steps.{open_at}: found an open value before the baseline {first.baseline!r},"
            " expected one baseline for all"
        )
    try:
        as_finalist(first, settings)
    except ValidationError as error:
        at = 1 - (1 - first.budget.confidence) / settings.finalists
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise RecipeError(
            f"{where}: search.finalists: found {settings.finalists}, with which each is judged at"
            f" {at:.4g}; {reason}"
        ) from None
    return opened, settings, recipes


def as_finalist(recipe: Recipe, settings: Settings) -> Recipe:
    """Return the recipe as it is judged on the gate split: at its share of the error."""
    confidence = 1 - (1 - recipe.budget.confidence) / settings.finalists
    budget = Budget.model_validate(
        recipe.budget.model_dump() | {"confidence": round(confidence, 12)}
    )
    return recipe.model_copy(update={"budget": budget})


def _fewer(found: Found, proposals: Proposals) -> str:
    """Return why there are fewer candidates than trials, if there are."""
    tried, trials = len(found.candidates), found.settings.trials
    if tried == trials:
        return ""
    if proposals.nothing_left:
        return f"There are no more recipes than these {tried}."
    if _spent(found.candidates) >= found.settings.seconds:
        return f"The time was over after {tried} of {trials} trials."
    return f"Of {ASKED * trials} proposals {tried} were new recipes, of {trials} trials."


def _spent(candidates: Sequence[Candidate]) -> float:
    return sum(candidate.seconds for candidate in candidates)


def _explore(
    work: Work, opened: Space, settings: Settings, proposals: Proposals
) -> Iterator[tuple[Candidate, ...]]:
    """Yield the candidates so far, after each."""
    candidates: list[Candidate] = []
    for _ in range(ASKED * settings.trials):
        if len(candidates) == settings.trials or _spent(candidates) >= settings.seconds:
            return
        picked = proposals.ask()
        if picked is None:
            return
        try:
            recipe = opened.recipe(lambda place, _, p=picked: p[place])  # type: ignore[misc]
        except RecipeError:  # what was picked does not go together
            proposals.tell(None)
            continue
        tried = next((c for c in candidates if c.recipe == recipe), None)
        if tried is None:
            words = {place: opened.open[place].words(value) for place, value in picked.items()}
            fresh = Candidate(len(candidates) + 1, words, recipe)
            tried = _try(work, fresh, candidates, settings)
            candidates.append(tried)
            yield tuple(candidates)
        if tried.state == "failed":
            proposals.tell(None)
        else:
            proposals.tell(tried.merit(settings.best), tried.violation)


def _try(
    work: Work, candidate: Candidate, others: Sequence[Candidate], settings: Settings
) -> Candidate:
    """Return what is known of a candidate, as much as it is worth to know."""
    begun = time.monotonic()
    try:
        candidate = replace(candidate, foreseen=foresee(work, candidate.recipe))
        if other := front.dominated(candidate, others, settings.best):
            why = f"{other.number} is better, and nearer to the uncut model"
            return replace(candidate, state="dominated", why=why, inherited=other.violation)
        screened = screen(work, candidate.recipe, settings.screen)
        candidate = replace(candidate, screened=screened)
        if worse := next((c for c in screened.checks if c.outcome == "fail"), None):
            why = f"{worse.what} {worse.estimate:.4g}, at most {worse.allowed:g}"
            return replace(candidate, state="screened out", why=why)
        if other := front.beaten(candidate, others, settings.best):
            why = f"{other.number} is better, and lost no more on the same part"
            return replace(candidate, state="screened out", why=why)
        return replace(candidate, measured=measure(work, candidate.recipe))
    except FAILURES as error:
        why, took = " ".join(str(error).split()), time.monotonic() - begun
        return replace(candidate, state="failed", why=why, took=took)
