"""Runs in children of a process that has imported all they need, so that a kill costs no start.

    python forked_runs.py RECIPE

A line `FOLDER SECONDS` begins `secateur run` into the folder in a child, and kills it after so many
seconds; a line with its status, -9 if it was killed, is the answer.
"""

import os
import signal
import sys
import time
from importlib import import_module

LIBRARIES = (
    "datasets",
    "matplotlib.pyplot",
    "onnxruntime.quantization",
    "onnxscript",
    "pipeline.cli",
    "pipeline.runner",
    "torch.export",
    "torch.onnx",
)

if __name__ == "__main__":
    for name in LIBRARIES:
        import_module(name)
    from pipeline.cli import main

    for line in sys.stdin:
        folder, seconds = line.split()
        ends = time.monotonic() + float(seconds)
        child = os.fork()
        if not child:
            os.dup2(2, 1)
            code = 1
            try:
                main(["run", sys.argv[1], "--output", folder])
            except SystemExit as ended:
                code = ended.code
            finally:
                os._exit(code)
        ended = 0
        while not ended and time.monotonic() < ends:
            time.sleep(0.005)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
