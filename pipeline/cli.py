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
    show_bench,
    show_comparison,
    show_engine,
    show_items,
    show_parts,
    show_plans,
    show_report,
    show_units,
    show_verdict,
)

CODES: Final = {"pass": 0, "fail": 1, "inconclusive": 3}
PASSWORD: Final = "SECATEUR_KEY_PASSWORD"  # noqa: S105 - the name of a variable
NOT_THERE: Final = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)
"""What the system says of a path that a user should not have named."""
WRONG, UNAVAILABLE, FAILED, INTERRUPTED = 2, 4, 5, 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Do what the arguments say, and exit."""
    options = _parser().parse_args(arguments)
    if options.command in {_verify, _gate, _compare, _sign, _store}:
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
    verify.add_argument(
        "--public-key", type=Path, metavar="FILE", help="refuse it unless signed with this key's"
    )
    verify.set_defaults(command=_verify)
    sign = commands.add_parser("sign", help="sign a released artifact; needs the extra `sign`")
    sign.add_argument("folder", type=Path, metavar="FOLDER")
    sign.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        required=True,
        help=f"ECDSA private key in PEM; its password, if any, is taken from ${PASSWORD}",
    )
    sign.set_defaults(command=_sign)
    store = commands.add_parser("store", help="what the stores of runs hold, and what is not used")
    store.add_argument(
        "folders", type=Path, nargs="*", metavar="FOLDER", help="of runs; default: all below runs/"
    )
    store.add_argument("--prune", action="store_true", help="remove what the last run does not use")
    store.set_defaults(command=_store)
    gate = commands.add_parser(
        "gate", help="judge a run again, from its report; runs no model, and needs no torch"
    )
    gate.add_argument(
        "report", type=Path, nargs="?", metavar="REPORT", help="report.json, or its folder"
    )
    gate.add_argument("--budget", type=Path, metavar="FILE", help="in place of the recipe's")
    gate.add_argument(
        "--baseline",
        type=Path,
        metavar="REPORT",
        help="judge against the artifact of this report, too: the last release",
    )
    gate.add_argument(
        "--plan",
        dest="examples",
        type=int,
        metavar="EXAMPLES",
        help="no report: say what so many examples can decide of --budget or --max-drop",
    )
    gate.add_argument("--max-drop", type=float, metavar="DROP", help="with --plan: of the score")
    gate.add_argument(
        "--junit", type=Path, metavar="FILE", help="write JUnit XML, one case a check"
    )
    gate.add_argument(
        "--github", action="store_true", help="annotations, and the summary of the job"
    )
    gate.set_defaults(command=_gate)
    _bench_arguments(commands.add_parser("bench", help="time artifacts of any format, in turns"))
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


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "artifacts",
        type=Path,
        nargs="+",
        metavar="ARTIFACT",
        help="folder of secateur, of a Hugging Face model, with model.onnx; or a file .onnx; ratios"
        " are to the first",
    )
    parser.add_argument(
        "--scenario",
        default="single-stream",
        choices=["single-stream", "multi-stream", "offline", "server", "generation"],
        help="default: single-stream, one query after the other",
    )
    parser.add_argument(
        "--batch", type=_counts, metavar="N,..", help="default: 1; others 8 or 1,8,32"
    )
    parser.add_argument(
        "--sequence", type=_counts, default=[128], metavar="N,..", help="default: 128"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=_counts, metavar="N", help="default: all usable cores")
    parser.add_argument(
        "--seconds", type=_positive, default=60.0, help="a load, at most; default: 60"
    )
    parser.add_argument(
        "--precision",
        type=_positive,
        default=0.02,
        help="of a ratio, at which a load ends; default: 0.02, half of its interval",
    )
    parser.add_argument(
        "--noise",
        type=_positive,
        default=0.05,
        help="differences up to this are none; default: 0.05",
    )
    parser.add_argument("--rate", type=_positive, help="server: queries a second")
    parser.add_argument("--new-tokens", type=_counts, default=[32], metavar="N", help="generation")
    parser.add_argument("--text", type=Path, metavar="FILE", help="lines of text to be answered")
    parser.add_argument(
        "--loadgen", action="store_true", help="let MLCommons' LoadGen measure it once more"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.set_defaults(command=_bench)


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError(text)
    return counts


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _guarded(act: Callable[[], int]) -> int:  # noqa: PLR0911 - one a kind of error
    """Return the exit code of what is done; errors that a user can mend are shown as one line."""
    from safetensors import SafetensorError

    from benchmarks.data import DataError
    from benchmarks.machine import Unavailable
    from benchmarks.worker import WorkerError
    from exporters import ExportError, MissingDependency, NotHere
    from pipeline.checkpoint import ModelError
    from pipeline.evidence import EvidenceError
    from pipeline.finetuning import TrainingError
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
    if error.errno in NOT_THERE:
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
    from benchmarks.tasks import TASKS
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
        data = check(recipe, track=Bars(bars))
    found = ", ".join(f"{split} {count}" for split, count in data.splits.items())
    out.print(f"  examples: {found}")
    metric = recipe.task.metric or TASKS[recipe.task.kind].metrics[0]
    decided = show_plans(recipe.budget, metric, data.splits["gate"], data.slices)
    return CODES["pass" if decided else "inconclusive"]


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
    from pipeline.evidence import EvidenceError
    from pipeline.reading import RecipeError

    try:
        return _judge(options) if options.examples is None else _plan(options)
    except (RecipeError, EvidenceError) as error:
        return _say(WRONG, error)
    except OSError as error:
        return _say(*_disk(error))
    except Exception as error:  # noqa: BLE001 - status 1 would say that a budget is violated
        return _say(WRONG, f"{options.report}: not a report that can be judged: {error!r}")


def _judge(options: argparse.Namespace) -> int:
    from pipeline import ci
    from pipeline.budget import Budget
    from pipeline.judging import judge_again, report_path
    from pipeline.reading import RecipeError
    from pipeline.writing import write_text

    if options.report is None:
        raise RecipeError("gate: found no report, expected one, or --plan EXAMPLES")
    budget = Budget.from_yaml(options.budget) if options.budget else None
    report = judge_again(report_path(options.report), budget, options.baseline)
    if options.junit:
        write_text(options.junit, ci.junit(report))
    if options.github:
        print(*ci.annotations(report), sep="\n")  # noqa: T201 - commands, not for people
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(ci.summary(report))
    show_verdict(report)
    return CODES[report["verdict"]["outcome"]]


def _plan(options: argparse.Namespace) -> int:
    from pipeline.budget import Budget
    from pipeline.reading import RecipeError

    if options.examples < 1:
        raise RecipeError(f"--plan: found {options.examples}, expected at least 1")
    if (options.budget is None) == (options.max_drop is None):
        raise RecipeError("--plan: expected one of --budget FILE and --max-drop DROP")
    if options.max_drop is not None and not 0 < options.max_drop < 1:
        raise RecipeError(f"--max-drop: found {options.max_drop}, expected between 0 and 1")
    if options.budget:
        budget = Budget.from_yaml(options.budget)
    else:
        budget = Budget(max_drop=options.max_drop)
    metric = "perplexity" if budget.max_perplexity_ratio else "accuracy"
    return CODES["pass" if show_plans(budget, metric, options.examples, {}) else "inconclusive"]


def _compare(options: argparse.Namespace) -> int:
    from pipeline import comparison
    from pipeline.evidence import EvidenceError
    from pipeline.judging import report_path
    from pipeline.writing import write_text

    first, second = (str(path) for path in options.reports)
    try:
        found = comparison.compare(*map(report_path, options.reports))
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


def _verify(options: argparse.Namespace) -> int:
    from pipeline.verification import verify

    def act() -> int:
        found = verify(options.folder, options.public_key)
        signed = {True: "; signature good", False: "; signature not checked (--public-key)"}
        out.print(
            f"{escape(str(options.folder))}: {found.files} files, {found.size_bytes / 1e6:.1f} MB,"
            f" {found.graphs} sound graphs; recorded outputs met within {found.difference:.1e}"
            f" (at most {found.tolerance:.1e}); released as: {escape(found.outcome)}"
            f"{'; the engine was not opened, but the graph it was built from' * found.unopened}"
            f"{'' if found.signed is None else signed[found.signed]}",
            soft_wrap=True,
        )
        return 0

    return _lightly(act, options.folder)


def _sign(options: argparse.Namespace) -> int:
    from pipeline.signing import sign

    def act() -> int:
        signature = sign(options.folder, options.key, os.environ.get(PASSWORD))
        out.print(f"signed: {escape(str(signature))}", soft_wrap=True)
        return 0

    return _lightly(act, options.folder)


def _store(options: argparse.Namespace) -> int:
    from pipeline.inventory import STAGES, items, prune

    def act() -> int:
        folders = options.folders or sorted(
            path.parent for path in Path("runs").glob(f"*/{STAGES}")
        )
        for folder in folders:
            found = prune(folder) if options.prune else items(folder)
            needed = sum(item.size_bytes for item in found if item.needed)
            rest = sum(item.size_bytes for item in found) - needed
            said = f"{needed / 1e6:,.1f} MB in use, {rest / 1e6:,.1f} MB that --prune frees"
            if options.prune:
                said = f"{rest / 1e6:,.1f} MB freed"
            out.print(f"{escape(str(folder / STAGES))}: {said}", soft_wrap=True)
            if found:
                show_items(found)
        return 0

    return _lightly(act, "store")


def _lightly(act: Callable[[], int], where: object) -> int:
    """Return the exit code of what is done where there may be no torch."""
    from benchmarks.machine import Unavailable
    from exporters import ExportError, MissingDependency, NotHere
    from pipeline.manifest import Damaged
    from pipeline.reading import RecipeError

    try:
        return act()
    except (Damaged, RecipeError) as error:
        return _say(WRONG, error)
    except (MissingDependency, NotHere, Unavailable) as error:
        return _say(UNAVAILABLE, error)
    except ExportError as error:
        return _say(FAILED, error)
    except OSError as error:
        return _say(*_disk(error))
    except Exception as error:  # noqa: BLE001 - status 1 would say that a budget is violated
        return _say(FAILED, f"{where}: {type(error).__name__}: {error}")


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


def _bench(options: argparse.Namespace) -> int:
    import json

    from benchmarks.machine import usable_cores
    from pipeline.bench import BATCHES, Settings, bench
    from pipeline.writing import write_text

    batches = options.batch or BATCHES[options.scenario]
    settings = Settings(
        scenario=options.scenario,
        loads=tuple((batch, length) for length in options.sequence for batch in batches),
        device=options.device,
        threads=options.threads[0] if options.threads else usable_cores(),
        seconds=options.seconds,
        precision=options.precision,
        noise=options.noise,
        rate=options.rate,
        new_tokens=options.new_tokens[0],
        text=options.text,
        loadgen=options.loadgen,
    )
    with progress() as bars:
        found = bench(options.artifacts, settings, Bars(bars))
    if options.json:
        write_text(options.json, json.dumps(found, indent=2, allow_nan=False) + "\n")
    show_bench(found)
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
