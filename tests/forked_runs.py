"""Runs in children of a process that has imported all they need, so that a kill costs no start.

    python forked_runs.py RECIPE

Reads the folder of an output from each line, begins `secateur run` in a child, says its number, and
when it has ended its status, less than 0 for a signal.
"""

import os
import sys
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
        child = os.fork()
        if not child:
            os.dup2(2, 1)
            os._exit(main(["run", sys.argv[1], "--output", line.strip()]))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
