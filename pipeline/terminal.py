"""What a user sees in the terminal: tables, verdicts, bars."""

from collections.abc import Callable, Iterable, Mapping, Sequence
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

if TYPE_CHECKING:  # what takes long to import
    from pipeline.budget import Budget, Slices
    from pipeline.comparison import Comparison
    from pipeline.front import Found
    from pipeline.inspection import Inspection
    from pipeline.inventory import Item
    from pipeline.power import Plan

T = TypeVar("T")

COLOURS: Final = {"pass": "green", "fail": "red", "inconclusive": "yellow"}

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def show_report(text: str, folder: Path) -> None:
    """Show the table of stages, the checks and the verdict of report.json."""
    import json

    from pipeline.report import busy_note, dropped_note, notes, table, uses_note

    report = json.loads(text)
    out.print()
    show_table(*table(report, intervals=False))
    for stage in report["stages"]:
        if lines := notes(stage):
            out.print(f"[dim]{stage['name']}: {escape('; '.join(lines))}[/dim]")
    dropped = report["data"].get("dropped", {})
    for note in (busy_note(report), uses_note(report), dropped_note(dropped)):
        if note:
            out.print(f"[yellow]{note}[/]", soft_wrap=True)
    out.print()
    show_verdict(report)
    outcome = report["verdict"]["outcome"]
    kept = "artifact" if outcome == "pass" else "not published, last stage"
    out.print(f"{kept}: {escape(report['artifact'])}", soft_wrap=True)
    out.print(f"report: {escape(str(folder / 'report.html'))}", soft_wrap=True)


def show_candidate(found: "Found") -> None:
    """Show the candidate of a search that was tried last, or what the gate said of it."""
    from pipeline import search_report

    content = search_report.content(found)
    if found.ended:
        return
    if found.finalists:
        last = found.finalists[-1]
        outcome = last.report.verdict.outcome
        text = f"[{COLOURS[outcome]}]{outcome}[/] on the gate split"
        out.print(f"candidate {last.candidate.number}: {text}")
    elif content["candidates"]:
        titles = search_report.header(content)
        cells = search_report.row(content, content["candidates"][-1])
        rest = ", ".join(
            f"{title} {cell}" for title, cell in zip(titles[2:], cells[2:], strict=True) if cell
        )
        seconds = found.candidates[-1].seconds
        text = f"candidate {cells[0]}: {cells[1]}: {rest}; {seconds:.0f} s"
        out.print(escape(text), soft_wrap=True)


def show_search(found: "Found", folder: Path) -> None:
    """Show all candidates of a search, the checks of the last that met the gate, and the result."""
    from pipeline import search_report

    content = search_report.content(found)
    out.print()
    rows = [search_report.row(content, each) for each in content["candidates"]]
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in search_report.header(content):
        shown.add_column(title)
    for cells in rows:
        shown.add_row(*map(escape, cells))
    out.print(shown)
    out.print("[dim]* on the front: no other one is better in both[/]\n")
    if found.finalists:
        import json

        show_verdict(json.loads(found.finalists[-1].report.to_json()))
        out.print()
    out.print(escape(search_report.result(content)), soft_wrap=True)
    if content["artifact"]:
        out.print(f"artifact: {escape(content['artifact'])}", soft_wrap=True)
    out.print(f"report: {escape(str(folder / 'search.html'))}", soft_wrap=True)


def show_comparison(found: "Comparison", names: tuple[str, str]) -> None:
    """Show what two runs were asked for, and what came out, and what that comes to."""
    from pipeline.comparison import SIDES, results, warnings

    for side, name, report in zip(SIDES, names, found.reports, strict=True):
        outcome = report["verdict"]["outcome"]
        text = f"{side}: {escape(name)}: [{COLOURS[outcome]}]{outcome}[/]"
        out.print(f"{text} against {escape(report['baseline'])}", soft_wrap=True)
    out.print()
    for name, *values in found.differences:
        out.print(escape(f"{name}: {' | '.join(values)}"), soft_wrap=True)
    if not found.differences:
        out.print("the same recipe, data, machine and versions")
    out.print()
    show_table(found.header, found.rows)
    out.print("\nthe result of b against that of a")
    for line in results(found):
        out.print(f"  {escape(line)}", soft_wrap=True)
    for line in warnings(found):
        out.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)


