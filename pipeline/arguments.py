"""The arguments of the command line: what can be asked, and in which words."""

import argparse
from pathlib import Path
from typing import Final

PASSWORD: Final = "SECATEUR_KEY_PASSWORD"  # noqa: S105 - the name of a variable


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; it names the one that was asked for `command`."""
    found = argparse.ArgumentParser(
        prog="secateur",
        description="Prune, quantize and export Hugging Face transformers: measured at every stage,"
        " judged by a gate.",
        epilog="exit codes: 0 within the budget, 1 a budget is violated, 2 recipe, model, data or"
        " arguments are wrong, 3 inconclusive, 4 target or dependency not available, 5 a stage"
        " failed, 130 interrupted",
    )
    commands = found.add_subparsers(required=True, metavar="COMMAND", dest="command")
    run = commands.add_parser("run", help="run the whole pipeline; resumes by itself")
    run_arguments(run)
    check = commands.add_parser("check", help="resolve recipes, and say what would run")
    check.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE")
    search = commands.add_parser(
        "search", help="the fastest or smallest artifact within the budget; resumes by itself"
    )
    search.add_argument("recipe", type=Path, metavar="RECIPE", help="with values left open")
    search.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/<recipe>")
    search.add_argument("--trials", type=_count, metavar="N", help="candidates at most")
    search.add_argument("--seconds", type=_positive, help="of work on candidates, at most")
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
    _prune_arguments(
        commands.add_parser("prune", help="cut a model larger than memory, block by block")
    )
    _quantize_arguments(
        commands.add_parser(
            "quantize", help="quantize a model larger than memory to 4 bits (GPTQ), block by block"
        )
    )
    verify = commands.add_parser(
        "verify", help="whether a released artifact is what was released; without torch"
    )
    verify.add_argument("folder", type=Path, metavar="FOLDER")
    verify.add_argument(
        "--public-key", type=Path, metavar="FILE", help="refuse it unless signed with this key's"
    )
    sign = commands.add_parser("sign", help="sign a released artifact; needs the extra `sign`")
    sign.add_argument("folder", type=Path, metavar="FOLDER")
    sign.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        required=True,
        help=f"ECDSA private key in PEM; its password, if any, is taken from ${PASSWORD}",
    )
    store = commands.add_parser("store", help="what the stores of runs hold, and what is not used")
    store.add_argument(
        "folders",
        type=Path,
        nargs="*",
        metavar="FOLDER",
        help="of runs; default: all below runs/ and sweeps/",
    )
    store.add_argument("--prune", action="store_true", help="remove what the last run does not use")
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
    _bench_arguments(commands.add_parser("bench", help="time artifacts of any format, in turns"))
    compare = commands.add_parser("compare", help="two runs side by side; needs no torch")
    compare.add_argument("reports", type=Path, nargs=2, metavar="REPORT", help="as for gate")
    compare.add_argument("--markdown", type=Path, metavar="FILE", help="write it as Markdown, too")
    rebuild = commands.add_parser(
        "rebuild", help="make the TensorRT engine of an artifact again, on this machine"
    )
    rebuild.add_argument("folder", type=Path, metavar="FOLDER")
    commands.add_parser("doctor", help="what this machine can run")
    _sweep_arguments(commands.add_parser("sweep", help="all recipes that one with choices is for"))
    return found


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run`."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/<recipe>")
    parser.add_argument("--fresh", action="store_true", help="do every step again")
    parser.add_argument(
        "--push", metavar="ORG/NAME", help="upload the artifact to the hub if the verdict is a pass"
    )


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new one")
    parser.add_argument("--heads", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--neurons", type=float, default=0.0, metavar="SHARE")
    parser.add_argument(
        "--criterion",
        default="activation",
        help="activation (default), flap, reconstruction, magnitude or random",
    )
    parser.add_argument(
        "--repair", default="least-squares", help="least-squares (default), bias or none"
    )
    parser.add_argument(
        "--per-layer", action="store_true", help="the same share of every layer's units"
    )
    parser.add_argument(
        "--multiple", type=_count, default=1, metavar="N", help="of what is left of neurons"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the criterion random")
    _calibration_arguments(parser)


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new one")
    parser.add_argument(
        "--block-size",
        type=_count,
        default=128,
        metavar="N",
        help="inputs of an output that share a scale; default: 128",
    )
    _calibration_arguments(parser, required=True)


def _calibration_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add what says on which text a model is looked at block by block."""
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        required=required,
        help="lines to calibrate on, a window each",
    )
    parser.add_argument(
        "--max-length", type=_count, default=512, metavar="N", help="tokens of a line; default: 512"
    )
    parser.add_argument(
        "--batch", type=_count, default=4, metavar="N", help="lines at a time; default: 4"
    )
    parser.add_argument(
        "--activations",
        default="disk",
        choices=["disk", "memory"],
        help="where the states between blocks wait; default: disk, beside FOLDER",
    )


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
    parser.add_argument("--threads", type=_count, metavar="N", help="default: all usable cores")
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
    parser.add_argument("--new-tokens", type=_count, default=32, metavar="N", help="generation")
    parser.add_argument("--text", type=Path, metavar="FILE", help="lines of text to be answered")
    parser.add_argument(
        "--loadgen", action="store_true", help="let MLCommons' LoadGen measure it once more"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    acts = parser.add_subparsers(required=True, metavar="ACT", dest="act")
    plan = acts.add_parser("plan", help="write every recipe of the grid, checked")
    plan.add_argument("recipe", type=Path, metavar="RECIPE")
    plan.add_argument("--output", type=Path, metavar="FOLDER", help="default: sweeps/<recipe>")
    run = acts.add_parser("run", help="do one of the runs, or all; what is done is not done again")
    run.add_argument("folder", type=Path, metavar="FOLDER")
    which = run.add_mutually_exclusive_group()
    which.add_argument(
        "--index",
        type=int,
        metavar="I",
        help="default: $SLURM_ARRAY_TASK_ID or $JOB_COMPLETION_INDEX; ends with 0 whatever the"
        " verdict",
    )
    which.add_argument(
        "--executor", choices=["local", "ray"], help="all: on this machine, or on a Ray cluster"
    )
    run.add_argument(
        "--slots", type=_count, metavar="N", help="local: runs at once, each on cores of its own"
    )
    run.add_argument("--address", help="ray: of the cluster; default: one of this machine alone")
    collect = acts.add_parser("collect", help="join the runs, and name those that are missing")
    collect.add_argument("folder", type=Path, metavar="FOLDER")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from 1 on")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return value
