"""The commands, one function each. Beside terminal.py, nothing else prints.

0 within the budget    1 a budget is violated    2 the recipe, model, data or arguments are wrong
3 inconclusive         4 the target or a dependency is not available here
5 a stage failed       130 interrupted
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from rich.markup import escape
from rich.table import Table

from pipeline import arguments
from pipeline.arguments import PASSWORD
from pipeline.statuses import CODES, WRONG, guarded, lightly, say
from pipeline.terminal import (
    Bars,
    out,
    progress,
    show_bench,
    show_candidate,
    show_comparison,
    show_engine,
    show_items,
    show_parts,
    show_plans,
    show_report,
    show_search,
    show_units,
    show_verdict,
)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Do what the arguments say, and exit."""
    options = arguments.parser().parse_args(words)
    command = COMMANDS[options.command]
    if command in {_verify, _gate, _compare, _sign, _store, _sweep}:
        sys.exit(command(options))  # where it is done there may be no torch
    _silence()
    sys.exit(guarded(lambda: command(options)))


def run(options: argparse.Namespace) -> NoReturn:
    """Run a recipe, and exit; `options` are those of `arguments.run_arguments`."""
    _silence()
    sys.exit(guarded(lambda: _run(options)))


def convert(options: argparse.Namespace) -> NoReturn:
    """Build an engine without a recipe, and exit."""
    _silence()
    sys.exit(guarded(lambda: _convert(options)))


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
    return max(guarded(partial(_check_one, path)) for path in options.recipes)


def _check_one(path: Path) -> int:
    from benchmarks.tasks import TASKS
    from pipeline import space
    from pipeline.recipe import Recipe
    from pipeline.report import dropped_note, step_words
    from pipeline.runner import check
    from pipeline.search import as_finalist, read

    opened, searched = space.read(path)
    if searched:
        _, settings, (recipe, *_) = read(path)
        recipe = as_finalist(recipe, settings)
    else:
        recipe = opened.check()[0] if opened.open else Recipe.from_yaml(path)
    target, name = recipe.target, escape(str(path))
    out.print(f"{name}: {escape(recipe.model.source)}, {recipe.task.kind}", soft_wrap=True)
    if opened.open:
        out.print(f"  open: {escape(', '.join(opened.open))}; the first of each:", soft_wrap=True)
    for stage, step in zip(recipe.stage_names, recipe.steps, strict=True):
        out.print(f"  {stage}: {escape(step_words(step.model_dump()))}", soft_wrap=True)
    out.print(f"  target: {target.runtime} on {target.device}; baseline: {recipe.baseline}")
    with progress() as bars:
        data = check(recipe, track=Bars(bars))
    found = ", ".join(f"{split} {count:,}" for split, count in data.splits.items())
    out.print(f"  examples: {found}")
    if note := dropped_note(data.dropped):
        out.print(f"  {note}")
    metric = recipe.task.metric or TASKS[recipe.task.kind].metrics[0]
    decided = show_plans(recipe.budget, metric, data.splits["gate"], data.slices)
    return CODES["pass" if decided else "inconclusive"]


def _search(options: argparse.Namespace) -> int:
    from pipeline.runner import default_output
    from pipeline.search import search

    with progress() as bars:
        found = search(
            options.recipe,
            options.output,
            trials=options.trials,
            seconds=options.seconds,
            tell=show_candidate,
            track=Bars(bars),
        )
    show_search(found, options.output or default_output(options.recipe))
    return CODES[found.outcome]


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
    act = _judge if options.examples is None else _plan
    # What goes wrong in judging lies in the evidence.
    where = f"{options.report}: not a report that can be judged"
    return lightly(lambda: act(options), where, otherwise=WRONG)


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
    from pipeline.judging import report_path
    from pipeline.writing import write_text

    first, second = (str(path) for path in options.reports)

    def act() -> int:
        found = comparison.compare(*map(report_path, options.reports))
        if options.markdown:
            write_text(options.markdown, comparison.markdown(found, (first, second)))
        show_comparison(found, (first, second))
        return 0

    where = f"{first}, {second}: not reports that can be compared"
    return lightly(act, where, otherwise=WRONG)


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

    return lightly(act, options.folder)