def show_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Show a table whose first column is a name, and the others numbers."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column(header[0], no_wrap=True)
    for name in header[1:]:
        shown.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*map(escape, row))
    out.print(shown)


def show_verdict(report: Mapping[str, Any]) -> None:
    """Show every check, and what follows from all of them."""
    from pipeline.report import check_line

    verdict = report["verdict"]
    for check in verdict["checks"]:
        out.print(f"  [{COLOURS[check['outcome']]}]{escape(check_line(check))}[/]", soft_wrap=True)
    outcome = verdict["outcome"]
    out.print(f"[bold {COLOURS[outcome]}]{outcome}[/] against {report['baseline']}")


def show_plans(budget: "Budget", metric: str, examples: int, slices: Mapping[str, int]) -> bool:
    """Show what so many examples can decide, and return whether all of it can be."""
    from pipeline import power

    plans = power.plans(budget, metric, examples)
    for plan in plans:
        _show_plan(plan)
    if not plans:
        out.print("  no limit of the score: the number of examples decides nothing")
    decided = not any(plan.hopeless for plan in plans)
    if budget.slices:
        least = power.least(budget.slices, metric, budget.confidence)
        decided &= _show_slices(budget.slices, slices, least)
    return decided


def _show_plan(plan: "Plan") -> None:
    documents = plan.limit.endswith("max_perplexity_ratio")
    differ = "spread over documents, nats a token" if documents else "flipped"
    then = "if nothing is lost in truth:"
    if not plan.rows:
        then = f"equal outcomes pass with {plan.least:,} examples or more"
    out.print(
        f"  {plan.limit} {plan.allowed:g}, {plan.examples:,} examples, confidence"
        f" {plan.confidence:g}; {then}",
        soft_wrap=True,
    )
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for name in (f"    {differ}", "a pass in", "examples for 80 %"):
        rows.add_column(name, justify="right", no_wrap=True)
    for row in plan.rows:
        share = f"{row.differ:g}" if documents else f"{row.differ:.0%}"
        rows.add_row(share, f"{row.chance:.0%}", f"{row.needed:,}")
    if plan.rows:
        out.print(rows)
    if plan.hopeless:
        more = plan.least - plan.examples
        out.print(
            f"  [yellow]too few: equal outcomes pass with {plan.least:,} examples or more,"
            f" {more:,} more; what passes with fewer is luck[/]",
            soft_wrap=True,
        )


def _show_slices(limits: "Slices", sizes: Mapping[str, int], least: int) -> bool:
    asked = limits.min_examples
    each = max(least, asked) if isinstance(asked, int) else least
    out.print(escape(f"  slices of {limits.column}, each needs {each:,} examples or more:"))
    few = {value for value, size in sizes.items() if size < max(least, limits.least(value))}
    for value, size in sorted(sizes.items()):
        too = value in few
        out.print(escape(f"    {value}: {size:,}{', too few' * too}"), style="yellow" * too)
    return not few


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


