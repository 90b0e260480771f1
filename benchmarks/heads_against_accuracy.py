"""The table of the head-pruning literature: share of heads removed, quality lost, speed gained.

    python -m benchmarks.heads_against_accuracy MODEL DATA OUTPUT [--epochs 0.15]

DATA is a folder with train.csv(.gz) and validation.csv with the columns `sentence` and `label`, or
a text file for a causal language model. Each share of the heads is cut at once without repair, at
once with least-squares repair, and in rounds of a fifth of the heads with distillation after each;
last, heads and neurons are cut together to a speedup, alone and with as much distillation. All of
validation (of a text file: its last third) is judged, and every model is timed in ONNX Runtime
beside the uncut one, so that rows of like speedups tell what heads and neurons together are worth.
The ceiling is what the multiply-adds that are left allow. A run that was stopped goes on.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import silent
from pipeline import from_pretrained
from pipeline.counting import total
from pipeline.recipe import Recipe
from pipeline.runner import run

SHARES: Final = (0.2, 0.4, 0.6, 0.8)
SPEEDUPS: Final = (1.1, 1.25, 1.5, 1.8)
SEQUENCES: Final = (128, 512)


def task(data: Path) -> dict[str, Any]:
    """Return the task of a recipe, with its budget: far, for every row is to be judged."""
    if data.is_dir():
        splits = {"train": "train[1000:]", "calibration": "train[:1000]", "gate": "validation"}
        kind = {"kind": "text-classification", "columns": {"text": "sentence"}, "max_length": 64}
        budget = {"max_drop": 0.5}
    else:
        splits = {"train": "train[10%:66%]", "calibration": "train[:10%]", "gate": "train[66%:]"}
        kind = {"kind": "causal-lm", "max_length": 128}
        budget = {"max_perplexity_ratio": 100.0}
    of_task = {"data": str(data), "overlap": "drop", "splits": splits, **kind}
    return {"task": of_task, "budget": budget}


def recipe(options: argparse.Namespace, prune: dict[str, Any]) -> Recipe:
    """Return a recipe of one prune step."""
    return Recipe.model_validate(
        {
            "model": {"source": options.model},
            "target": {"loads": [{"batch": 1, "sequence": length} for length in SEQUENCES]},
            "steps": [{"step": "prune", **prune}],
            **task(options.data),
        }
    )


def quality(report: dict[str, Any]) -> list[str]:
    """Return the score of a report's last stage, and what was lost of it with its interval."""
    after, check = report["stages"][-1], report["verdict"]["checks"][0]
    unit = 100 if after["score"]["metric"] == "accuracy" else 1
    lost, low, high = (unit * check[name] for name in ("estimate", "low", "high"))
    return [f"{after['score']['value']:.4f}", f"{lost:.2f} ({low:.2f} to {high:.2f})"]


def speedup(load: dict[str, Any]) -> str:
    """Return a load's speedup with its interval."""
    found = load["speedup"]
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def row(options: argparse.Namespace, prune: dict[str, Any]) -> list[str]:
    """Return the score, what was lost of it with its interval, and speedups beside ceilings."""
    report = json.loads(run(recipe(options, prune), options.output, track=silent).to_json())
    before, after = report["stages"]
    dense, cut = (from_pretrained(stage["folder"]) for stage in (before, after))
    cells = quality(report)
    for load in after["loads"]:
        ceiling = total(dense, load["sequence"]) / total(cut, load["sequence"])
        cells += [speedup(load), f"{ceiling:.2f}"]
    return cells


def uncut(options: argparse.Namespace) -> list[str]:
    """Return the row of the model as it was."""
    report = json.loads(run(recipe(options, {"heads": SHARES[0]}), options.output).to_json())
    score = f"{report['stages'][0]['score']['value']:.4f}"
    return ["uncut", "0%", score, "0", *["1", "1"] * len(SEQUENCES)]


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=float, default=0.15, help="of every round")
    options = parser.parse_args()
    training = {
        "epochs": options.epochs,
        "learning_rate": 2e-5,
        "teacher": "original",
        "task_weight": 0.1,  # the labels of a model that is trained already teach it little
        "hidden_weight": 1.0,
        "freeze_embeddings": True,
    }
    methods: list[tuple[str, list[tuple[str, dict[str, Any]]]]] = [
        ("no repair", [(f"{s:.0%}", {"heads": s, "repair": "none"}) for s in SHARES]),
        ("repair", [(f"{s:.0%}", {"heads": s}) for s in SHARES]),
        (
            "rounds, distilled",
            [
                (f"{s:.0%}", {"heads": s, "rounds": at, "finetune": training})
                for at, s in enumerate(SHARES, 1)
            ],
        ),
        ("heads and neurons", [(f"{x:g}x", {"goal": {"speedup": x}}) for x in SPEEDUPS]),
        (
            "heads and neurons, distilled",
            [
                (
                    f"{x:g}x",
                    {
                        "goal": {"speedup": x},
                        "finetune": training | {"epochs": at * options.epochs},
                    },
                )
                for at, x in enumerate(SPEEDUPS, 1)
            ],
        ),
    ]
    columns = ["method", "removed", "score", "points lost, or ratio of perplexities (interval)"]
    for length in SEQUENCES:
        columns += [f"speedup 1x{length}", "ceiling"]
    table = Table(*columns)
    cells = uncut(options)
    print("\t".join(cells), flush=True)  # noqa: T201 - as the rows below
    table.add_row(*cells)
    for method, steps in methods:
        for removed, prune in steps:
            cells = [method, removed, *row(options, prune)]
            print("\t".join(cells), flush=True)  # noqa: T201 - a row may take minutes
            table.add_row(*cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
