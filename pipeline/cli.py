"""The command line: arguments, and the exit code. Beside terminal.py, nothing else prints.

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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

from rich.markup import escape
from rich.table import Table

from pipeline.terminal import (
    Bars,
    err,
    out,
    progress,
    show_comparison,
    show_engine,
    show_parts,
    show_report,
    show_units,
    show_verdict,
)

CODES: Final = {"pass": 0, "fail": 1, "inconclusive": 3}
WRONG, UNAVAILABLE, FAILED, INTERRUPTED = 2, 4, 5, 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Do what the arguments say, and exit."""
    options = _parser().parse_args(arguments)
    if options.command in {_verify, _gate, _compare}:
        sys.exit(options.command(options))  # where it is done there may be no torch
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
    gate = commands.add_parser(
        "gate", help="judge a run again, from its report; runs no model, and needs no torch"
    )
    gate.add_argument("report", type=Path, metavar="REPORT", help="report.json, or its folder")
    gate.add_argument("--budget", type=Path, metavar="FILE", help="in place of the recipe's")
    gate.add_argument(
        "--junit", type=Path, metavar="FILE", help="write JUnit XML, one case a check"
    )
    gate.add_argument(
        "--github", action="store_true", help="annotations, and the summary of the job"
    )
    gate.set_defaults(command=_gate)
    compare = commands.add_parser("compare", help="two runs side by side; needs no torch")
    compare.add_argument("reports", type=Path, nargs=2, metavar="REPORT", help="as for gate")
    compare.add_argument("--markdown", type=Path, metavar="FILE", help="write it as Markdown, too")
    compare.set_defaults(command=_compare)
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
    from pipeline.manifest import Damaged
    from pipeline.quantization import QuantizationError
    from pipeline.reading import RecipeError

    wrong = (RecipeError, DataError, ModelError, EvidenceError, Damaged)
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
    from pipeline.runner import default_output, run

    if not processes.leads():  # torchrun started it beside the one that shows what happens
        report = run(options.recipe, options.output, fresh=options.fresh, track=silent)
        return CODES[report.verdict.outcome]
    with progress() as bars:
        report = run(options.recipe, options.output, fresh=options.fresh, track=Bars(bars))
    show_report(report.to_json(), options.output or default_output(options.recipe))
    if options.push and report.verdict.outcome == "pass":
        from pipeline.hub import push

        out.print(f"on the hub: {push(Path(report.artifact), options.push)}", soft_wrap=True)
    return CODES[report.verdict.outcome]


def _check(options: argparse.Namespace) -> int:
    return max(_guarded(partial(_check_one, path)) for path in options.recipes)


