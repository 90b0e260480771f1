"""How a prune step gets to its shares: at once, in rounds with training between, or by learning.

Every round is two entries of the store, the cut model and the trained one, so that a run that was
killed goes on in the round where it was.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from benchmarks import metrics
from benchmarks.data import DataError
from pipeline import (
    calibration,
    checkpoint,
    costs,
    depth,
    goals,
    native,
    prices,
    processes,
    pruning,
    selfcheck,
    structure,
    training,
)
from pipeline.checkpoint import ModelError
from pipeline.masks import LEARNERS, Masks, Movement
from pipeline.settings import Goal, Limited, Prune, Quantize, Training
from pipeline.store import Entry, NotMade
from pipeline.structure import Kind
from pipeline.work import Artifact, Work


class NothingToCut(ModelError):
    """A share is too small to take a unit."""


def prune(work: Work, step: Prune, before: Artifact, teacher: Artifact | None) -> Entry:
    """Cut, repair and train, as the step says."""
    if step.criterion in LEARNERS:
        assert step.finetune is not None
        return _learn(work, step, step.finetune, before, teacher)
    if step.goal is not None:
        reached = _reach(work, step, step.goal, before)
        if step.finetune is None:
            return reached
        trained = finetune(work, step.finetune, replace(before, entry=reached), teacher)
        about = {
            "details": {**reached.about["details"], **trained.about["details"]},
            "seconds": reached.about["seconds"] + trained.about["seconds"],
        }
        return replace(trained, about={**trained.about, **about})
    if step.finetune is None and step.rounds == 1 and step.allowed is None:
        return _cut(work, step, before)
    return _iterate(work, step, before, teacher)


def finetune(
    work: Work,
    settings: Training,
    before: Artifact,
    teacher: Artifact | None,
    turn: int = 0,
) -> Entry:
    """Train, towards the teacher if there is one; each turn on other windows of the data."""

    def go(unfinished: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        model = checkpoint.from_pretrained(before.entry.folder)
        trained = training.train(work, settings, model, teacher, turn=turn, unfinished=unfinished)
        return model, training.details(trained)

    def make(folder: Path) -> dict[str, Any]:
        model, details = go(folder)
        return work.write(model, folder, details)

    key = {"input": before.entry.digest} | training.key(work, settings, teacher, turn)
    return work.make("finetune", key, make, join=go)


def _cut(work: Work, step: Prune, before: Artifact) -> Entry:
    def make(folder: Path) -> dict[str, Any]:
        model = checkpoint.from_pretrained(before.entry.folder)
        return work.write(model, folder, _choose_and_cut(work, step, model))

    key = {"input": before.entry.digest} | _key(work, step)
    return work.make("prune", key, make)


def _reach(work: Work, step: Prune, goal: Goal, before: Artifact) -> Entry:
    """Cut to a goal; the levels, and what they cost, are entries that other goals use, too."""
    load = work.recipe.target.loads[goal.load]
    # There is one at most, and a recipe without it is refused.
    steps = work.recipe.steps if goal.quantized else ()
    quantize = next((each for each in steps if isinstance(each, Quantize)), None)
    price: costs.Price = prices.parameters
    if goal.multiply_adds:
        price = partial(prices.multiply_adds, sequence=load.sequence)
    elif goal.speedup or goal.latency_ms:
        price = partial(
            prices.latency_ms,
            work=work,
            load=goal.load,
            first=before.entry.digest,
            quantize=quantize,
        )

    def priced(models: costs.Variants) -> dict[str, float]:
        if processes.count() > 1:  # they do not meet inside of what the first one makes
            return dict(price(models))
        key = costing | {"models": sorted(models)}
        about = work.make("priced", key, lambda _: dict(price(models))).about
        return {name: value for name, value in about.items() if name != "seconds"}

    def allowed(dense: float) -> float:
        left = goal.multiply_adds or goal.parameters
        if left:
            return dense * left
        return dense / goal.speedup if goal.speedup else float(goal.latency_ms or 0)

    def make(folder: Path) -> dict[str, Any]:
        model = checkpoint.from_pretrained(before.entry.folder)
        data, total = calibration_batches(work)
        kinds: list[Kind] = [kind for kind in goal.units if kind != "layers"]
        try:
            reached = goals.reach(
                model,
                kinds,
                allowed,
                priced,
                criterion=step.criterion,
                repair=step.repair,
                multiple=step.multiple,
                searched=goal.search,
                seed=work.recipe.seed,
                layers="layers" in goal.units,
                data=data,
                held_out=list(held_out(work)),
                total=total,
                keep=partial(_keep, work, step, before, kinds) if processes.count() == 1 else None,
                track=work.track,
            )
        except costs.OutOfReach as error:
            raise ModelError(str(error)) from error
        except prices.Uncountable as error:
            raise ModelError(
                f"goal.multiply_adds: {error}; expected parameters or speedup"
            ) from error
        details = _details(model, reached.choice) | {
            "goal": goal.model_dump(mode="json", exclude_none=True),
            "dense_cost": reached.dense_cost,
            "predicted_cost": reached.predicted_cost,
            "divergence_first_and_searched": reached.divergence,
            "dropped_layers": reached.layers,
        }
        return work.write(model, folder, details)

    bits = {"quantize": quantize and quantize.model_dump(mode="json")}
    costing = bits | {
        "input": before.entry.digest,
        "goal": goal.model_dump(mode="json", include={"units", "load"}),
        "by": price.func.__name__ if isinstance(price, partial) else price.__name__,
        "target": work.described()["target"],
        "machine": work.machine.identity(),
    }
    machine = {"machine": work.machine.identity()} if goal.speedup or goal.latency_ms else {}
    key = {"input": before.entry.digest, "target": costing["target"]} | machine | bits
    return work.make("prune", key | _key(work, step) | {"seed": work.recipe.seed}, make)


def _keep(
    work: Work,
    step: Prune,
    before: Artifact,
    kinds: Sequence[Kind],
    make: Callable[[Path], None],
) -> Path:
    """Return the folder of levels, which other goals use, too."""

    def made(folder: Path) -> dict[str, Any]:
        make(folder)
        return {}

    key = {
        "input": before.entry.digest,
        "levels": [*kinds, step.criterion, step.repair, step.multiple],
        "data": work.evidence("calibration"),
        "seed": work.recipe.seed,
    }
    return work.make("levels", key, made).folder


def _learn(
    work: Work, step: Prune, settings: Training, before: Artifact, teacher: Artifact | None
) -> Entry:
    """Train with masks, or watching the weights, and cut what that shows to be worth least."""

    def go(unfinished: Path) -> tuple[PreTrainedModel, Movement | Masks, dict[str, Any]]:
        model = checkpoint.from_pretrained(before.entry.folder)
        nn.Module.to(model, work.recipe.target.device)
        selfcheck.ensure(model)
        groups = [g for g in structure.groups(model) if g.kept and _shares(step).get(g.kind)]
        learner = LEARNERS[step.criterion](groups, _shares(step))
        trained = training.train(
            work, settings, model, teacher, learner=learner, unfinished=unfinished
        )
        return model, learner, training.details(trained)

    def make(folder: Path) -> dict[str, Any]:
        model, learner, details = go(folder)
        learner.finish()
        return work.write(model, folder, details | _choose_and_cut(work, step, model, learner))

    key = {"input": before.entry.digest} | _key(work, step) | training.key(work, settings, teacher)
    return work.make("prune", key, make, join=go)


def _iterate(work: Work, step: Prune, before: Artifact, teacher: Artifact | None) -> Entry:
    """Return the last round's entry, or the last one that is within the step's limit."""
    reference = None if step.allowed is None else _selection_score(work, before.entry)
    now, rounds = before, list[dict[str, Any]]()
    details: dict[str, Any] = {"removed": {}}
    seconds = 0.0
    for at in range(1, step.rounds + 1):
        shares = {
            kind: _share_of_rest(before.entry, now.entry, kind, share * at / step.rounds)
            for kind, share in _shares(step).items()
        }
        if not any(shares.values()) and not (step.layers or step.sublayers):
            continue
        part = {"rounds": 1, "finetune": None, **dict.fromkeys(Limited.model_fields)} | shares
        try:
            entry = _cut(work, step.model_copy(update=part), now)
        except (NothingToCut, NotMade):
            # Too small a part for `multiple`, or every layer is at its last unit. Of several
            # processes only the first can tell; if it failed, all of them end with it.
            continue
        cut = entry.about
        if step.finetune is not None:
            entry = finetune(work, step.finetune, replace(now, entry=entry), teacher, turn=at)
        seconds += cut["seconds"] + (entry.about["seconds"] if step.finetune else 0.0)
        done: dict[str, Any] = {k: sum(entry.about[k]) for k in ("heads", "neurons")}
        if reference is not None and step.allowed is not None:
            score = _selection_score(work, entry)
            taken = metrics.lost(work.metric, reference, score)
            done |= {"selection": score, "kept": taken <= step.allowed}
        rounds.append(done)
        if not done.get("kept", True):
            break
        now = replace(now, entry=entry)
        for path, units in cut["details"]["removed"].items():
            details["removed"][path] = sorted([*details["removed"].get(path, []), *units])
        for name in ("scores", "scored"):  # of the first round, which saw all of them
            details.setdefault(name, cut["details"][name])
        kept = ("dropped_layers", "dropped_sublayers", "repairs")
        details |= {name: cut["details"][name] for name in kept if name in cut["details"]}
    if not rounds:
        raise NothingToCut("prune: found nothing to cut in any round, expected a larger share")
    details |= {"rounds": rounds, "selection_before": reference}
    about = {**now.entry.about, "seconds": seconds, "details": details}
    return replace(now.entry, about=about)


def _choose_and_cut(
    work: Work, step: Prune, model: PreTrainedModel, learner: Movement | Masks | None = None
) -> dict[str, Any]:
    """Cut, and return what a report says of it."""
    data, total = calibration_batches(work) if step.calibrated else (lambda: iter(()), 0)
    depths: dict[str, dict[str, float]] = {}
    judged = list(held_out(work)) if step.layers or step.sublayers else []
    if step.layers:
        try:
            depths["layers"] = depth.drop_layers(model, step.layers, judged, track=work.track)
        except ValueError as error:
            raise ModelError(f"prune.layers: {error}") from error
    if step.sublayers:
        depths["sublayers"] = depth.drop_sublayers(
            model,
            step.sublayers,
            judged,
            repair=step.repair,
            data=data,
            total=total,
            track=work.track,
        )
    choice = pruning.choose_and_cut(
        model,
        _shares(step),
        criterion=step.criterion,
        repair=step.repair,
        uniform=step.uniform or step.per_layer,
        multiple=step.multiple,
        seed=work.recipe.seed,
        learned=learner.scores() if learner else None,
        data=data,
        total=total,
        track=work.track,
    )
    if not any(choice.removed.values()) and not any(depths.values()):
        raise NothingToCut(
            f"prune: found nothing to cut with heads: {step.heads:g}, neurons: {step.neurons:g},"
            f" layers: {step.layers:g}, sublayers: {step.sublayers:g}, multiple: {step.multiple},"
            " expected a share that takes a unit; every layer keeps one"
        )
    if step.uniform:
        native.configure(model)
    return _details(model, choice) | {f"dropped_{what}": gone for what, gone in depths.items()}


def calibration_batches(work: Work) -> tuple[Callable[[], Iterator[calibration.Batch]], int]:
    """Return what gives the calibration batches, anew each time, and their number."""
    examples = work.examples("calibration")
    windows = sum(len(example.windows) for example in examples)
    if windows < calibration.HELD_OUT_EVERY:
        raise DataError(
            f"task.splits.calibration: found {windows} windows, expected at least"
            f" {calibration.HELD_OUT_EVERY}, of which one is held out"
        )
    give = partial(calibration.batches, examples, work.padding, calibration.BATCH)
    return give, -(-windows // calibration.BATCH)


def held_out(work: Work) -> Iterator[calibration.Batch]:
    """Yield a part of the calibration data, to compare outputs on."""
    examples, every = work.examples("calibration"), calibration.HELD_OUT_EVERY
    return calibration.batches(examples, work.padding, calibration.BATCH, every=every)


def _details(model: PreTrainedModel, choice: pruning.Choice) -> dict[str, Any]:
    """Return what a report says of a cut; of neurons there are too many to list."""
    heads = pruning.units(model).heads
    found: dict[str, Any] = {
        what: {path: units for path, units in of_each.items() if path in heads}
        for what, of_each in (
            ("scores", choice.scores),
            ("scored", choice.scored),
            ("removed", choice.removed),
        )
    }
    return found | {"repairs": choice.repairs}


def _key(work: Work, step: Prune) -> dict[str, Any]:
    return {
        "step": step.model_dump(mode="json", exclude={"finetune"}),
        "data": work.evidence("calibration") if step.calibrated else None,
        "seed": work.recipe.seed if step.criterion == "random" else None,
    }


def _shares(step: Prune) -> dict[Kind, float]:
    return {"heads": step.heads, "neurons": step.neurons}


def _share_of_rest(first: Entry, now: Entry, kind: Kind, share: float) -> float:
    """Return the share of the units that are left which takes `share` of those that there were."""
    there, left = sum(first.about[kind]), sum(now.about[kind])
    return max(0, left - there + round(share * there)) / max(left, 1)


def _selection_score(work: Work, entry: Entry) -> float:
    def make(_: Path) -> dict[str, Any]:
        score = training.score(work, checkpoint.from_pretrained(entry.folder))
        better = metrics.METRICS[work.metric].higher_is_better
        return {"score": score if better else -score}  # training has higher ones be better

    key = {
        "artifact": entry.digest,
        "selection": work.evidence("selection"),
        "metric": work.metric,
    }
    found: float = work.make("selected", key, make).about["score"]
    return found
