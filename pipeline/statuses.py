"""How a command ends: its exit status, and one line for what a user can mend."""

import errno
from collections.abc import Callable
from typing import Final

from rich.markup import escape

from pipeline.terminal import err

CODES: Final = {"pass": 0, "fail": 1, "inconclusive": 3}
WRONG, UNAVAILABLE, FAILED, INTERRUPTED = 2, 4, 5, 130
NOT_THERE: Final = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)
"""What the system says of a path that a user should not have named."""


def guarded(act: Callable[[], int]) -> int:  # noqa: PLR0911 - one a kind of error
    """Return the exit code of what is done; errors that a user can mend are shown as one line."""
    from safetensors import SafetensorError

    from benchmarks.data import DataError
    from benchmarks.machine import Unavailable
    from benchmarks.worker import WorkerError
    from exporters import ExportError, MissingDependency, NotHere
    from pipeline.checkpoint import ModelError
    from pipeline.evidence import EvidenceError
    from pipeline.finetuning import TrainingError
    from pipeline.manifest import Damaged
    from pipeline.quantization import QuantizationError
    from pipeline.reading import RecipeError

    wrong = (RecipeError, DataError, ModelError, EvidenceError, Damaged)
    unavailable = (Unavailable, MissingDependency, NotHere)
    failed = (
        WorkerError,
        TrainingError,
        ExportError,
        QuantizationError,
        FloatingPointError,
        MemoryError,
        SafetensorError,
    )
    try:
        return act()
    except wrong as error:
        return say(WRONG, error)
    except unavailable as error:
        return say(UNAVAILABLE, error)
    except failed as error:
        return say(FAILED, str(error) or "out of memory; choose a smaller batch or model")
    except OSError as error:
        return say(*disk(error))
    except KeyboardInterrupt:
        return say(
            INTERRUPTED,
            "interrupted; run the same command again: what was finished is kept by `run`,"
            " `search` and `sweep`",
        )
    except Exception as error:  # noqa: BLE001 - status 1 would say that a budget is violated
        if _out_of_memory(error):
            return say(FAILED, "out of memory; choose a smaller batch or model")
        err.print_exception()
        return say(FAILED, f"{type(error).__name__}: {error}; please report it with what is above")


def _out_of_memory(error: Exception) -> bool:
    """Return whether torch found no memory; on the CPU it has no exception of its own for that."""
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or type(error).__name__ == "OutOfMemoryError"


def lightly(act: Callable[[], int], where: object, *, otherwise: int = FAILED) -> int:
    """Return the exit code of what is done where there may be no torch.

    An error that nobody foresaw ends with `otherwise`.
    """
    from benchmarks.machine import Unavailable
    from exporters import ExportError, MissingDependency, NotHere
    from pipeline.evidence import EvidenceError
    from pipeline.manifest import Damaged
    from pipeline.reading import RecipeError

    try:
        return act()
    except (Damaged, RecipeError, EvidenceError) as error:
        return say(WRONG, error)
    except (MissingDependency, NotHere, Unavailable) as error:
        return say(UNAVAILABLE, error)
    except ExportError as error:
        return say(FAILED, error)
    except OSError as error:
        return say(*disk(error))
    except Exception as error:  # noqa: BLE001 - status 1 would say that a budget is violated
        return say(otherwise, f"{where}: {type(error).__name__}: {error}")


def disk(error: OSError) -> tuple[int, str]:
    """Return code and message for a file that cannot be written or read."""
    where = error.filename or "output"
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return FAILED, f"{where}: no space left; free some, and run the same command again"
    if error.errno in NOT_THERE:
        return WRONG, f"{where}: cannot be written or read: {error.strerror}"
    return FAILED, f"{where}: {error}"


def say(code: int, message: object) -> int:
    """Show a message, and return the exit status."""
    err.print(f"secateur: {escape(str(message))}", soft_wrap=True)
    return code
