"""How much memory a process has used, read from the kernel.

`VmHWM` of a fresh process, not `ru_maxrss`: a child inherits the latter from its parent.
"""

from pathlib import Path


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes.

    Raises:
        OSError: this system has no /proc/self/status, so the peak cannot be read.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status: found no VmHWM, expected one; memory is read on Linux only")
