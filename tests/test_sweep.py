"""A sweep has the runs that its recipe stands for, all of them, and says so if it has not."""

import json
import shutil
from copy import deepcopy

import pytest
import yaml
from conftest import secateur
from reports import SAMPLES, content
from test_recipe import GOOD

from pipeline import Recipe, collection, planning, sweep
from pipeline.judging import hashes
from pipeline.reading import RecipeError
from pipeline.store import publish

TARGET = {"threads": 1}
STEPS = [
    {"step": "prune", "heads": {"choose": [0.25, 0.5]}},
    {"choose": [None, {"step": "quantize"}]},
    {"step": "export"},
]


def write(folder, **changes):
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"steps": STEPS, "target": TARGET} | changes))
    return path


@pytest.fixture
def planned(tmp_path):
    """Give a plan of four runs."""
    return planning.plan(write(tmp_path), tmp_path / "sweep")


def finish(run, outcome="pass", **changes):
    """Leave what a run leaves, made up."""
    report = content(SAMPLES[outcome]()) | {"recipe": deepcopy(run.recipe)} | changes
    (run.folder / "evidence").mkdir(parents=True)
    for side in ("baseline", "candidate"):
        (run.folder / "evidence" / f"{side}.safetensors").write_text(f"{side} {run.index}")
    report["evidence"] = hashes(run.folder / "evidence")
    report["ledger"] = {"examples": "e", "candidates": [f"candidate {run.index}"]}
    if outcome == "pass":
        publish(lambda f: (f / "model").write_text("weights") and None, run.folder / "artifact", {})
    (run.folder / "report.json").write_text(json.dumps(report))


def test_a_plan_has_every_recipe_and_each_can_be_run_by_itself(planned, tmp_path):
    told = [tuple(run.picked.values()) for run in planned]
    assert told == [
        ("0.25", "no quantize"),
        ("0.25", "quantize"),
        ("0.5", "no quantize"),
        ("0.5", "quantize"),
    ]
    for run in planned:
        recipe = Recipe.from_yaml(run.folder / "recipe.yaml")
        assert recipe.model_dump(mode="json") == run.recipe
        assert recipe.steps[0].heads == float(run.picked["steps.0.heads"])
    assert [run.folder.name for run in planned] == ["000", "001", "002", "003"]
    assert sweep.members(tmp_path / "sweep") == planned


def test_paths_of_a_plan_hold_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    budget = {"max_drop": 0.1, "regression": {"report": "last", "max_drop": 0.1}}
    (first, *_) = planning.plan(write(tmp_path, budget=budget), tmp_path / "sweep")
    assert first.recipe["model"]["source"] == str(tmp_path / "folder")
    assert first.recipe["task"]["data"] == str(tmp_path / "data.csv")
    assert first.recipe["budget"]["regression"]["report"] == str(tmp_path / "last")


def test_names_that_are_no_paths_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"source": "builtin:minilm"}
    task = GOOD["task"] | {"data": "glue"}
    (first, *_) = planning.plan(write(tmp_path, model=model, task=task), tmp_path / "sweep")
    assert first.recipe["model"]["source"] == "builtin:minilm"
    assert first.recipe["task"]["data"] == "glue"


def test_what_a_search_has_beside_the_grid_is_not_for_a_sweep(tmp_path):
    assert len(planning.plan(write(tmp_path, search={"trials": 3}), tmp_path / "sweep")) == 4


def test_the_same_plan_again_is_no_other_one(planned, tmp_path):
    (tmp_path / "sweep" / "001" / "recipe.yaml").unlink()  # as a kill leaves it
    assert planning.plan(tmp_path / "mine.yaml", tmp_path / "sweep") == planned
    assert (tmp_path / "sweep" / "001" / "recipe.yaml").is_file()
    with pytest.raises(
        RecipeError, match="found the plan of other runs, expected the same or none"
    ):
        planning.plan(write(tmp_path, seed=1), tmp_path / "sweep")


def test_a_plan_overwrites_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"found files but no plan.json, expected a new folder"):
        planning.plan(write(tmp_path), tmp_path / "out")


