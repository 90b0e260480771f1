"""Where a task's rows come from: a built-in set, a file, a folder, or the hub.

Everything is read by `datasets`, and every split is one of its slices (`train[:2000]`,
`validation[50%:]`), whatever the source. The rows come back with the columns that the task names
and with an id, the hash of their content: by it the gate knows that two splits do not overlap and
that two measurements speak of the same examples.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal

import datasets
from PIL.Image import Image

from benchmarks import docstrings, links

Row = dict[str, Any]
Splits = dict[str, list[Row]]
Dropped = dict[str, int]
"""How many examples each split lost: those that another one has, too, or that it had twice."""

# The file formats that `datasets` reads; `.gz` behind any of them is read as it is.
BUILDERS: Final = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
READ: Final = frozenset({*BUILDERS.values(), "arrow", "cache", "imagefolder"})
"""What of `datasets` may read a folder or a repository; `cache` is what it has read before."""
BUILTIN: Final = {"builtin:docstrings": docstrings.load}
WANTED: Final = ("label", "score", "tags", "answers", "target")
"""The roles of what a model is to give, which are no part of a row's id."""
SLICE: Final = "slice"
"""The role of the column by which the gate split is cut; no part of an id either."""
PLACES: Final = {SLICE: "budget.slices"}
"""Where in a recipe the column of a role is named, if not under task.columns."""
# From the most to the least protected: an overlap is mended in the later one.
PROTECTION: Final = ("gate", "selection", "calibration", "train")
JUDGING: Final = frozenset({"gate", "selection"})
"""The splits by which models are judged: an example that is there twice would count twice."""


class DataError(ValueError):
    """The data are not what the recipe says. Printed without a traceback."""


def load(
    source: str,
    *,
    subset: str | None,
    splits: Mapping[str, str],
    columns: Mapping[str, str],
    overlap: Literal["error", "drop"],
    slice_column: str | None = None,
) -> tuple[Splits, Dropped]:
    """Return the rows of every split, with one key a role of `columns` and `id`, and `Dropped`.

    The gate's rows have the value of `slice_column`, too, if there is one.

    Raises:
        DataError: no such file, split or column; an empty split; two splits that share an example,
            or an example that one of `JUDGING` has twice.
    """
    tables = _read(source, subset)
    more = {"gate": {SLICE: slice_column}} if slice_column else {}
    rows = {
        name: _rows(tables, f"{source}: {name}: {spec}", spec, {**columns, **more.get(name, {})})
        for name, spec in splits.items()
    }
    for name, found in rows.items():
        if not found:
            raise DataError(
                f"{source}: split {splits[name]!r} ({name}): found 0 examples, expected at least 1"
            )
    before = {name: len(found) for name, found in rows.items()}
    _separate(rows, overlap)
    for name, found in rows.items():
        if not found:
            raise DataError(
                f"{source}: split {splits[name]!r} ({name}): found 0 examples that no other split"
                " has, expected at least 1"
            )
    return rows, {name: before[name] - len(found) for name, found in rows.items()}


def _read(source: str, subset: str | None) -> Mapping[str, datasets.Dataset]:
    path = Path(source).expanduser()
    if source.startswith("builtin:") and source not in BUILTIN:
        raise DataError(f"{source}: no such built-in data, expected one of {sorted(BUILTIN)}")
    local = path.suffix in {*BUILDERS, ".gz"} or source.startswith((".", "/", "~"))
    if local and not path.exists():
        raise DataError(f"{source}: no such file or folder")
    try:
        if source in BUILTIN:
            return _read_builtin(source)
        if path.is_file():
            return _read_file(path)
        if path.is_dir():
            return _read_folder(path, subset)
        return _load(source, subset, within="hf://datasets")
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"{source}: found neither as a file or folder here nor on the hub or in its local cache"
            f" ({_first_line(error)})"
        ) from error
    except (DataError, MemoryError):
        raise
    except Exception as error:  # what is wrong in a file makes the library stumble in any way
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: Exception) -> Exception:
    """Return what to raise where a library cannot read the data."""
    for found in (error, error.__cause__):
        if isinstance(found, OSError) and found.errno is not None:
            return found  # no space left for the cache, say; a file that is no gzip has no number
    return DataError(f"{source}: cannot be read as data: {_first_line(error.__cause__ or error)}")


def _read_builtin(source: str) -> Mapping[str, datasets.Dataset]:
    """Return a built-in set, from the cache of `datasets` once it was made for these versions."""
    options = {"source": source, "versions": docstrings.versions()}
    table = datasets.Dataset.from_generator(_builtin_rows, gen_kwargs=options)
    places: dict[str, list[int]] = {}
    for at, name in enumerate(table["split"]):
        places.setdefault(name, []).append(at)
    return {name: table.select(rows) for name, rows in places.items()}


def _builtin_rows(source: str, versions: Mapping[str, str]) -> Iterator[Row]:
    del versions  # they only name the cache
    for split, rows in BUILTIN[source]().items():
        yield from ({**row, "split": split} for row in rows)


