"""The command line: arguments, what is shown, and the exit code. Nothing else prints.

0 within the budget    1 a budget is violated    2 the recipe, model, data or arguments are wrong
3 inconclusive         4 the target or a dependency is not available here
5 a stage failed       130 interrupted
"""

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

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

T = TypeVar("T")

CODES: Final = {"pass": 0, "fail": 1, "inconclusive": 3}
WRONG, UNAVAILABLE, FAILED, INTERRUPTED = 2, 4, 5, 130
COLOURS: Final = {"pass": "green", "fail": "red", "inconclusive": "yellow"}

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Do what the arguments say, and exit."""
    options = _parser().parse_args(arguments)
    if options.command is _verify:
        sys.exit(_verify(options))  # where it is done there may be no torch
    _silence()
    sys.exit(_guarded(lambda: options.command(options)))


def run(options: argparse.Namespace) -> NoReturn:
    """Run a recipe, and exit; `options` are those of `run_arguments`."""
    _silence()
    sys.exit(_guarded(lambda: _run(options)))


def convert(options: argparse.Namespace) -> NoReturn:
    """Build an engine without a recipe, and exit."""
    _silence()
    sys.exit(_guarded(lambda: _convert(options)))


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run`."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/<recipe>")
    parser.add_argument("--fresh", action="store_true", help="do every step again")
    parser.add_argument(
        "--push", metavar="ORG/NAME", help="upload the artifact to the hub if the verdict is a pass"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="secateur",
        description="Prune, quantize and export Hugging Face transformers: measured at every stage,"
        " judged by a gate.",
        epilog="exit codes: 0 within the budget, 1 a budget is violated, 2 recipe, model, data or"
        " arguments are wrong, 3 inconclusive, 4 target or dependency not available, 5 a stage"
        " failed, 130 interrupted",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run the whole pipeline; resumes by itself")
    run_arguments(run)
    run.set_defaults(command=_run)
    check = commands.add_parser("check", help="resolve recipes, and say what would run")
    check.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE")
    check.set_defaults(command=_check)
    inspect = commands.add_parser("inspect", help="what a model is made of, and what can be cut")
    inspect.add_argument(
        "model", metavar="MODEL", help="folder, hub id, builtin:minilm, or a recipe (.yaml)"
    )
    inspect.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="with a recipe: score all heads on its calibration data, and draw them (.svg, .png)",
    )
    inspect.add_argument("--sequence", type=int, default=128, help="tokens; default: 128")
    inspect.add_argument(
        "--per-layer-config",
        type=Path,
        metavar="FILE",
        help="write the configuration of a pruned folder in transformers' schema for such models",
    )
    inspect.set_defaults(command=_inspect)
    verify = commands.add_parser(
        "verify", help="whether a released artifact is what was released; without torch"
    )
    verify.add_argument("folder", type=Path, metavar="FOLDER")
    verify.set_defaults(command=_verify)
    rebuild = commands.add_parser(
        "rebuild", help="make the TensorRT engine of an artifact again, on this machine"
    )
    rebuild.add_argument("folder", type=Path, metavar="FOLDER")
    rebuild.set_defaults(command=_rebuild)
    doctor = commands.add_parser("doctor", help="what this machine can run")
    doctor.set_defaults(command=_doctor)
    return parser


def _guarded(act: Callable[[], int]) -> int:  # noqa: PLR0911 - one a kind of error
    """Return the exit code of what is done; errors that a user can mend are shown as one line."""
    from safetensors import SafetensorError

    from benchmarks.data import DataError
    from benchmarks.machine import Unavailable
    from benchmarks.worker import WorkerError
    from exporters import ExportError, MissingDependency, NotHere
    from pipeline.checkpoint import ModelError
    from pipeline.finetuning import TrainingError
    from pipeline.gate import EvidenceError
    from pipeline.quantization import QuantizationError
    from pipeline.recipe import RecipeError

    wrong = (RecipeError, DataError, ModelError, EvidenceError)
    unavailable = (Unavailable, MissingDependency, NotHere)
    failed = (
        WorkerError,
        TrainingError,
        ExportError,
        QuantizationError,
        FloatingPointError,
        MemoryError,
        SafetensorError,
    )
    try:
        return act()
    except wrong as error:
        return _say(WRONG, error)
    except unavailable as error:
        return _say(UNAVAILABLE, error)
    except failed as error:
        return _say(FAILED, str(error) or "out of memory; choose a smaller batch or model")
    except OSError as error:
        return _say(*_disk(error))
    except KeyboardInterrupt:
        return _say(INTERRUPTED, "interrupted; run the same command again to go on")
    except Exception as error:  # noqa: BLE001 - status 1 would say that a budget is violated
        err.print_exception()
        return _say(FAILED, f"{type(error).__name__}: {error}; please report it with what is above")


def _disk(error: OSError) -> tuple[int, str]:
    """Return code and message for a file that cannot be written or read."""
    where = error.filename or "output"
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return FAILED, f"{where}: no space left; free some, and run the same command again"
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}:
        return WRONG, f"{where}: cannot be written or read: {error.strerror}"
    return FAILED, f"{where}: {error}"


def _say(code: int, message: object) -> int:
    err.print(f"secateur: {escape(str(message))}", soft_wrap=True)
    return code


def _run(options: argparse.Namespace) -> int:
    from benchmarks.accuracy import silent
    from pipeline import processes
    from pipeline.runner import run

    if not processes.leads():  # torchrun started it beside the one that shows what happens
        report = run(options.recipe, options.output, fresh=options.fresh, track=silent)
        return CODES[report.verdict.outcome]
    with _progress() as progress:
        report = run(options.recipe, options.output, fresh=options.fresh, track=_Bars(progress))
    _show(report.to_json(), options)
    if options.push and report.verdict.outcome == "pass":
        from pipeline.hub import push

        out.print(f"on the hub: {push(Path(report.artifact), options.push)}", soft_wrap=True)
    return CODES[report.verdict.outcome]


def _show(text: str, options: argparse.Namespace) -> None:
    import json

    from pipeline.report import busy_note, check_line, notes, table
    from pipeline.runner import default_output

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
    verdict = report["verdict"]
    out.print()
    for check in verdict["checks"]:
        out.print(f"  [{COLOURS[check['outcome']]}]{escape(check_line(check))}[/]", soft_wrap=True)
    outcome = verdict["outcome"]
    out.print(f"[bold {COLOURS[outcome]}]{outcome}[/] against {report['baseline']}")
    folder = options.output or default_output(options.recipe)
    kept = "artifact" if outcome == "pass" else "not published, last stage"
    out.print(f"{kept}: {escape(report['artifact'])}", soft_wrap=True)
    out.print(f"report: {escape(str(folder / 'report.html'))}", soft_wrap=True)


def _check(options: argparse.Namespace) -> int:
    return max(_guarded(partial(_check_one, path)) for path in options.recipes)


def _check_one(path: Path) -> int:
    from pipeline.recipe import Recipe
    from pipeline.runner import check

    recipe = Recipe.from_yaml(path)
    target, name = recipe.target, escape(str(path))
    out.print(f"{name}: {escape(recipe.model.source)}, {recipe.task.kind}", soft_wrap=True)
    for stage, step in zip(recipe.stage_names, recipe.steps, strict=True):
        fields = step.model_dump(exclude={"step"}, exclude_none=True)
        settings = ", ".join(f"{key} {value}" for key, value in fields.items())
        out.print(f"  {stage}: {escape(settings)}", soft_wrap=True)
    out.print(f"  target: {target.runtime} on {target.device}; baseline: {recipe.baseline}")
    with _progress() as progress:
        examples = check(recipe, track=_Bars(progress))
    found = ", ".join(f"{split} {count}" for split, count in examples.items())
    out.print(f"  examples: {found}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from pipeline.inspection import draw, head_scores, inspect
    from pipeline.recipe import Recipe, RecipeError
    from pipeline.sources import resolve

    is_recipe = options.model.endswith((".yaml", ".yml"))
    if options.sequence < 1:
        raise RecipeError(f"--sequence: found {options.sequence}, expected at least 1")
    if options.scores and not is_recipe:
        raise RecipeError("--scores: found a model, expected a recipe, which names the data")
    if options.scores and options.scores.suffix not in {".svg", ".png"}:
        raise RecipeError(f"--scores: found {options.scores}, expected a file .svg or .png")
    for option in ("scores", "per_layer_config"):
        path = getattr(options, option)
        if path and not path.parent.is_dir():
            raise RecipeError(f"--{option.replace('_', '-')}: found no folder {path.parent}")
    recipe = Recipe.from_yaml(Path(options.model)) if is_recipe else None
    source = recipe.model.source if recipe else options.model
    found = inspect(resolve(source), options.sequence)
    out.print(f"{escape(source)}: {found.kind}, family {found.family}", soft_wrap=True)
    _show_parts(found)
    _show_units(found)
    if options.per_layer_config:
        options.per_layer_config.write_text(_per_layer_config(resolve(source)))
        out.print(f"configuration: {escape(str(options.per_layer_config))}", soft_wrap=True)
    if recipe and options.scores:
        with _progress() as progress:
            scores = head_scores(recipe, track=_Bars(progress))
        draw(scores, options.scores)
        out.print(f"scores of the heads: {escape(str(options.scores))}", soft_wrap=True)
    return 0


def _per_layer_config(source: str) -> str:
    import json

    from pipeline import checkpoint, per_layer, selfcheck

    model = checkpoint.without_weights(source)
    try:
        selfcheck.ensure(model)
        return json.dumps(per_layer.per_layer_config(model), indent=2) + "\n"
    except ValueError as error:
        raise checkpoint.ModelError(f"--per-layer-config: {error}") from error


def _show_parts(found: "Inspection") -> None:
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


def _show_units(found: "Inspection") -> None:
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


def _verify(options: argparse.Namespace) -> int:
    from exporters import ExportError, MissingDependency, NotHere
    from pipeline.manifest import Damaged
    from pipeline.verification import verify

    try:
        found = verify(options.folder)
    except Damaged as error:
        return _say(WRONG, error)
    except (MissingDependency, NotHere) as error:
        return _say(UNAVAILABLE, error)
    except ExportError as error:
        return _say(FAILED, error)
    out.print(
        f"{escape(str(options.folder))}: {found.files} files, {found.size_bytes / 1e6:.1f} MB,"
        f" {found.graphs} sound graphs; recorded outputs met within {found.difference:.1e}"
        f" (at most {found.tolerance:.1e}); released as: {found.outcome}",
        soft_wrap=True,
    )
    return 0


def _convert(options: argparse.Namespace) -> int:
    from exporters import tensorrt
    from pipeline.conversion import convert

    if options.folder.exists():
        return _say(WRONG, f"{options.folder}: there already, expected a new folder")
    settings = tensorrt.Settings(compute_capabilities=tuple(options.compute_capabilities))
    with _progress() as progress:
        about = convert(
            options.model,
            options.folder,
            batch=options.batch,
            sequence=options.sequence,
            settings=settings,
            track=_Bars(progress),
        )
    _show_engine("built", about)
    return 0


def _rebuild(options: argparse.Namespace) -> int:
    from pipeline.rebuilding import rebuild

    with _progress() as progress:
        about = rebuild(options.folder, track=_Bars(progress))
    _show_engine("rebuilt", about)
    out.print("[yellow]not measured: the verdict in its manifest is the former engine's[/]")
    return 0


def _show_engine(done: str, about: Mapping[str, Any]) -> None:
    library, plan, on = about["library"], about["plan"], about["built_on"]
    where = on["name"] if on else "no GPU here"
    text = f"{done}: {library['name']} {library['version']}, {plan['bytes'] / 1e6:.1f} MB, {where}"
    out.print(escape(text), soft_wrap=True)


def _doctor(options: argparse.Namespace) -> int:
    from pipeline.doctor import examine

    del options
    shown = Table(box=None, pad_edge=False, show_header=False)
    for finding in examine():
        mark = "[green]yes[/]" if finding.here else "[yellow]no[/]"
        shown.add_row(mark, finding.what, escape(finding.found))
        if not finding.here and finding.remedy:
            shown.add_row("", "", f"[dim]{escape(finding.remedy)}[/]")
    out.print(shown)
    return 0


class _Bars:
    """A `track` that shows a bar for every iteration that lasts."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, items: Iterable[T], what: str, total: int) -> Iterable[T]:
        yield from self._progress.track(items, total=total, description=what)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
    )


def _silence() -> None:
    """Keep back what libraries say of themselves; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