def _sign(options: argparse.Namespace) -> int:
    from pipeline.signing import sign

    def act() -> int:
        signature = sign(options.folder, options.key, os.environ.get(PASSWORD))
        out.print(f"signed: {escape(str(signature))}", soft_wrap=True)
        return 0

    return lightly(act, options.folder)


def _store(options: argparse.Namespace) -> int:
    from pipeline.inventory import STAGES, items, prune

    def act() -> int:
        folders = options.folders or sorted(
            path.parent for root in ("runs", "sweeps") for path in Path(root).glob(f"*/{STAGES}")
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

    return lightly(act, "store")


def _sweep(options: argparse.Namespace) -> int:
    from pipeline import sweeping

    return sweeping.ACTS[options.act](options, _silence)


def _convert(options: argparse.Namespace) -> int:
    from exporters import tensorrt
    from pipeline.conversion import convert

    if options.folder.exists():
        return say(WRONG, f"{options.folder}: there already, expected a new folder")
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


def _prune(options: argparse.Namespace) -> int:
    from pipeline import checkpoint, out_of_core, pruning

    data = _calibration(options) if options.text else None
    with progress() as bars:
        out_of_core.prune_by_blocks(
            options.model,
            options.folder,
            heads=options.heads,
            neurons=options.neurons,
            criterion=options.criterion,
            repair=options.repair,
            per_layer=options.per_layer,
            multiple=options.multiple,
            seed=options.seed,
            data=data,
            activations=options.activations,
            track=Bars(bars),
        )
    left = pruning.units(checkpoint.without_weights(options.folder))
    heads, neurons = sum(left.heads.values()), sum(left.neurons.values())
    return _written(options.folder, f"{heads:,} heads and {neurons:,} neurons left")


def _quantize(options: argparse.Namespace) -> int:
    from pipeline.gptq_by_blocks import quantize_by_blocks

    with progress() as bars:
        found = quantize_by_blocks(
            options.model,
            options.folder,
            data=_calibration(options),
            block_size=options.block_size,
            activations=options.activations,
            track=Bars(bars),
        )
    said = "{quantized_layers:,} matrices in 4 bits, {left_layers:,} as they were"
    return _written(options.folder, said.format(**found))


def _calibration(options: argparse.Namespace) -> Any:
    """Return what gives the batches of a text."""
    from pipeline import out_of_core

    return out_of_core.text_batches(
        options.model, options.text, max_length=options.max_length, batch=options.batch
    )


def _written(folder: Path, what: str) -> int:
    """Say what was written block by block."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    out.print(f"{escape(str(folder))}: {what}, {size / 1e6:,.1f} MB; not measured", soft_wrap=True)
    return 0


def _bench(options: argparse.Namespace) -> int:
    import json

    from benchmarks.machine import usable_cores
    from pipeline.bench import bench
    from pipeline.turns import BATCHES, Settings
    from pipeline.writing import write_text

    batches = options.batch or BATCHES[options.scenario]
    settings = Settings(
        scenario=options.scenario,
        loads=tuple((batch, length) for length in options.sequence for batch in batches),
        device=options.device,
        threads=options.threads or usable_cores(),
        seconds=options.seconds,
        precision=options.precision,
        noise=options.noise,
        rate=options.rate,
        new_tokens=options.new_tokens,
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


COMMANDS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {
    "run": _run,
    "check": _check,
    "search": _search,
    "inspect": _inspect,
    "prune": _prune,
    "quantize": _quantize,
    "verify": _verify,
    "sign": _sign,
    "store": _store,
    "gate": _gate,
    "bench": _bench,
    "compare": _compare,
    "rebuild": _rebuild,
    "doctor": _doctor,
    "sweep": _sweep,
}
