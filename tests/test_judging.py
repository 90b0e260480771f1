"""A run is judged again from its report, to the same verdict, and no other evidence passes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import yaml
from conftest import ROWS, secateur, write_recipe

from benchmarks.outcomes import Outcomes
from pipeline import ci
from pipeline.budget import Budget
from pipeline.evidence import EvidenceError
from pipeline.judging import hashes, judge_again
from pipeline.reading import RecipeError
from pipeline.recipe import Recipe
from pipeline.runner import run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    steps = [
        {"step": "finetune", "epochs": 6, "learning_rate": 2e-3},
        {"step": "prune", "heads": 0.25},
    ]
    target = {"runtime": "torch", "loads": [{"batch": 2, "sequence": 8}], "rounds": 6, "threads": 1,
              "dedicated": True}  # fmt: skip
    slices = {"column": "length", "values": ["long", "short"], "max_drop": 0.5}
    budget = {"max_drop": 0.2, "max_size": 2.0, "max_p50_ms": 1e5, "slices": slices}
    path = write_recipe(folder, steps=steps, target=target, budget=budget)
    lengths = ["long" if len(text.split()) > 8 else "short" for text, _ in ROWS]
    rows = [f"{text},{label},{kind}" for (text, label), kind in zip(ROWS, lengths, strict=True)]
    (folder / "data.csv").write_text("\n".join(["text,label,length", *rows]) + "\n")
    run(path, folder / "out")
    return folder / "out"


@pytest.fixture
def report(ran, tmp_path):
    return copy(ran / "report.json", tmp_path)


def copy(report, folder):
    """Return a copy of a report and its evidence in a folder."""
    kept = ("baseline.safetensors", "candidate.safetensors", "slices.json")
    for name in (*(f"evidence/{name}" for name in kept), "report.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((report.parent / name).read_bytes())
    return folder / "report.json"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_verdict_is_reached_again_to_the_byte(report):
    written = json.loads(report.read_text())
    again = judge_again(report)
    assert json.dumps(again["verdict"]) == json.dumps(written["verdict"])


def test_what_a_run_writes_is_of_the_published_schema(report):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "pipeline" / "report.schema.json").read_text())
    written = json.loads(report.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = jsonschema.Draft202012Validator(schema)
    assert valid.is_valid(written)
    assert not valid.is_valid(written | {"schema": 2})
    del written["stages"][1]["loads"][0]["latency_ms"]["p50"]
    (mistake,) = valid.iter_errors(written)
    assert mistake.message == "'p50' is a required property"


def test_a_report_of_the_schema_before_is_judged_alike(report):
    written = json.loads(report.read_text())
    added = {"latency_ms": ("effective_samples", "intervals", "quantiles"),
             "fidelity": ("broken", "mended", "kl_p99", "margin", "close", "perplexities",
                          "perplexity_ratios")}  # fmt: skip
    for stage in written["stages"]:
        for part in (stage, *stage["loads"]):
            for name in added.keys() & part.keys():
                part[name] = {k: v for k, v in part[name].items() if k not in added[name]}
    edit(report, schema=2, stages=written["stages"])
    again = judge_again(report, Budget(max_drop=0.2, max_size=2.0))
    of_both = [x for x in written["verdict"]["checks"] if x["what"] in ("accuracy drop", "size")]
    assert len(of_both) == 2
    assert again["verdict"]["checks"] == of_both
    assert "examples flipped." in ci.summary(again)
    with pytest.raises(EvidenceError, match="kept no intervals of latencies, expected one that"):
        judge_again(report)


def test_another_budget_has_another_verdict(report):
    assert judge_again(report, Budget(max_size=2.0))["verdict"]["outcome"] == "pass"
    found = judge_again(report, Budget(max_size=0.01))
    assert found["verdict"]["outcome"] == "fail"
    assert found["recipe"]["budget"]["max_size"] == 0.01


def test_a_limit_of_another_metric_is_refused(report):
    with pytest.raises(EvidenceError, match="found max_perplexity_ratio, expected max_drop or"):
        judge_again(report, Budget(max_perplexity_ratio=1.1))


def test_the_command_needs_no_torch_and_has_the_verdicts_status(report, tmp_path):
    (tmp_path / "budget.yaml").write_text("max_size: 0.01\nmax_drop: 0.9\n")
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
        "from pipeline.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "gate", tmp_path, "--budget", tmp_path / "budget.yaml",
         "--junit", tmp_path / "junit.xml", "--github"],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "at most 0.01: fail" in done.stdout
    assert "::error title=secateur::size: " in done.stdout
    assert "::notice title=secateur::accuracy drop: " in done.stdout
    suite = ET.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert [case.get("name") for case in suite.iter("testcase")] == ["accuracy drop", "size"]
    assert (tmp_path / "summary.md").read_text().startswith("# secateur: fail")
    assert report.is_file()


def test_every_slice_is_a_check_of_the_run(ran):
    report = json.loads((ran / "report.json").read_text())
    found = {check["what"]: check["outcome"] for check in report["verdict"]["checks"]}
    assert list(found) == [
        "accuracy drop",
        "size",
        "p50 at 2x8 in ms",
        "accuracy drop, length long",
        "accuracy drop, length short",
    ]
    assert found["p50 at 2x8 in ms"] == "pass"


def test_what_the_gate_split_can_decide_is_said_before(ran):
    done = secateur("check", ran.parent / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "max_drop 0.2, 600 examples, confidence 0.95" in done.stdout
    assert "slices of length, each needs 100 examples or more" in done.stdout
    assert "short: " in done.stdout


def test_a_run_leaves_junit(ran):
    cases = ET.parse(ran / "junit.xml").getroot().iter("testcase")
    checks = json.loads((ran / "report.json").read_text())["verdict"]["checks"]
    assert [case.get("name") for case in cases] == [check["what"] for check in checks]


def change_outcomes(report, change, sides=("baseline", "candidate")):
    """Put other outcomes beside a report that vouches for them."""
    folder = report.parent / "evidence"
    for side in sides:
        path = folder / f"{side}.safetensors"
        change(Outcomes.load(path)).save(path)
    edit(report, evidence=hashes(folder))


def columns(**changed):
    """Return a change of columns: each a function of the outcomes, or None to leave it out."""

    def change(found):
        new = {name: make(found) for name, make in changed.items() if make}
        kept = {name: found.columns[name] for name in found.columns if name not in changed}
        return replace(found, columns=kept | new)

    return change


def constant(found):
    return np.full(len(found.ids), found.columns["label"][0])


def without_examples(found):
    none = {name: values[:0] for name, values in found.columns.items()}
    return Outcomes((), none, found.decisions[:0], found.log_probabilities[:0], found.lengths[:0])


def with_nan(found):
    return replace(found, log_probabilities=np.full_like(found.log_probabilities, np.nan))


def without_normalising(found):
    return replace(found, log_probabilities=np.full_like(found.log_probabilities, 5.0))


def wrong_everywhere(found):
    return replace(found, columns=found.columns | {"prediction": 1 - found.columns["label"]})


def better(report):
    path = report.parent / "evidence" / "candidate.safetensors"
    columns(prediction=lambda o: o.columns["label"])(Outcomes.load(path)).save(path)


def edit_stage(report, at, **changes):
    stages = json.loads(report.read_text())["stages"]
    stages[at] |= changes
    edit(report, stages=stages)


def edit_score(report, **changes):
    score = json.loads(report.read_text())["stages"][-1]["score"]
    edit_stage(report, -1, score=score | changes)


def edit_load(report, **changes):
    load = json.loads(report.read_text())["stages"][-1]["loads"][0]
    edit_stage(report, -1, loads=[load | changes])


def garbage(report):
    (report.parent / "evidence" / "candidate.safetensors").write_bytes(b"no outcomes")
    edit(report, evidence=hashes(report.parent / "evidence"))


def few_slices(report):
    (report.parent / "evidence" / "slices.json").write_text('{"genre": ["play"]}')
    edit(report, evidence=hashes(report.parent / "evidence"))


def guessing(report):
    change_outcomes(report, wrong_everywhere)
    for at in (0, -1):
        score = json.loads(report.read_text())["stages"][at]["score"]
        edit_stage(report, at, score=score | {"value": 0.0})


DROP = {"max_drop": 0.9}
LENGTH = {"slices": {"column": "length", "max_drop": 0.9}}
GENRE = DROP | {"slices": {"column": "genre", "max_drop": 0.5}}
BAD = {
    "no report": (lambda r: r.unlink(), "report.json: no such file", DROP),
    "no json": (lambda r: r.write_text("{"), "report.json: cannot be read", DROP),
    "a list": (lambda r: r.write_text("[]"), "found the schema list, expected 2", DROP),
    "another schema": (lambda r: edit(r, schema=1), "found the schema 1, expected 2", DROP),
    "no stages": (lambda r: edit(r, stages=[]), "found nothing under stages", DROP),
    "one side": (lambda r: edit(r, evidence={"baseline": "0"}),
                 "nothing under evidence.candidate", DROP),
    "no budget": (lambda r: edit(r, recipe={"task": {}}), "found no budget in its recipe", None),
    "no target": (lambda r: edit(r, recipe={"task": {}}), "found no labels or no target", DROP),
    "no labels": (lambda r: edit(r, data={}), "found no labels or no target", DROP),
    "a stage of another form": (lambda r: edit(r, stages=[{"name": "x"}]), "stages.0.step: Field",
                                DROP),
    "no outcomes": (lambda r: (r.parent / "evidence" / "candidate.safetensors").unlink(),
                    "belongs beside", DROP),
    "better outcomes": (better, "found other outcomes than the report's", DROP),
    "outcomes that are none": (garbage, "found no outcomes of the candidate", DROP),
    "other examples": (lambda r: change_outcomes(r, lambda o: replace(o, ids=o.ids[::-1]),
                                                 ["candidate"]),
                       "found other examples on one side", DROP),
    "an example twice": (lambda r: change_outcomes(r, lambda o: replace(o, ids=(
        o.ids[0], *o.ids[:-1]))), "found an example twice", DROP),
    "fewer examples": (lambda r: change_outcomes(r, lambda o: replace(o, ids=o.ids[1:])),
                       "values, expected 599", DROP),
    "no examples": (lambda r: change_outcomes(r, without_examples), "found no examples", DROP),
    "NaN": (lambda r: change_outcomes(r, columns(prediction=lambda o: np.full(len(o.ids), np.nan)),
                                      ["candidate"]),
            "found NaN or infinity in 'prediction'", DROP),
    "NaN in the probabilities": (lambda r: change_outcomes(r, with_nan, ["candidate"]),
                                 "KL: found other classes, NaN", {"max_kl": 9.0}),
    "log-probabilities that are none": (
        lambda r: change_outcomes(r, without_normalising, ["candidate"]),
        "found probabilities that add up to", {"max_kl": 9.0}),
    "a column less": (lambda r: change_outcomes(r, columns(prediction=None), ["candidate"]),
                      "expected the same", DROP),
    "no predictions": (lambda r: change_outcomes(r, columns(prediction=None)),
                       "no accuracy of these outcomes", DROP),
    "other labels": (lambda r: change_outcomes(r, columns(label=constant), ["candidate"]),
                     "found other values of 'label'", DROP),
    "a class that is no label": (lambda r: change_outcomes(
        r, columns(prediction=lambda o: o.columns["prediction"] + 5)),
        "expected those of 2 labels", DROP),
    "an unknown metric": (lambda r: edit_score(r, metric="accurracy"), "expected one metric", DROP),
    "another metric": (lambda r: edit_score(r, metric="macro_f1"), "expected one metric", DROP),
    "a better score": (lambda r: edit_score(r, value=1.5), "expected the report's 1.5", DROP),
    "other numbers of examples": (lambda r: edit_score(r, examples=10), "expected 10", DROP),
    "a score of NaN": (lambda r: edit_score(r, value=float("nan")), "expected the report's nan",
                       DROP),
    "a baseline that guesses": (guessing, "take a trained model", DROP),
    "a baseline that guesses, of slices": (guessing, "take a trained model", LENGTH),
    "a size of NaN": (lambda r: edit_stage(r, -1, size_bytes=float("nan")), "size_bytes: Input",
                      {"max_size": 9.0}),
    "no peak memory": (lambda r: edit_stage(r, -1, memory={}), "peak memory: found no measurement",
                       {"max_memory": 9.0}),
    "half a speedup": (lambda r: edit_load(r, speedup={"value": 9.0}), "speedup.low: Field",
                       {"min_speedup": 0.1}),
    "no loads": (lambda r: edit_stage(r, -1, loads=[]), "found no loads", {"min_speedup": 0.1}),
    "a machine that is shared": (lambda r: edit(r, recipe={"target": {"dedicated": "yes"}}),
                                 "which hold on a target that nothing else",
                                 {"max_p50_ms": 1e9}),
    "no slices": (lambda r: None, "found no column 'genre' in the evidence", GENRE),
    "too few slices": (few_slices, "found 1 values of 'genre', expected 600", GENRE),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_evidence_is_an_error_and_never_a_pass(report, name):
    change, message, limits = BAD[name]
    change(report)
    with pytest.raises(EvidenceError, match=message):
        judge_again(report, Budget(**limits) if limits else None)


def test_the_last_release_is_compared_example_by_example(report, tmp_path):
    old = copy(report, tmp_path / "old")
    passes = json.loads(old.read_text())["verdict"] | {"outcome": "pass"}
    edit(old, verdict=passes)
    found = judge_again(report, Budget(max_drop=0.2), old)
    assert [(check["what"], check["outcome"]) for check in found["verdict"]["checks"]] == [
        ("accuracy drop", "pass"),
        ("accuracy drop against released", "pass"),
    ]
    assert found["verdict"]["checks"][1]["estimate"] == 0.0
    named = Budget(max_drop=0.2, regression={"report": str(old.parent), "max_drop": 0.1})
    assert judge_again(report, named)["verdict"]["checks"][1]["allowed"] == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: edit(r, verdict={"outcome": "fail", "checks": []}),
            "found the verdict fail, expected that",
        ),
        (lambda r: r.unlink(), "no such file"),
        (lambda r: edit(r, data={"labels": ["1", "0"]}), "found the labels"),
        (
            lambda r: edit(r, machine={**json.loads(r.read_text())["machine"], "cpu": "another"}),
            "found it measured with other machine.cpu, expected the same",
        ),
        (
            lambda r: change_outcomes(r, lambda o: replace(o, ids=tuple(i[::-1] for i in o.ids))),
            "found other gate examples than this run's",
        ),
    ],
)
def test_a_release_that_cannot_be_compared_is_an_error(report, tmp_path, change, message):
    old = copy(report, tmp_path / "old")
    edit(old, verdict={"outcome": "pass", "checks": []})
    change(old)
    with pytest.raises(EvidenceError, match=message):
        judge_again(report, Budget(max_drop=0.2, max_memory=9.0), old)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slices: {colum: a, max_drop: 0.1}", "slices.colum: unknown key; did you mean 'column'"),
        ("regression: {max_drop: 0.1}", "regression.report: Field required"),
        ("max_dorp: 0.1", "max_dorp: unknown key; did you mean 'max_drop'"),
        ("max_drop: 2", "max_drop: Input should be less than 1, found 2"),
        ("confidence: 0.9", "found no limit"),
        ("", "found an empty file, expected a mapping with some of"),
        ("[1]", "found list, expected a mapping with some of"),
        ("a: b: c", "not YAML"),
    ],
)
def test_a_budget_that_is_none_is_told(tmp_path, text, message):
    path = tmp_path / "budget.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        Budget.from_yaml(path)


def test_the_command_tells_bad_evidence_in_a_line(report):
    report.write_text("{")
    done = secateur("gate", report)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot be read" in done.stderr


def test_a_summary_is_cut_where_github_would_refuse_it(ran, monkeypatch):
    content = json.loads((ran / "report.json").read_text())
    monkeypatch.setattr(ci, "SUMMARY_BYTES", 200)
    text = ci.summary(content)
    assert len(text.encode()) <= 220
    assert text.endswith("(cut short)\n")


def test_the_worst_is_annotated_first():
    checks = [
        {"what": what, "estimate": 1.0, "low": 1.0, "high": 1.0, "allowed": 0.5, "note": "",
         "outcome": what, "at_least": False}
        for what in ("pass", "inconclusive", "fail")
    ]  # fmt: skip
    lines = ci.annotations({"verdict": {"checks": checks}})
    assert [line.split()[0] for line in lines] == ["::error", "::warning", "::notice"]


def test_junit_is_xml_whatever_a_slice_is_called():
    check = {"what": "drop, column a\x00\x1b\ud800\ufffeb", "estimate": 1.0, "low": 1.0,
             "high": 1.0, "allowed": 0.5, "outcome": "fail", "note": "\x07",
             "at_least": False}  # fmt: skip
    case = ET.fromstring(ci.junit({"verdict": {"checks": [check]}}).encode()).find(".//testcase")
    assert case is not None
    assert case.get("name") == "drop, column a\N{REPLACEMENT CHARACTER}" + "\ufffd" * 3 + "b"


def test_a_message_of_several_lines_stays_one_command():
    check = {"what": "a\nb", "estimate": 1.0, "low": 1.0, "high": 1.0, "allowed": 0.5,
             "outcome": "fail", "note": "50 %", "at_least": False}  # fmt: skip
    (line,) = ci.annotations({"verdict": {"checks": [check]}})
    assert line.startswith("::error title=secateur::a%0Ab: 1")
    assert line.endswith("50 %25")


def test_a_gate_split_counts_what_it_judged(ran):
    # The last test here: it runs again in the folder that the others read.
    report = json.loads((ran / "report.json").read_text())
    assert len(report["ledger"]["candidates"]) == 1
    folder = ran.parent
    run(folder / "recipe.yaml", ran)
    assert json.loads((ran / "report.json").read_text())["ledger"] == report["ledger"]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["steps"][1]["heads"] = 0.5
    recipe["budget"] = {"max_size": 9.0}
    other = run(Recipe.model_validate(recipe), ran)
    assert len(other.ledger["candidates"]) == 2
    assert other.ledger["candidates"][0] == report["ledger"]["candidates"][0]
    published = json.loads((ran / "artifact" / "manifest.json").read_text())
    assert published["about"]["ledger"] == other.ledger
    assert "has judged 2 candidates" in (ran / "report.md").read_text()
