"""How many candidates a gate split has judged: a set that chooses is no longer one that judges.

Every run keeps one beside its stages, and reads those of the runs in the folders beside its own, as
those of many recipes lie below `runs`. A split is known by the content of its examples, a candidate
by the content of its files, so that the same run counts once however often it is done.
"""

import fcntl
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from pipeline.evidence import EvidenceError
from pipeline.manifest import fingerprint
from pipeline.writing import write_text

LEDGER: Final = "gate-uses.json"


def record(folder: Path, ids: Iterable[str], candidate: str) -> dict[str, Any]:
    """Note that the examples judge a candidate, and return all that they have judged.

    Those of the runs beside this one are returned too, but not noted here.

    Args:
        folder: the run's output.
        ids: of the gate's examples, in any order.
        candidate: the digest of its files.

    Raises:
        EvidenceError: the ledger, or that of a run beside this one, is damaged.
    """
    examples, path = fingerprint(sorted(ids)), folder / LEDGER
    with (folder / f".{LEDGER}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        ledger = _read(path)
        judged = ledger.setdefault(examples, [])
        if candidate not in judged:
            judged.append(candidate)
            write_text(path, json.dumps(ledger, indent=1) + "\n")
    beside = sorted(folder.resolve().parent.glob(f"*/{LEDGER}"))
    others = [name for path in beside for name in _read(path).get(examples, [])]
    return {"examples": examples, "candidates": list(dict.fromkeys([*judged, *others]))}


def judged(folder: Path, ids: Iterable[str]) -> list[str]:
    """Return the candidates that the examples have judged for the run in a folder.

    Raises:
        EvidenceError: the ledger is damaged.
    """
    return _read(folder / LEDGER).get(fingerprint(sorted(ids)), [])


def _read(path: Path) -> dict[str, list[str]]:
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise EvidenceError(f"{path}: cannot be read: {error}") from None
    if not isinstance(ledger, dict) or not all(isinstance(x, list) for x in ledger.values()):
        raise EvidenceError(f"{path}: found no ledger, expected candidates by gate split")
    return ledger
