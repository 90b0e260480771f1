"""A recipe with open values becomes the plan of a sweep, and one run of a plan is carried out.

Every recipe is checked before anything is written. Their paths are made absolute, so that a run may
be started anywhere that has the same files under the same paths.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.accuracy import Track
from benchmarks.data import BUILDERS
from pipeline import runner, space
from pipeline.inventory import STAGES
from pipeline.reading import RecipeError
from pipeline.recipe import Recipe
from pipeline.report import Report
from pipeline.sweep import RECIPE, Member, members, write
from pipeline.writing import write_text

SHOWN: Final = 5
"""Recipes whose mistakes are told."""


def plan(path: Path, folder: Path) -> tuple[Member, ...]:
    """Return the runs of a sweep over all recipes that a file stands for, written to a folder.

    Raises:
        RecipeError: the file leaves nothing open, a recipe cannot work or does not say its number
            of threads, or the folder holds something else.
    """
    found, _ = space.read(path)
    values = found.open
    if not values:
        raise RecipeError(
            f"{path}: found no value that is left open (choose, or from, to and step), expected"
            " one; use `secateur run`"
        )
    words, contents, recipes, mistakes = [], [], [], []
    for index, picked in enumerate(found):
        said = {place: values[place].words(value) for place, value in picked.items()}
        try:
            recipe = found.recipe(partial(_picked, picked))
            content = _absolute(recipe.model_dump(mode="json", exclude_unset=True))
            recipes.append(Recipe.model_validate(content).model_dump(mode="json"))
        except RecipeError as error:
            mistakes.append(f"recipe {index} ({_listed(said)}): {error}")
            continue
        words.append(said)
        contents.append(content)
    if mistakes:
        more = len(mistakes) - SHOWN
        told = [*mistakes[:SHOWN], *([f"and {more} more recipes"] if more > 0 else [])]
        raise RecipeError("\n".join(told))
    if recipes[0]["target"]["threads"] is None:
        raise RecipeError(
            f"{path}: target.threads: found none, expected a number; the runs are compared, and may"
            " be started where there are more or fewer cores"
        )
    write(folder, words, recipes)
    runs = members(folder)
    for run, content in zip(runs, contents, strict=True):
        run.folder.mkdir(exist_ok=True)
        write_text(run.folder / RECIPE, yaml.safe_dump(content, sort_keys=False))
    return runs


def _picked(picked: Mapping[str, float], place: str, _: space.Open) -> float:
    return picked[place]


def default_folder(recipe: Path) -> Path:
    """Return the folder of a recipe's sweep unless another is named."""
    return Path("sweeps", recipe.stem)


def carry_out(run: Member, track: Track) -> Report:
    """Do one run of a plan, and return its report.

    Raises:
        RecipeError: the recipe beside it is not the plan's; and as `runner.run` does.
    """
    path = run.folder / RECIPE
    recipe = Recipe.from_yaml(path)
    if recipe.model_dump(mode="json") != run.recipe:
        raise RecipeError(
            f"{path}: found another recipe than the plan's, expected it as `secateur sweep plan`"
            " wrote it; plan again into another folder"
        )
    return runner.run(recipe, run.folder, store=run.folder.parent / STAGES, track=track)


def _absolute(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a recipe with absolute paths; other names stay as they are."""
    content["model"]["source"] = _path(content["model"]["source"])
    content["task"]["data"] = _path(content["task"]["data"])
    if regression := content["budget"].get("regression"):
        regression["report"] = str(Path(regression["report"]).absolute())
    for step in content["steps"]:
        if step.get("timing_cache"):
            step["timing_cache"] = str(Path(step["timing_cache"]).absolute())
    return content


def _path(name: str) -> str:
    """Return the absolute path of a file or folder, or the name of something else."""
    path = Path(name).expanduser()
    local = name.startswith((".", "/", "~")) or path.suffix in {*BUILDERS, ".gz"}
    return str(path.absolute()) if local or path.exists() else name


def _listed(said: dict[str, str]) -> str:
    return ", ".join(f"{place} {word}" for place, word in said.items())
