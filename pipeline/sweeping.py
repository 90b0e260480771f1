"""The commands of `secateur sweep`: plan, run, collect.

torch is imported by a plan, and by a run only once its cores are its own.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.markup import escape

from pipeline import processes
from pipeline.reading import RecipeError
from pipeline.statuses import FAILED, INTERRUPTED, guarded, lightly, say
from pipeline.terminal import COLOURS, Bars, err, out, progress, show_report, show_table

if TYPE_CHECKING:  # what takes long to import
    from pipeline.executors import Ended
    from pipeline.sweep import Member

Silence = Callable[[], None]
"""Keeps back what libraries say of themselves, which it imports."""


def plan(options: argparse.Namespace, silence: Silence) -> int:
    """Write the runs of a sweep."""

    def act() -> int:
        from pipeline.planning import default_folder, plan

        folder = options.output or default_folder(options.recipe)
        runs = plan(options.recipe, folder)
        for run in runs:
            picked = ", ".join(f"{place} {word}" for place, word in run.picked.items())
            out.print(escape(f"{run.folder}: {picked}"), soft_wrap=True)
        last = len(runs) - 1
        out.print(
            f"{len(runs)} runs; one of them: secateur sweep run {escape(str(folder))} --index 0 (to"
            f" {last}); all: --executor local",
            soft_wrap=True,
        )
        return 0

    silence()
    return guarded(act)


def run(options: argparse.Namespace, silence: Silence) -> int:
    """Do one run of a sweep, or all."""
    where = f"sweep run {options.folder}"
    act = partial(_one, options, silence) if options.executor is None else partial(_all, options)
    try:
        return lightly(act, where)
    except KeyboardInterrupt:
        return say(INTERRUPTED, "interrupted; run the same command again to go on")


def _one(options: argparse.Namespace, silence: Silence) -> int:
    from pipeline import sweep
    from pipeline.reservation import reserved

    for option, executor in (("slots", "local"), ("address", "ray")):
        if getattr(options, option) is not None:
            raise RecipeError(f"--{option}: expected --executor {executor} beside it")
    member = sweep.member(options.folder.resolve(), options.index, os.environ)

    def act() -> int:
        from pipeline.planning import carry_out

        with progress() as bars:
            report = carry_out(member, Bars(bars))
        if processes.leads():
            show_report(report.to_json(), member.folder)
        return 0

    with ExitStack() as stack:
        if processes.count() == 1:  # else whoever starts them says where each of them runs
            stack.enter_context(sweep.alone(member))
        found = sweep.standing(member)
        if found.report is not None:
            outcome = found.report["verdict"]["outcome"]
            out.print(f"{escape(str(member.folder))}: done: {outcome}", soft_wrap=True)
            return 0
        target = member.recipe["target"]
        if processes.count() == 1:
            waits = f"{member.folder}: waits for {target['threads']} cores that no other run has"
            mine = reserved(
                target["threads"],
                target["device"],
                dedicated=target["dedicated"],
                waits=lambda: err.print(escape(waits), soft_wrap=True),
            )
            stack.enter_context(mine)
        silence()
        return guarded(act)


def _all(options: argparse.Namespace) -> int:
    from pipeline import executors, sweep

    if options.executor == "local" and options.address is not None:
        raise RecipeError("--address: expected --executor ray beside it")
    if options.executor == "ray" and options.slots is not None:
        raise RecipeError("--slots: a Ray cluster's resources decide, expected --executor local")
    runs = sweep.members(options.folder.resolve())
    left = [member for member in runs if sweep.standing(member).report is None]
    out.print(f"{len(runs) - len(left)} of {len(runs)} runs are done", soft_wrap=True)
    if not left:
        return 0
    if options.executor == "local":
        ending = executors.local(left, options.slots or 1)
    else:
        ending = executors.on_ray(left, options.address)
    with progress() as bars, closing(ending):
        return max(_ended(runs, ended) for ended in Bars(bars)(ending, "runs", len(left)))


def _ended(runs: Sequence["Member"], ended: "Ended") -> int:
    """Show how a run ended, and return the exit status that it asks for."""
    from pipeline.sweep import standing

    name, found = runs[ended.index].folder.name, standing(runs[ended.index])
    if found.report is not None:
        outcome = found.report["verdict"]["outcome"]
        out.print(f"{name}: [{COLOURS[outcome]}]{outcome}[/]")
        return 0
    how = f"ended by signal {-ended.status}" if ended.status < 0 else f"status {ended.status}"
    said = ended.said or found.reason
    say(FAILED, f"{name}: not done, {how}: {said}; all it said: {runs[ended.index].folder}/run.log")
    return ended.status if ended.status > 0 else FAILED


def collect(options: argparse.Namespace, silence: Silence) -> int:
    """Join the runs of a sweep."""
    from pipeline.collection import collect, missing_lines, table

    del silence

    def act() -> int:
        folder: Path = options.folder.resolve()
        joined = collect(folder)
        if joined["runs"]:
            show_table(*table(joined, intervals=False))
        _show(joined["notes"])
        out.print(f"joined: {escape(str(folder / 'sweep.md'))}", soft_wrap=True)
        missing = missing_lines(joined)
        if missing:
            found = f"{len(joined['runs'])} of {len(joined['runs']) + len(missing)} runs"
            return say(FAILED, "\n".join([f"{folder}: found {found}, expected all", *missing]))
        return 0

    return lightly(act, f"sweep collect {options.folder}")


def _show(notes: Iterable[str]) -> None:
    for note in notes:
        out.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)


ACTS: Final[Mapping[str, Callable[[argparse.Namespace, Silence], int]]] = {
    "plan": plan,
    "run": run,
    "collect": collect,
}