def test_recipes_that_cannot_work_are_told_by_their_numbers(tmp_path):
    steps = [{"step": "prune", "heads": {"choose": [0.1, 1.5]}}, *STEPS[1:]]
    with pytest.raises(
        RecipeError,
        match=r"recipe 2 \(steps.0.heads 1.5, steps.1 no quantize\): .*1 mistake\n  steps.0.heads: "
        r".*\nrecipe 3 ",
    ):
        planning.plan(write(tmp_path, steps=steps), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    many = [{"step": "prune", "heads": {"from": 1, "to": 9, "step": 1}}, {"step": "export"}]
    with pytest.raises(RecipeError, match="and 4 more recipes"):
        planning.plan(write(tmp_path, steps=many), tmp_path / "sweep")


def test_a_plan_needs_something_open_and_a_number_of_threads(tmp_path):
    with pytest.raises(RecipeError, match=r"found no value that is left open .*`secateur run`"):
        planning.plan(write(tmp_path, steps=GOOD["steps"]), tmp_path / "sweep")
    with pytest.raises(RecipeError, match=r"target.threads: found none, expected a number"):
        planning.plan(write(tmp_path, target={}), tmp_path / "sweep")


def test_which_run_it_is_says_the_option_or_the_scheduler(planned, tmp_path):
    folder = tmp_path / "sweep"
    assert sweep.member(folder, 2, {"SLURM_ARRAY_TASK_ID": "1"}).index == 2
    assert sweep.member(folder, None, {"SLURM_ARRAY_TASK_ID": "1"}).index == 1
    assert sweep.member(folder, None, {"JOB_COMPLETION_INDEX": "3"}).index == 3
    with pytest.raises(RecipeError, match="found no index, expected --index, one of SLURM_ARRAY"):
        sweep.member(folder, None, {})
    with pytest.raises(RecipeError, match="found the index 4, expected 0 to 3"):
        sweep.member(folder, 4, {})


def test_a_changed_plan_and_a_changed_recipe_are_refused(planned, tmp_path):
    path = planned[0].folder / "recipe.yaml"
    path.write_text(path.read_text().replace("0.25", "0.3"))
    with pytest.raises(RecipeError, match=r"000/recipe.yaml: found another recipe than the plan's"):
        planning.carry_out(planned[0], lambda items, *_: items)
    plan = tmp_path / "sweep" / "plan.json"
    plan.write_text(plan.read_text().replace("0.25", "0.3"))
    with pytest.raises(RecipeError, match=r"plan.json: found another content than its own sha256"):
        sweep.members(tmp_path / "sweep")
    plan.write_text("{")
    with pytest.raises(RecipeError, match=r"plan.json: cannot be read as a plan"):
        sweep.plan_hash(tmp_path / "sweep")
    plan.unlink()
    with pytest.raises(RecipeError, match=r"plan.json: no such file, expected one of `secateur"):
        sweep.members(tmp_path / "sweep")


def test_a_run_is_done_when_all_of_it_is_whole_and_of_its_recipe(planned):
    for run, outcome in zip(planned, ("pass", "fail", "inconclusive", "pass"), strict=True):
        assert sweep.standing(run).state == "missing"
        finish(run, outcome)
        found = sweep.standing(run)
        assert (found.state, found.report["verdict"]["outcome"]) == ("done", outcome)


def lose_artifact(run):
    shutil.rmtree(run.folder / "artifact")


def change_artifact(run):
    (run.folder / "artifact" / "model").write_text("other")


def change_evidence(run):
    (run.folder / "evidence" / "candidate.safetensors").write_text("other")


def cut_report(run):
    path = run.folder / "report.json"
    path.write_text(path.read_text()[:-20])


def change_recipe(run):
    path = run.folder / "report.json"
    report = json.loads(path.read_text())
    report["recipe"]["seed"] = 7
    path.write_text(json.dumps(report))


def lose_report(run):
    (run.folder / "report.json").unlink()


LOSSES = {
    lose_artifact: "damaged",
    change_artifact: "damaged",
    change_evidence: "damaged",
    cut_report: "damaged",
    change_recipe: "stale",
    lose_report: "missing",
}


@pytest.mark.parametrize("lose", LOSSES, ids=lambda f: f.__name__)
def test_no_run_is_left_out_in_silence(planned, tmp_path, lose):
    for run in planned:
        finish(run)
    lose(planned[2])
    found = secateur("sweep", "collect", tmp_path / "sweep")
    assert found.returncode == 5
    assert "found 3 of 4 runs, expected all" in found.stderr
    assert f"sweep/002: {LOSSES[lose]}: " in found.stderr
    joined = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [run["index"] for run in joined["runs"]] == [0, 1, 3]
    assert [(m["index"], m["state"]) for m in joined["missing"]] == [(2, LOSSES[lose])]
    assert "**Not in this table:**" in (tmp_path / "sweep" / "sweep.md").read_text()


def test_runs_of_other_data_are_not_joined(planned, tmp_path):
    for run in planned:
        other = {"data": content(SAMPLES["pass"]())["data"]}
        if run.index == 3:
            other["data"]["fingerprints"]["gate"] = "3" * 64
        finish(run, **other)
    joined = collection.collect(tmp_path / "sweep")
    assert [(m["index"], m["state"]) for m in joined["missing"]] == [(3, "stale")]


def test_all_runs_are_joined_with_what_was_picked(planned, tmp_path):
    for run in planned:
        finish(run, "fail" if run.index == 2 else "pass")
    found = secateur("sweep", "collect", tmp_path / "sweep")
    assert found.returncode == 0, found.stderr
    (joined,) = [json.loads((tmp_path / "sweep" / "sweep.json").read_text())]
    assert joined["missing"] == []
    assert [run["outcome"] for run in joined["runs"]] == ["pass", "pass", "fail", "pass"]
    first = joined["runs"][0]  # as tests/reports.py has it
    assert first["picked"] == {"steps.0.heads": "0.25", "steps.1": "no quantize"}
    assert (first["score"], first["baseline_score"]) == (0.9025, 0.9105)
    assert first["loss"] == {
        "what": "accuracy drop", "estimate": 0.008, "low": 0.0021, "high": 0.0142,
    }  # fmt: skip
    assert first["size_ratio"] == pytest.approx(24_100_000 / 90_868_376)
    header, rows = collection.table(joined)
    assert header == ["run", "0.heads", "1", "accuracy", "lost", "MB", "size", "speedup 1x128",
                      "speedup 8x128", "verdict"]  # fmt: skip
    assert rows[1][:4] == ["001", "0.25", "quantize", "0.9025"]
    assert rows[2][-1] == "fail"


def test_how_often_the_gate_split_was_used_is_told(planned, tmp_path):
    for run in planned:
        finish(run)
    assert any(
        note.startswith("the gate split has judged 4 candidates: the verdict of the best")
        for note in collection.collect(tmp_path / "sweep")["notes"]
    )


def test_a_run_that_is_done_is_not_done_again(planned, tmp_path):
    """Its model is not there: to do it again would fail."""
    finish(planned[1], "fail")
    done = secateur("sweep", "run", tmp_path / "sweep", "--index", 1)
    assert (done.returncode, done.stdout.split()[-2:]) == (0, ["done:", "fail"])
    assert secateur("sweep", "run", tmp_path / "sweep", "--index", 0).returncode == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--slots", "2"], "--slots: expected --executor local beside it"),
        (["--index", "0", "--address", "x"], "--address: expected --executor ray beside it"),
        (["--executor", "local", "--address", "x"], "--address: expected --executor ray beside"),
        (["--executor", "ray", "--slots", "2"], "--slots: a Ray cluster's resources decide"),
        ([], "found no index, expected --index"),
    ],
)
def test_options_that_do_not_go_together_are_refused(planned, tmp_path, monkeypatch, options, said):
    for name in sweep.INDICES:
        monkeypatch.delenv(name, raising=False)
    found = secateur("sweep", "run", tmp_path / "sweep", *options)
    assert (found.returncode, said in found.stderr) == (2, True)


def test_the_command_plans(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = secateur("sweep", "plan", write(tmp_path))
    assert found.returncode == 0, found.stderr
    assert (
        found.stdout.splitlines()[0] == "sweeps/mine/000: steps.0.heads 0.25, steps.1 no quantize"
    )
    assert len(sweep.members(tmp_path / "sweeps" / "mine")) == 4
