"""Accuracy, size and speed of a model in fewer bits, by method.

    python -m benchmarks.quantization_compared MODEL DATA OUTPUT

DATA is as for `heads_against_accuracy`. Every method is judged on all of validation, and timed in
ONNX Runtime beside the model as it was, in turns. A run that was stopped goes on.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import silent
from benchmarks.heads_against_accuracy import quality, speedup, task
from pipeline.recipe import Recipe
from pipeline.runner import run

LOADS: Final = ((1, 128), (8, 128))
INT4: Final = {"method": "int4-weights", "embeddings": True}
LIMITED: Final[dict[str, Any]] = {"method": "int8-dynamic", "embeddings": True}
"""Layers stay as they are until next to nothing is lost on the selection split."""
CASES: Final[dict[str, dict[str, Any]]] = {
    "fp16": {"method": "fp16"},
    "int8-dynamic": {"method": "int8-dynamic"},
    "int8-dynamic, embeddings": {"method": "int8-dynamic", "embeddings": True},
    "int8-dynamic, limited": LIMITED,
    "int8-dynamic, migrated": {"method": "int8-dynamic", "embeddings": True, "migration": 0.5},
    "int8-static": {"method": "int8-static", "embeddings": True},
    "int8-static, migrated": {"method": "int8-static", "embeddings": True, "migration": 0.5},
    "int8-static, portable": {"method": "int8-static", "embeddings": True, "portable": True},
    "int8-weights": {"method": "int8-weights", "embeddings": True},
    "int8-weights, portable": {"method": "int8-weights", "embeddings": True, "portable": True},
    "int4-weights": INT4,
    "int4-weights, portable": INT4 | {"portable": True},
    "int4-weights, k-quant": INT4 | {"algorithm": "k-quant"},
    "int4-weights, hqq": INT4 | {"algorithm": "hqq"},
    "int4-weights, gptq": INT4 | {"algorithm": "gptq"},
    "bnb-int8": {"method": "bnb-int8"},
    "bnb-nf4": {"method": "bnb-nf4"},
}


def row(options: argparse.Namespace, quantize: dict[str, Any]) -> list[str]:
    """Return the score, what was lost of it with its interval, flips, size and speedups."""
    content = task(options.data)
    if quantize is LIMITED:
        splits = content["task"]["splits"]
        splits |= {"selection": splits["calibration"], "calibration": None}
        limit = {"max_drop": 0.002} if options.data.is_dir() else {"max_perplexity_ratio": 1.002}
        quantize = quantize | limit
    content |= {
        "model": {"source": options.model},
        "target": {
            "loads": [{"batch": batch, "sequence": length} for batch, length in LOADS],
            "rounds": 15,
        },
        # The size is that of the file that is timed.
        "steps": [{"step": "quantize", **quantize}, {"step": "export"}],
    }
    recipe = Recipe.model_validate(content)
    report = json.loads(run(recipe, options.output, track=silent).to_json())
    after = report["stages"][-1]
    flips, size = str(after["fidelity"]["flips"]), f"{after['size_bytes'] / 1e6:.2f}"
    return [*quality(report), flips, size, *map(speedup, after["loads"])]


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    columns = ["method", "score", "points lost, or ratio of perplexities (interval)", "flips", "MB"]
    table = Table(*columns, *(f"speedup {batch}x{length}" for batch, length in LOADS))
    for name, quantize in CASES.items():
        cells = [name, *row(options, quantize)]
        print("\t".join(cells), flush=True)  # noqa: T201 - a row may take minutes
        table.add_row(*cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
