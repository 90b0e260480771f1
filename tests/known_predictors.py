"""Predictors of known cost and behaviour, opened in a worker by name; see the fixture `opened`."""

import os
import time

import numpy as np

from exporters import MissingDependency

INPUTS = {"input_ids": np.asarray([[1, 2, 3]])}


def sleeper(folder, *, device, threads):
    seconds = float(folder.name)

    def predict(inputs):
        time.sleep(seconds)
        return {"logits": np.eye(2, dtype=np.float32)[inputs["input_ids"][:, 0] % 2]}

    return predict


def eater(folder, *, device, threads):
    size = int(folder.name) << 20

    def predict(inputs):
        np.ones(size, np.uint8)
        return {}

    return predict


def talker(folder, *, device, threads):
    print("a library prints")
    return lambda inputs: print("and again") or {"logits": np.zeros((1, 2), np.float32)}


def crasher(folder, *, device, threads):
    def predict(inputs):
        raise RuntimeError("the runtime gave up")

    return predict


def killed(folder, *, device, threads):
    return lambda inputs: os.kill(os.getpid(), 9)


def broken(folder, *, device, threads):
    raise ValueError("no such artifact")


def lacking(folder, *, device, threads):
    raise MissingDependency("abacus: not installed; pip install abacus")


def hanging(folder, *, device, threads):
    return lambda inputs: time.sleep(60)


def faulty(folder, *, device, threads):
    os.kill(os.getpid(), 11)


def leaving(folder, *, device, threads):
    return lambda inputs: os._exit(3)


def greedy(folder, *, device, threads):
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
    return lambda inputs: {"logits": np.ones(1 << 40, np.uint8)}


def elsewhere(folder, *, device, threads):
    from exporters import NotHere

    raise NotHere("found CPUExecutionProvider, expected CUDAExecutionProvider")
