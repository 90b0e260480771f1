"""What is shipped is whole: every recipe can be read, every package is installed."""

import tomllib
from pathlib import Path

import pytest

from pipeline import Recipe, search, space

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_recipe_is_read(path):
    opened, settings = space.read(path)
    command = "search" if opened.open else "run"
    recipe = search.read(path)[2][0] if opened.open else Recipe.from_yaml(path)
    assert bool(settings) == bool(opened.open)
    assert recipe.steps[-1].step == "export"
    assert f"secateur {command} configs/{path.name}" in path.read_text()


def test_every_package_is_installed():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    here = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for name in ("pipeline", "exporters", "benchmarks")
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert set(declared["packages"]) - {*declared["package-dir"]} == here
    assert all(any((ROOT / path).glob("*.py")) for path in declared["package-dir"].values())