def _check_one(path: Path) -> int:
    from pipeline.recipe import Recipe
    from pipeline.report import step_words
    from pipeline.runner import check

    recipe = Recipe.from_yaml(path)
    target, name = recipe.target, escape(str(path))
    out.print(f"{name}: {escape(recipe.model.source)}, {recipe.task.kind}", soft_wrap=True)
    for stage, step in zip(recipe.stage_names, recipe.steps, strict=True):
        out.print(f"  {stage}: {escape(step_words(step.model_dump()))}", soft_wrap=True)
    out.print(f"  target: {target.runtime} on {target.device}; baseline: {recipe.baseline}")
    with progress() as bars:
        examples = check(recipe, track=Bars(bars))
    found = ", ".join(f"{split} {count}" for split, count in examples.items())
    out.print(f"  examples: {found}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from pipeline.inspection import draw, head_scores, inspect
    from pipeline.reading import RecipeError
    from pipeline.recipe import Recipe
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
    show_parts(found)
    show_units(found)
    if options.per_layer_config:
        options.per_layer_config.write_text(_per_layer_config(resolve(source)))
        out.print(f"configuration: {escape(str(options.per_layer_config))}", soft_wrap=True)
    if recipe and options.scores:
        with progress() as bars:
            scores = head_scores(recipe, track=Bars(bars))
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


def _gate(options: argparse.Namespace) -> int:
    from pipeline import ci
    from pipeline.budget import Budget
    from pipeline.gate import EvidenceError
    from pipeline.judging import judge_again
    from pipeline.reading import RecipeError
    from pipeline.writing import write_text

    path = _report(options.report)
    try:
        report = judge_again(path, Budget.from_yaml(options.budget) if options.budget else None)
        if options.junit:
            write_text(options.junit, ci.junit(report))
        if options.github:
            print(*ci.annotations(report), sep="\n")  # noqa: T201 - commands, not for people
            if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
                with Path(summary).open("a", encoding="utf-8") as file:
                    file.write(ci.summary(report))
    except (RecipeError, EvidenceError) as error:
        return _say(WRONG, error)
    except OSError as error:
        return _say(*_disk(error))
    except Exception as error:  # noqa: BLE001 - status 1 would say that a budget is violated
        return _say(WRONG, f"{path}: not a report that can be judged: {error!r}")
    show_verdict(report)
    return CODES[report["verdict"]["outcome"]]


def _compare(options: argparse.Namespace) -> int:
    from pipeline import comparison
    from pipeline.gate import EvidenceError
    from pipeline.writing import write_text

    first, second = (str(path) for path in options.reports)
    try:
        found = comparison.compare(*map(_report, options.reports))
        if options.markdown:
            write_text(options.markdown, comparison.markdown(found, (first, second)))
    except EvidenceError as error:
        return _say(WRONG, error)
    except OSError as error:
        return _say(*_disk(error))
    except Exception as error:  # noqa: BLE001 - status 1 would say that a budget is violated
        return _say(WRONG, f"{first}, {second}: not reports that can be compared: {error!r}")
    show_comparison(found, (first, second))
    return 0


def _report(path: Path) -> Path:
    """Return the report in a folder, or the one that is named."""
    return path / "report.json" if path.is_dir() else path


def _verify(options: argparse.Namespace) -> int:
    from benchmarks.machine import Unavailable
    from exporters import ExportError, MissingDependency, NotHere
    from pipeline.manifest import Damaged
    from pipeline.verification import verify

    try:
        found = verify(options.folder)
    except Damaged as error:
        return _say(WRONG, error)
    except (MissingDependency, NotHere, Unavailable) as error:
        return _say(UNAVAILABLE, error)
    except ExportError as error:
        return _say(FAILED, error)
    except Exception as error:  # noqa: BLE001 - status 1 would say that a budget is violated
        return _say(FAILED, f"{options.folder}: {type(error).__name__}: {error}")
    out.print(
        f"{escape(str(options.folder))}: {found.files} files, {found.size_bytes / 1e6:.1f} MB,"
        f" {found.graphs} sound graphs; recorded outputs met within {found.difference:.1e}"
        f" (at most {found.tolerance:.1e}); released as: {found.outcome}"
        f"{'; the engine was not opened, but the graph it was built from' * found.unopened}",
        soft_wrap=True,
    )
    return 0


def _convert(options: argparse.Namespace) -> int:
    from exporters import tensorrt
    from pipeline.conversion import convert

    if options.folder.exists():
        return _say(WRONG, f"{options.folder}: there already, expected a new folder")
    settings = tensorrt.Settings(compute_capabilities=tuple(options.compute_capabilities))
    with progress() as bars:
        about = convert(
            options.model,
            options.folder,
            batch=options.batch,
            sequence=options.sequence,
            settings=settings,
            track=Bars(bars),
        )
    show_engine("built", about)
    return 0


def _rebuild(options: argparse.Namespace) -> int:
    from pipeline.rebuilding import rebuild

    with progress() as bars:
        about = rebuild(options.folder, track=Bars(bars))
    show_engine("rebuilt", about)
    out.print("[yellow]not measured: the verdict in its manifest is the former engine's[/]")
    return 0


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
