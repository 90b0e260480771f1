"""Every recipe that is shipped can be read."""

from pathlib import Path

import pytest

from pipeline import Recipe

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_recipe_is_read(path):
    recipe = Recipe.from_yaml(path)
    assert recipe.steps[-1].step == "export"
    assert f"secateur run configs/{path.name}" in path.read_text()
