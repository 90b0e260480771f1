"""A command that ends with whoever started it: a driver that is killed leaves no run behind.

    python -m pipeline.leash PID COMMAND...

PID is that of the parent. On Linux alone; elsewhere the command runs as it is.
"""

import ctypes
import os
import signal
import sys
from typing import Final, NoReturn

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def main(parent: str, *command: str) -> NoReturn:
    """Become the command; the kernel kills it when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it outlives the exec
        if os.getppid() != int(parent):  # it was killed before the line above
            sys.exit(128 + signal.SIGKILL)
    os.execvp(command[0], command)  # noqa: S606 - our own command, no shell


if __name__ == "__main__":
    main(*sys.argv[1:])
