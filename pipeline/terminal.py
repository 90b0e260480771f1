"""What a user sees in the terminal: tables, verdicts, bars."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:  # it imports torch
    from pipeline.inspection import Inspection
    from pipeline.inventory import Item

T = TypeVar("T")

COLOURS: Final = {"pass": "green", "fail": "red", "inconclusive": "yellow"}

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def show_report(text: str, folder: Path) -> None:
    """Show the table of stages, the checks and the verdict of report.json."""
    import json

    from pipeline.report import busy_note, notes, table

    report = json.loads(text)
    header, rows = table(report, intervals=False)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column(header[0], no_wrap=True)
    for name in header[1:]:
        shown.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    out.print()
    out.print(shown)
    for stage in report["stages"]:
        if lines := notes(stage):
            out.print(f"[dim]{stage['name']}: {escape('; '.join(lines))}[/dim]")
    if note := busy_note(report):
        out.print(f"[yellow]{note}[/]")
    out.print()
    show_verdict(report)
    outcome = report["verdict"]["outcome"]
    kept = "artifact" if outcome == "pass" else "not published, last stage"
    out.print(f"{kept}: {escape(report['artifact'])}", soft_wrap=True)
    out.print(f"report: {escape(str(folder / 'report.html'))}", soft_wrap=True)


def show_verdict(report: Mapping[str, Any]) -> None:
    """Show every check, and what follows from all of them."""
    from pipeline.report import check_line

    verdict = report["verdict"]
    for check in verdict["checks"]:
        out.print(f"  [{COLOURS[check['outcome']]}]{escape(check_line(check))}[/]", soft_wrap=True)
    outcome = verdict["outcome"]
    out.print(f"[bold {COLOURS[outcome]}]{outcome}[/] against {report['baseline']}")


def show_parts(found: "Inspection") -> None:
    """Show parameters and multiply-adds by part."""
    columns = {"parameters": found.parameters}
    if found.multiply_adds is not None:
        columns[f"multiply-adds, 1x{found.sequence}"] = found.multiply_adds
    parts = Table(box=None, pad_edge=False, header_style="bold")
    parts.add_column("part", no_wrap=True)
    for name in columns:
        parts.add_column(name, justify="right", no_wrap=True)
        parts.add_column("share", justify="right", no_wrap=True)
    for part in (*found.parameters, "all"):
        cells = [part]
        for counts in columns.values():
            total = sum(counts.values())
            count = counts.get(part, total)
            cells += [f"{count:,}", f"{count / total:.3f}"]
        parts.add_row(*cells)
    out.print(parts)
    if found.uncounted:
        out.print(f"[yellow]multiply-adds not counted: {escape(found.uncounted)}[/]")


def show_units(found: "Inspection") -> None:
    """Show what can be cut of every layer."""
    if found.refusal:
        out.print(f"[yellow]cannot be cut: {escape(found.refusal)}[/]", soft_wrap=True)
        return
    out.print()
    for stack in found.stacks:
        stays = f"; {stack.stays}" if stack.stays else ""
        text = f"{stack.name}: {stack.left} of {stack.of} layers{stays}"
        out.print(escape(text), soft_wrap=True)
    kinds = ("heads", "queries", "neurons")
    layers = Table(box=None, pad_edge=False, header_style="bold")
    layers.add_column("can be cut", overflow="fold")
    for name in kinds:
        layers.add_column(name, justify="right", no_wrap=True)
    for layer in found.layers:
        layers.add_row(escape(layer.name), *(_left(getattr(layer, name)) for name in kinds))
    out.print(layers)


def _left(count: tuple[int, int] | None) -> str:
    """Return how many units are left, and of how many, if some are gone."""
    if count is None:
        return ""
    left, before = count
    return str(left) if left == before else f"{left} of {before}"


def show_engine(done: str, about: Mapping[str, Any]) -> None:
    """Show what an engine is; `done` says what was done."""
    library, plan, on = about["library"], about["plan"], about["built_on"]
    where = on["name"] if on else "no GPU here"
    text = f"{done}: {library['name']} {library['version']}, {plan['bytes'] / 1e6:.1f} MB, {where}"
    out.print(escape(text), soft_wrap=True)


def show_items(found: Iterable["Item"]) -> None:
    """Show what a store holds: what it is called, how large and how old it is, and its state."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("entry", overflow="fold")
    for name in ("MB", "age"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("state", no_wrap=True)
    for item in found:
        state = item.state if item.needed else f"[yellow]{item.state}[/]"
        size = f"{item.size_bytes / 1e6:,.1f}"
        shown.add_row(escape(item.path.name), size, _age(item.age_seconds), state)
    out.print(shown)


def _age(seconds: float) -> str:
    for name, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"


class Bars:
    """A `track` that shows a bar for every iteration that lasts."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown

    def __call__(self, items: Iterable[T], what: str, total: int) -> Iterable[T]:
        """Yield the items, the bar one further after each."""
        yield from self._shown.track(items, total=total, description=what)


def progress() -> Progress:
    """Return a progress display, to be used in a `with`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
    )
