"""A search returns the best artifact that the gate lets pass, and goes on where it was."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import secateur, write_recipe

from pipeline import search_page, search_report
from pipeline.front import Found
from pipeline.inventory import prune
from pipeline.judging import judge_again
from pipeline.proposals import Proposals
from pipeline.reading import RecipeError
from pipeline.search import read, search

ROOT = Path(__file__).parents[1]
SPLITS = {"train": "train[:500]", "calibration": "train[500:600]", "selection": "train[600:1000]",
          "gate": "train[1000:]"}  # fmt: skip
STEPS = [
    {"step": "finetune", "epochs": 20, "learning_rate": 2e-3},
    {"step": "prune", "neurons": {"choose": [0.001, 0.3, 0.9]}, "multiple": 8},
]
TARGET = {"runtime": "torch", "loads": [{"batch": 2, "sequence": 16}], "rounds": 6, "threads": 1}


def write(folder, *, steps=STEPS, settings=None, **changes):
    path = write_recipe(folder, steps=steps, target=TARGET, budget={"max_drop": 0.1})
    content = yaml.safe_load(path.read_text()) | {"search": settings or {"best": "size"}}
    content["task"]["splits"] = SPLITS
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    told: list[Found] = []
    return search(write(folder), folder / "out", tell=told.append), folder / "out", told


def test_the_smallest_that_passes_is_published(searched):
    found, output, _ = searched
    content = json.loads((output / "search.json").read_text())
    by_number = {c["number"]: c for c in content["candidates"]}
    assert [c["picked"] for c in content["candidates"]] == [
        {"steps.1.neurons": words} for words in ("0.001", "0.3", "0.9")
    ]
    chosen = by_number[content["chosen"]]
    assert found.outcome == content["outcome"] == "pass"
    for other in by_number.values():
        if other["lost"] is not None and other["size"] < chosen["size"]:
            assert other["selection"] != "pass" or other["gate"] in ("fail", "inconclusive")
    report = json.loads((output / "report.json").read_text())
    share = report["recipe"]["steps"][1]["neurons"]
    assert {"steps.1.neurons": f"{share:g}"} == chosen["picked"]
    assert (output / "artifact" / "model.safetensors").is_file()
    assert content["artifact"] == str(output / "artifact")


def test_the_gate_split_has_judged_the_finalists_alone(searched):
    found, output, _ = searched
    ledger = json.loads((output / "gate-uses.json").read_text())
    (judged,) = ledger.values()
    assert len(judged) == len(found.finalists) <= 2
    assert len(found.candidates) == 3


def test_each_finalist_is_judged_at_its_share_of_the_error(searched):
    found, output, _ = searched
    assert found.confidence == 0.975
    again = judge_again(output / "report.json")
    assert again["recipe"]["budget"]["confidence"] == 0.975
    assert again["verdict"]["outcome"] == "pass"


def test_it_tells_of_every_candidate_and_finalist(searched):
    found, _, told = searched
    assert [len(each.candidates) for each in told[:3]] == [1, 2, 3]
    assert [each.ended for each in told] == [False] * (3 + len(found.finalists)) + [True]


def test_again_nothing_is_made_anew(searched):
    found, output, _ = searched
    stages = {path.name for path in (output / "stages").glob("*-*")}
    page = (output / "search.html").read_text()
    again = search(output.parent / "recipe.yaml", output)
    assert [c.measured for c in again.candidates] == [c.measured for c in found.candidates]
    assert {path.name for path in (output / "stages").glob("*-*")} == stages
    assert (output / "search.html").read_text() == page


def test_the_page_and_the_table_name_every_candidate(searched):
    _, output, _ = searched
    page, table = (output / "search.html").read_text(), (output / "search.md").read_text()
    for text in ("neurons 0.3", "neurons 0.9", "accuracy drop"):
        assert text in page
        assert text in table
    assert "<script" not in page
    assert "http:" not in page
    assert "https:" not in page


def test_losses_of_perplexity_are_told_as_ratios(searched):
    content = search_report.content(searched[0])
    content |= {"metric": "perplexity", "budget": {"max_perplexity_ratio": 1.5}}
    measured = [each for each in content["candidates"] if each["lost"] is not None]
    assert measured
    table, page = search_report.markdown(content), search_page.page(content)
    for text in ("perplexity ratio", *(f"{1 + each['lost']:.4f}" for each in measured)):
        assert text in table
        assert text in page


def test_what_cannot_be_cut_is_a_candidate_that_failed(searched):
    first = searched[0].candidates[0]
    assert first.state == "failed"
    assert "found nothing to cut" in first.why


def test_what_was_found_is_kept_when_it_is_interrupted(searched, tmp_path):
    _, output, _ = searched
    shutil.copytree(output / "stages", tmp_path / "stages")

    def interrupt(found):
        if len(found.candidates) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(output.parent / "recipe.yaml", tmp_path, tell=interrupt)
    content = json.loads((tmp_path / "search.json").read_text())
    assert (len(content["candidates"]), content["ended"], content["chosen"]) == (2, False, None)
    assert not (tmp_path / "report.json").exists()


def test_the_command_tells_what_it_found(searched, tmp_path):
    _, output, _ = searched
    shutil.copytree(output / "stages", tmp_path / "stages")
    done = secateur("search", output.parent / "recipe.yaml", "--output", tmp_path, "--trials", "3")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "search.json").read_text())
    assert "candidate 1: neurons 0.001: " in done.stdout
    assert f"Candidate {content['chosen']} of 3 candidates" in done.stdout
    assert "pass against finetune" in done.stdout


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"seconds": 1e-3}, "The time was over after 1 of "),
        ({"trials": 9}, "There are no more recipes than these 3."),
        ({"trials": 2}, "Of 2 proposals 1 were new recipes, of 2 trials."),
    ],
)
def test_fewer_candidates_than_trials_are_explained(searched, tmp_path, monkeypatch, limits, said):
    _, output, _ = searched
    shutil.copytree(output / "stages", tmp_path / "stages")
    if limits == {"trials": 2}:  # more recipes than trials, and the same one proposed again
        monkeypatch.setattr("pipeline.search.ASKED", 1)
        monkeypatch.setattr(Proposals, "ask", lambda _: {"steps.1.neurons": 0})
    search(output.parent / "recipe.yaml", tmp_path, **limits)
    for name in ("search.md", "search.html"):
        assert said in (tmp_path / name).read_text()


def test_no_more_candidates_meet_the_gate_than_were_allowed(searched, tmp_path):
    """Also if a search goes on with more trials: the ledger remembers."""
    _, output, _ = searched
    shutil.copytree(output / "stages", tmp_path / "stages")
    ledger = json.loads((output / "gate-uses.json").read_text())
    (examples,) = ledger
    (tmp_path / "gate-uses.json").write_text(json.dumps({examples: ["one", "two"]}))
    (tmp_path / "artifact").mkdir()
    found = search(output.parent / "recipe.yaml", tmp_path)
    assert (found.finalists, found.outcome) == ((), "fail")
    assert "has judged 2 candidates, as many as `finalists`" in (tmp_path / "search.md").read_text()
    assert not (tmp_path / "artifact").exists()


def test_the_store_keeps_what_a_search_knows(searched, tmp_path):
    _, output, _ = searched
    shutil.copytree(output / "stages", tmp_path / "stages")
    there = {path.name for path in (tmp_path / "stages").glob("*-*")}
    prune(tmp_path)
    assert {path.name for path in (tmp_path / "stages").glob("*-*")} == there


def test_check_says_what_is_open(tmp_path):
    done = secateur("check", write(tmp_path))
    assert "open: steps.1.neurons" in done.stdout
    assert "selection 400" in done.stdout
    assert "confidence 0.975" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"trials": 0}}, r"search.trials: Input should be greater than or equal to 1"),
        ({"settings": {"trails": 3}}, r"search.trails: unknown key; did you mean 'trials'"),
        ({"steps": [STEPS[0], {"step": "prune", "neurons": 0.5}]}, "found no open value"),
        ({"steps": [{"step": "finetune", "epochs": {"choose": [1, 2]}}, STEPS[1]]},
         r"steps.0: found an open value before the baseline 'finetune'"),
        ({"budget": {"max_size": 0.5}}, "found no limit of quality, expected one"),
        ({"budget": {"max_drop": 0.1, "min_speedup": 1.0}, "settings": {"finalists": 3}},
         r"search.finalists: found 3, with which each is judged at 0.9833; confidence: found"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        read(write(tmp_path, **changes))


def test_a_search_needs_a_selection_split_and_one_process(tmp_path, monkeypatch):
    path = write(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="found 2 processes, expected one to search"):
        read(path)
    monkeypatch.delenv("WORLD_SIZE")
    content = yaml.safe_load(path.read_text())
    del content["task"]["splits"]["selection"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=r"expected task.splits.selection, on which candidates"):
        read(path)


@pytest.mark.slow
def test_ten_kills_end_with_the_same_front(tmp_path):
    """What is searched for is the size, which is the same whenever it is measured."""
    steps = [
        STEPS[0],
        {"step": "prune", "neurons": {"from": 0.1, "to": 0.9}, "heads": {"choose": [0, 0.5]}},
        {"choose": [None, {"step": "finetune", "epochs": 2, "teacher": "finetune"}]},
    ]
    path = write(tmp_path, steps=steps, settings={"best": "size", "trials": 6})
    command = [sys.executable, "-m", "pipeline", "search", path, "--output"]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT,
               "env": os.environ | {"OMP_NUM_THREADS": "1"}}  # fmt: skip
    begun = time.monotonic()
    undisturbed = subprocess.run([*command, tmp_path / "undisturbed"], check=False, **options)
    lasts = time.monotonic() - begun
    generator, kills, at = random.Random(0), 0, 0
    while kills < 10:
        process = subprocess.Popen([*command, tmp_path / f"killed-{at}"], **options)
        try:
            process.wait(generator.uniform(0.2, 0.6) * lasts)
            at += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    ended = subprocess.run([*command, tmp_path / f"killed-{at}"], check=False, **options)
    assert ended.returncode == undisturbed.returncode
    first, second = (
        json.loads((tmp_path / name / "search.json").read_text())
        for name in ("undisturbed", f"killed-{at}")
    )
    print({"kills": kills, "searches that ended": at + 1, "seconds undisturbed": lasts})
    told = ("picked", "size", "lost", "selection", "gate", "on_front", "state")
    told_of = [[{n: c[n] for n in told} for c in found["candidates"]] for found in (first, second)]
    assert told_of[0] == told_of[1]
    assert first["chosen"] == second["chosen"]