def _read_file(path: Path) -> Mapping[str, datasets.Dataset]:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in BUILDERS:
        raise DataError(f"{path}: found a file of type {suffix!r}, expected one of {[*BUILDERS]}")
    options = {"delimiter": "\t"} if suffix == ".tsv" else {}
    if not path.stat().st_size:
        raise DataError(f"{path}: found an empty file")
    return _tables(
        datasets.load_dataset(BUILDERS[suffix], data_files=str(path.resolve()), **options)
    )


def _read_folder(path: Path, subset: str | None) -> Mapping[str, datasets.Dataset]:
    for link in links.leading_out(path):
        raise DataError(
            f"{link}: found a link to {link.resolve()}, expected a plain file: links that lead out"
            " of a folder of data are not followed; copy the file here"
        )
    return _load(str(path.resolve()), subset, within=str(path.resolve()))


def _load(source: str, subset: str | None, within: str) -> Mapping[str, datasets.Dataset]:
    """Return what a folder or a repository holds.

    A README.md may say which files these are, but not such of elsewhere; and of the formats that
    the library reads, there are some that hold pickles.
    """
    builder = datasets.load_dataset_builder(source, subset)
    if builder.name not in READ:
        raise DataError(f"{source}: found data for {builder.name}, expected one of {sorted(READ)}")
    for name in chain.from_iterable((builder.config.data_files or {}).values()):
        if not Path(os.path.normpath(name)).is_relative_to(os.path.normpath(within)):
            raise DataError(
                f"{source}: found the file {name} in what its README.md says of the data, expected"
                " files of its own"
            )
    builder.download_and_prepare()
    return _tables(builder.as_dataset())


def _tables(loaded: object) -> Mapping[str, datasets.Dataset]:
    assert isinstance(loaded, datasets.DatasetDict)
    return loaded


def _rows(
    tables: Mapping[str, datasets.Dataset], where: str, spec: str, columns: Mapping[str, str]
) -> list[Row]:
    sizes = {name: len(table) for name, table in tables.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{where}: not a split of these data, expected a slice such as 'train[:2000]'"
            f" of {sizes} ({_first_line(error)})"
        ) from error
    rows = []
    for part in parts:
        table = tables[part.splitname]
        for role, column in columns.items():
            if column not in table.column_names:
                raise DataError(
                    f"{where}: found columns {table.column_names}, expected {column!r} for the"
                    f" {role}; name it under {PLACES.get(role, 'task.columns')}"
                )
        names = {
            role: found
            for role, column in columns.items()
            if (found := _class_names(table.features[column])) is not None
        }
        start, end = (min(place, len(table)) for place in (part.from_, part.to))
        for record in table.select(list(range(start, end))):
            row = {role: record[column] for role, column in columns.items()}
            for role, class_names in names.items():
                row[role] = _named(row[role], class_names, f"{where}: column {columns[role]!r}")
            if any(value is None for value in row.values()):
                missing = [columns[role] for role, value in row.items() if value is None]
                raise DataError(f"{where}: found an empty value in column {missing[0]!r}")
            rows.append({**row, "id": _content_hash(row)})
    return rows


def _class_names(feature: object) -> list[str] | None:
    """Return the names of a class label, or of a list of class labels."""
    inner = getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, datasets.ClassLabel) else None


def _named(value: Any, names: Sequence[str], where: str) -> Any:
    """Return the names of ids, as deep as they lie."""
    if isinstance(value, list):
        return [_named(item, names, where) for item in value]
    if value is None:
        return None
    if not 0 <= value < len(names):
        raise DataError(
            f"{where}: found the label {value}, expected 0 to {len(names) - 1}; this split may hide"
            " its labels"
        )
    return names[value]


def _content_hash(row: Row) -> str:
    digest = hashlib.sha256()
    for role in sorted(row):
        value = row[role]
        # What is to be predicted is left out: a text with two labels is one example.
        if role in WANTED or role == SLICE:
            continue
        if isinstance(value, Image):
            digest.update(value.convert("RGB").tobytes())
        else:
            digest.update(json.dumps([role, value], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _separate(rows: Splits, overlap: Literal["error", "drop"]) -> None:
    """Make the splits disjoint, or refuse them; the more protected split keeps its examples."""
    taken: dict[str, str] = {}
    for name in PROTECTION:
        if name not in rows:
            continue
        shared = [row for row in rows[name] if row["id"] in taken]
        if shared and overlap == "error":
            other = taken[shared[0]["id"]]
            raise DataError(
                f"task.splits: {name} and {other} share {len(shared)} of {len(rows[name])}"
                " examples, expected none; choose other slices, or set `overlap: drop` under task"
                f" to take them out of {name}"
            )
        rows[name] = [row for row in rows[name] if row["id"] not in taken]
        if name in JUDGING:
            once = {row["id"]: row for row in reversed(rows[name])}
            twice = len(rows[name]) - len(once)
            if twice and overlap == "error":
                raise DataError(
                    f"task.splits: {name} holds {twice} of {len(rows[name])} examples again,"
                    " expected each of them once; set `overlap: drop` under task to keep the first"
                )
            rows[name] = [row for row in rows[name] if once[row["id"]] is row]
        taken.update((row["id"], name) for row in rows[name])


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
