"""Rows from files, folders and built-in sets; splits; what is wrong is said in one line."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import sentences, write_rows
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image

from benchmarks.data import DataError, load

ROWS = sentences(20)


def read(source, splits=None, columns=None, overlap="error", subset=None):
    rows, _ = load(
        str(source),
        subset=subset,
        splits=splits or {"gate": "train"},
        columns=columns or {"text": "text", "label": "label"},
        overlap=overlap,
    )
    return rows


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet", "csv.gz"])
def test_every_file_type_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    records = [{"text": text, "label": label} for text, label in ROWS]
    lines = "\n".join(["text,label", *(f"{text},{label}" for text, label in ROWS)])
    match suffix:
        case "csv":
            path.write_text(lines)
        case "tsv":
            path.write_text(lines.replace(",", "\t"))
        case "csv.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "jsonl" | "json":
            path.write_text("\n".join(json.dumps(record) for record in records))
        case "parquet":
            Dataset.from_list(records).to_parquet(path)
    rows = read(path)["gate"]
    assert [(row["text"], row["label"]) for row in rows] == ROWS
    assert len({row["id"] for row in rows}) == 20


def test_a_text_file_has_a_row_a_line(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("once\nupon\n")
    rows = read(path, columns={"text": "text"})["gate"]
    assert [row["text"] for row in rows] == ["once", "upon"]


def test_a_folder_has_a_split_a_file(tmp_path):
    write_rows(tmp_path / "train.csv", ROWS[:15])
    write_rows(tmp_path / "validation.csv", ROWS[15:])
    found = read(tmp_path, {"train": "train[:10]", "gate": "validation"})
    assert (len(found["train"]), len(found["gate"])) == (10, 5)


@pytest.mark.parametrize("name", ["train.csv", "train", "notes.md"])
def test_a_link_out_of_a_folder_is_refused(tmp_path, name):
    for place in ("data/gate.csv", "elsewhere/train.csv"):
        (tmp_path / place).parent.mkdir()
        write_rows(tmp_path / place, ROWS)
    to = {"train": "elsewhere", "train.csv": "elsewhere/train.csv", "notes.md": "nowhere"}[name]
    (tmp_path / "data" / name).symlink_to(tmp_path / to)
    with pytest.raises(DataError, match=f"data/{name}: found a link to .*{to}, expected a plain"):
        read(tmp_path / "data", {"gate": "train"})


def test_links_within_a_folder_to_it_and_of_the_hub_s_cache_are_followed(tmp_path):
    snapshot = tmp_path / "datasets--org--name" / "snapshots" / ("0" * 40)
    for folder in (snapshot, snapshot.parents[1] / "blobs", tmp_path / "plain"):
        folder.mkdir(parents=True)
    write_rows(snapshot.parents[1] / "blobs" / "0", ROWS)
    (snapshot / "train.csv").symlink_to(Path("..", "..", "blobs", "0"))
    (tmp_path / "link").symlink_to(snapshot)
    assert len(read(tmp_path / "link")["gate"]) == 20
    write_rows(tmp_path / "plain" / "rows.csv", ROWS)
    (tmp_path / "plain" / "train.csv").symlink_to("rows.csv")
    assert len(read(tmp_path / "plain", {"gate": "train[:20]"})["gate"]) == 20


def test_a_folder_of_images(tmp_path):
    for name, colour in (("cat", "red"), ("dog", "blue")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for at in range(3):
            Image.new("RGB", (8, 8 + at), colour).save(tmp_path / "train" / name / f"{at}.png")
    rows = read(tmp_path, columns={"image": "image", "label": "label"})["gate"]
    assert sorted(row["label"] for row in rows) == ["cat"] * 3 + ["dog"] * 3
    assert len({row["id"] for row in rows}) == 6


def test_slices_are_those_of_datasets(tmp_path):
    path = write_rows(tmp_path / "data.csv", ROWS)
    found = read(
        path, {"train": "train[:50%]", "selection": "train[50%:75%]", "gate": "train[-5:]"}
    )
    assert [len(found[name]) for name in ("train", "selection", "gate")] == [10, 5, 5]
    assert found["gate"][-1]["text"] == ROWS[-1][0]


@pytest.mark.parametrize("name", ["gate", "selection"])
def test_what_judges_has_every_example_once(tmp_path, name):
    path = write_rows(tmp_path / "data.csv", [*ROWS, ROWS[3], (ROWS[5][0], 1 - ROWS[5][1])])
    message = f"{name} holds 2 of 22 examples again, expected each of them"
    with pytest.raises(DataError, match=message):
        read(path, {name: "train"})
    found = read(path, {name: "train"}, overlap="drop")[name]
    assert [(row["text"], row["label"]) for row in found] == ROWS
    assert len(read(path, {"train": "train", name: "train[:10]"}, overlap="drop")[name]) == 10


def test_an_example_may_be_trained_on_twice(tmp_path):
    path = write_rows(tmp_path / "data.csv", [*ROWS, ROWS[3]])
    assert len(read(path, {"train": "train"})["train"]) == len(ROWS) + 1


def test_a_slice_is_read_of_the_gate_alone_and_changes_no_id(tmp_path):
    rows = [f"{text},{label},{'long' if len(text) > 40 else 'short'}" for text, label in ROWS]
    (tmp_path / "gate.csv").write_text("\n".join(["text,label,kind", *rows]))
    options = {"subset": None, "splits": {"gate": "train"}, "overlap": "error",
               "columns": {"text": "text", "label": "label"}}  # fmt: skip
    plain = load(str(tmp_path / "gate.csv"), **options)[0]["gate"]
    cut = load(str(tmp_path / "gate.csv"), **options, slice_column="kind")[0]["gate"]
    assert {row["slice"] for row in cut} == {"long", "short"}
    assert [row["id"] for row in cut] == [row["id"] for row in plain]
    with pytest.raises(DataError, match="expected 'size' for the slice; name it under budget"):
        load(str(tmp_path / "gate.csv"), **options, slice_column="size")


def test_shared_examples_are_refused_or_dropped_from_the_less_protected(tmp_path):
    path = write_rows(tmp_path / "data.csv", ROWS)
    splits = {"train": "train[:10]", "gate": "train[8:]"}
    with pytest.raises(DataError, match=r"task\.splits: train and gate share 2 of 10 examples"):
        read(path, splits)
    columns = {"text": "text", "label": "label"}
    found, dropped = load(str(path), subset=None, splits=splits, columns=columns, overlap="drop")
    assert (len(found["train"]), len(found["gate"])) == (8, 12)
    assert dropped == {"train": 2, "gate": 0}
    assert not {row["id"] for row in found["train"]} & {row["id"] for row in found["gate"]}


def test_the_same_text_with_another_label_is_the_same_example(tmp_path):
    path = write_rows(tmp_path / "data.csv", [("good film", 0), ("good film", 1)])
    with pytest.raises(DataError, match="share 1 of 1"):
        read(path, {"train": "train[:1]", "gate": "train[1:]"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": {"text": "sentence"}},
            r"found columns \['text', 'label'\], expected 'sentence'",
        ),
        ({"splits": {"gate": "test"}}, "gate: test: not a split of these data"),
        ({"splits": {"gate": "train[:oops]"}}, "not a split of these data"),
        ({"splits": {"gate": "train[900:]"}}, r"split 'train\[900:\]' \(gate\): found 0 examples"),
        ({"splits": {"gate": "train[:0]"}}, r"split 'train\[:0\]' \(gate\): found 0 examples"),
    ],
)
def test_wrong_columns_and_splits_are_said(tmp_path, options, message):
    path = write_rows(tmp_path / "data.csv", ROWS)
    with pytest.raises(DataError, match=message):
        read(path, **options)


def test_an_empty_value_is_said(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text,label\ngood film,1\n,0\n")
    with pytest.raises(DataError, match="found an empty value in column 'text'"):
        read(path)


def test_wrong_files_are_said(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.csv: no such file or folder"):
        read(tmp_path / "nowhere.csv")
    (tmp_path / "data.docx").write_text("x")
    with pytest.raises(DataError, match=r"found a file of type '\.docx', expected one of"):
        read(tmp_path / "data.docx")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty\.csv: found an empty file"):
        read(tmp_path / "empty.csv")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\n')
    with pytest.raises(DataError, match=r"broken\.jsonl: cannot be read as data"):
        read(tmp_path / "broken.jsonl")
    with pytest.raises(DataError, match="builtin:poems: no such built-in data"):
        read("builtin:poems")


def test_a_hub_id_that_is_not_cached_is_said_in_one_line():
    with pytest.raises(
        DataError, match="found neither as a file or folder here nor on the hub"
    ) as caught:
        read("secateur-test/no-such-data")
    assert len(str(caught.value).splitlines()) == 1


def test_class_labels_are_read_by_name_also_in_lists(tmp_path):
    names = ClassLabel(names=["O", "B-x"])
    features = Features({"tokens": List(Value("string")), "tags": List(names), "label": names})
    rows = {"tokens": [["a", "b"]], "tags": [[0, 1]], "label": [1]}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "data.parquet")
    roles = {"tokens": "tokens", "tags": "tags", "label": "label"}
    (row,) = read(tmp_path / "data.parquet", columns=roles)["gate"]
    assert (row["tags"], row["label"]) == (["O", "B-x"], "B-x")


def test_hidden_labels_are_refused(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    table = Dataset.from_dict({"text": ["a"], "label": [-1]}, features)
    table.to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match="found the label -1, expected 0 to 1"):
        read(tmp_path / "data.parquet")
