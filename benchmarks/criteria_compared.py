"""Accuracy right after a cut, by criterion and repair, without training.

    python -m benchmarks.criteria_compared MODEL FOLDER [--heads 0.4] [--neurons 0] [--seed 0]

FOLDER holds train.csv(.gz) and validation.csv with the columns `sentence` and `label`. Every
criterion scores the same 512 examples of train; all of validation is judged.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table

from pipeline import from_pretrained, sources
from pipeline.compensation import REPAIRS
from pipeline.criteria import CRITERIA
from pipeline.pruning import choose_and_cut


def batches(rows: Dataset, tokenizer: object, size: int = 16) -> Iterator[dict[str, torch.Tensor]]:
    """Yield inputs and labels."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
        yield {**tokenizer(part["sentence"], **options), "labels": torch.tensor(part["label"])}  # type: ignore[operator]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--heads", type=float, default=0.4)
    parser.add_argument("--neurons", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    files = {s: str(next(options.folder.glob(f"{s}.csv*"))) for s in ("train", "validation")}
    rows = load_dataset("csv", data_files=files)
    tokenizer = sources.processor(options.model, "AutoTokenizer", None)
    chosen = rows["train"].shuffle(seed=options.seed).select(range(512))
    calibration = list(batches(chosen, tokenizer))
    judged = list(batches(rows["validation"].sort("sentence"), tokenizer))
    dense = from_pretrained(options.model)

    @torch.inference_mode()
    def accuracy(model: torch.nn.Module) -> float:
        right = [(model(**b).logits.argmax(-1) == b["labels"]).float() for b in judged]
        return float(torch.cat(right).mean())

    table = Table("criterion", "none", *REPAIRS, title=f"before: {accuracy(dense):.4f}")
    for criterion in CRITERIA:
        cells = []
        for repair in ("none", *REPAIRS):
            model = copy.deepcopy(dense)
            choose_and_cut(
                model,
                {"heads": options.heads, "neurons": options.neurons},
                criterion=criterion,
                repair=repair,
                seed=options.seed,
                data=lambda: iter(calibration),
                total=len(calibration),
            )
            cells.append(f"{accuracy(model):.4f}")
        table.add_row(criterion, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
