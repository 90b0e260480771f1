"""A run is judged again from its report, to the same verdict, and no other evidence passes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from conftest import secateur, write_recipe

from benchmarks.outcomes import Outcomes
from pipeline import ci
from pipeline.budget import Budget
from pipeline.gate import EvidenceError
from pipeline.judging import hashes, judge_again, keep
from pipeline.reading import RecipeError
from pipeline.runner import run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    steps = [
        {"step": "finetune", "epochs": 6, "learning_rate": 2e-3},
        {"step": "prune", "heads": 0.25},
    ]
    target = {"runtime": "torch", "loads": [{"batch": 2, "sequence": 8}], "rounds": 6, "threads": 1}
    run(write_recipe(folder, steps=steps, target=target), folder / "out")
    return folder / "out"


@pytest.fixture
def report(ran, tmp_path):
    for name in ("evidence/baseline.safetensors", "evidence/candidate.safetensors", "report.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ran / name).read_bytes())
    return tmp_path / "report.json"


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
    again = judge_again(report)
    assert again["verdict"] == written["verdict"]
    assert "examples flipped." in ci.summary(again)


def test_another_budget_has_another_verdict(report):
    assert judge_again(report, Budget(max_size=2.0))["verdict"]["outcome"] == "pass"
    found = judge_again(report, Budget(max_size=0.01))
    assert found["verdict"]["outcome"] == "fail"
    assert found["recipe"]["budget"]["max_size"] == 0.01


def test_a_limit_of_another_metric_is_refused(report):
    with pytest.raises(EvidenceError, match="found max_perplexity_ratio, expected max_drop"):
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


def test_a_run_leaves_junit(ran):
    cases = ET.parse(ran / "junit.xml").getroot().iter("testcase")
    checks = json.loads((ran / "report.json").read_text())["verdict"]["checks"]
    assert [case.get("name") for case in cases] == [check["what"] for check in checks]


def other_outcomes(report):
    path = report.parent / "evidence" / "candidate.safetensors"
    found = Outcomes.load(path)
    right = found.columns | {"prediction": found.columns["label"]}
    Outcomes(found.ids, right, found.decisions, found.log_probabilities).save(path)


def other_examples(report):
    other_outcomes_of(report, lambda ids: ids[::-1])


def an_example_twice(report):
    other_outcomes_of(report, lambda ids: (ids[0], *ids[:-1]), sides=("baseline", "candidate"))


def other_outcomes_of(report, change, sides=("candidate",)):
    folder = report.parent / "evidence"
    found = {s: Outcomes.load(folder / f"{s}.safetensors") for s in ("baseline", "candidate")}
    for side in sides:
        o = found[side]
        found[side] = Outcomes(change(o.ids), o.columns, o.decisions, o.log_probabilities)
    keep(folder, found["baseline"], found["candidate"])
    edit(report, evidence=hashes(folder))


def nan(report):
    folder = report.parent / "evidence"
    found = {s: Outcomes.load(folder / f"{s}.safetensors") for s in ("baseline", "candidate")}
    o = found["candidate"]
    wrong = o.columns | {"prediction": np.full(len(o.ids), np.nan)}
    keep(folder, found["baseline"], Outcomes(o.ids, wrong, o.decisions, o.log_probabilities))
    edit(report, evidence=hashes(folder))


BAD = {
    "no report": (lambda r: r.unlink(), "report.json: no such file"),
    "no json": (lambda r: r.write_text("{"), "report.json: cannot be read"),
    "a list": (lambda r: r.write_text("[]"), "found the schema list, expected 2 or 3"),
    "another schema": (lambda r: edit(r, schema=1), "found the schema 1, expected 2 or 3"),
    "no stages": (lambda r: edit(r, stages=[]), "found nothing under stages"),
    "one side": (lambda r: edit(r, evidence={"baseline": "0"}), "nothing under evidence.candidate"),
    "no budget": (lambda r: edit(r, recipe={"task": {}}), "found no budget in its recipe"),
    "a stage of another form": (
        lambda r: edit(r, stages=[{"name": "x"}]), "stages.0.step: Field required"),
    "no outcomes": (
        lambda r: (r.parent / "evidence" / "candidate.safetensors").unlink(), "belongs beside"),
    "better outcomes": (other_outcomes, "found other outcomes than the report's"),
    "other examples": (other_examples, "found other examples on one side"),
    "an example twice": (an_example_twice, "found an example twice"),
    "NaN": (nan, "found NaN or infinity in 'prediction'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_evidence_is_an_error_and_never_a_pass(report, name):
    change, message = BAD[name]
    change(report)
    with pytest.raises(EvidenceError, match=message):
        judge_again(report)


@pytest.mark.parametrize(
    ("text", "message"),
    [
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


def test_a_message_of_several_lines_stays_one_command():
    check = {"what": "a\nb", "estimate": 1.0, "low": 1.0, "high": 1.0, "allowed": 0.5,
             "outcome": "fail", "note": "50 %", "at_least": False}  # fmt: skip
    (line,) = ci.annotations({"verdict": {"checks": [check]}})
    assert line.startswith("::error title=secateur::a%0Ab: 1")
    assert line.endswith("50 %25")