def show_bench(found: Mapping[str, Any]) -> None:
    """Show what was measured of artifacts beside one another."""
    from pipeline.report import BUSY

    artifacts = found["artifacts"]
    on_device = ["MB on device"] * any(a["device_bytes"] is not None for a in artifacts)
    show_table(
        ("artifact", "runtime", "MB", "parameters", "load s", "first ms", "peak MB", *on_device),
        [
            (
                each["name"],
                each["runtime"],
                f"{each['size_bytes'] / 1e6:.2f}",
                _or_dash("{:,}", each["parameters"]),
                f"{each['load_seconds']:.2f}",
                f"{each['first_call_ms'][0]:.1f}",
                f"{each['peak_rss_bytes'] / 1e6:.0f}",
                *(_megabytes(each["device_bytes"]) for _ in on_device),
            )
            for each in artifacts
        ],
    )
    for at, first in enumerate(artifacts[0]["results"]):
        offline = found["settings"]["scenario"] == "offline"
        shape = "" if offline else f"{first['batch']}x"
        shape += f"{first['sequence']}" + " tokens" * offline
        out.print(
            f"\n[bold]{found['settings']['scenario']}, {shape}[/], {first['turns']} turns each"
        )
        results = [(each["name"], each["results"][at]) for each in artifacts]
        for columns in (TIMES, WORK):
            there = [
                name
                for name in columns
                if any(_cell(columns, name, result) is not None for _, result in results)
            ]
            if there:
                show_table(
                    ("artifact", *there),
                    [
                        (name, *(_cell(columns, each, result) or "-" for each in there))
                        for name, result in results
                    ],
                )
        for name, result in results:
            if reason := result.get("reason"):
                out.print(f"[dim]{escape(f'{name}: {reason}')}[/]", soft_wrap=True)
    stalled = found["machine"]["stalled"]["cpu"]
    if stalled is not None and stalled > BUSY:
        out.print(
            f"[yellow]the machine was busy: tasks waited {stalled:.0%} of the time for a core[/]"
        )


Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]


def _cell(columns: Columns, name: str, result: Mapping[str, Any]) -> str | None:
    """Return what a column shows of a result, None where it has no such thing."""
    try:
        return columns[name](result)
    except (KeyError, TypeError):
        return None


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"


def _or_dash(pattern: str, value: object) -> str:
    return "-" if value is None else pattern.format(value)


TIMES: Final[Columns] = {
    "instances": lambda r: f"{r['instances']}, batch {r['batch']}",
    "p50 ms": lambda r: _or_dash("{:.2f}", r["latency_ms"]["p50"]),
    "p90": lambda r: _or_dash("{:.2f}", r["latency_ms"]["p90"]),
    "p95": lambda r: _or_dash("{:.2f}", r["latency_ms"]["p95"]),
    "p99": lambda r: _or_dash("{:.2f}", r["latency_ms"]["p99"]),
    "ms without copies": lambda r: f"{r['resident_ms']:.2f}",
    "first token ms": lambda r: _or_dash("{:.2f}", r["first_token_ms"]["p50"]),
    "other tokens ms": lambda r: _or_dash("{:.2f}", r["token_ms"]["p50"]),
    "tokens per s": lambda r: f"{r['tokens_per_s']:.1f}",
    "per s": lambda r: f"{r['throughput_per_s']:.1f}",
    "LoadGen p50": lambda r: f"{r['loadgen']['result_50.00_percentile_latency_ns'] / 1e6:.2f}",
    "LoadGen per s": lambda r: f"{r['loadgen']['result_samples_per_second']:.1f}",
    "speed": lambda r: "{value:.2f} ({low:.2f}-{high:.2f})".format(**r["ratio"]),
    "verdict": lambda r: r["verdict"],
}
WORK: Final[Columns] = {
    "million multiply-adds": lambda r: f"{sum(r['multiply_adds'].values()) / 1e6:,.1f}",
    "of peak rate": lambda r: f"{r['limit']['compute']:.0%}",
    "of reading weights": lambda r: f"{r['limit']['weights']:.0%}",
    "nodes on the CPU": lambda r: str(r["nodes"].get("CPUExecutionProvider", 0)),
    "watts": lambda r: f"{r['watts']:.1f}",
}


class Bars:
    """A `track` that shows a bar for every iteration that lasts."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown

    def __call__(self, items: Iterable[T], what: str, total: int) -> Iterable[T]:
        """Yield the items, the bar one further after each; it stands still if they are not all."""
        task = self._shown.add_task(what, total=total)
        try:
            for item in items:
                yield item
                self._shown.advance(task)
        finally:
            self._shown.stop_task(task)


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
