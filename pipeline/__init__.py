"""Prune, quantize and export Hugging Face transformers, measured at every stage.

    from pipeline import prune_heads, units, save_pretrained, from_pretrained

What a name needs is imported when it is first used, so that the command line starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.checkpoint import from_pretrained, save_pretrained
    from pipeline.gptq_by_blocks import quantize_by_blocks
    from pipeline.out_of_core import prune_by_blocks
    from pipeline.pruning import (
        prune_heads,
        prune_layers,
        prune_neurons,
        prune_queries,
        units,
    )
    from pipeline.recipe import Recipe
    from pipeline.runner import run

_HOMES = {
    "Recipe": "pipeline.recipe",
    "from_pretrained": "pipeline.checkpoint",
    "prune_by_blocks": "pipeline.out_of_core",
    "quantize_by_blocks": "pipeline.gptq_by_blocks",
    "prune_heads": "pipeline.pruning",
    "prune_layers": "pipeline.pruning",
    "prune_neurons": "pipeline.pruning",
    "prune_queries": "pipeline.pruning",
    "run": "pipeline.runner",
    "save_pretrained": "pipeline.checkpoint",
    "units": "pipeline.pruning",
}

__all__ = [
    "Recipe",
    "from_pretrained",
    "prune_by_blocks",
    "prune_heads",
    "prune_layers",
    "prune_neurons",
    "prune_queries",
    "quantize_by_blocks",
    "run",
    "save_pretrained",
    "units",
]


def __getattr__(name: str) -> object:
    """Return one of the public names, importing its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
