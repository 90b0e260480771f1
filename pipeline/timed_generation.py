"""When each token of a text was there, of a torch model: what `bench` times of a generation."""

from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.worker import Arrays, Predictor
from pipeline.checkpoint import open_model


class _Stamps(StoppingCriteria):
    """Notes when it is asked whether to stop, once a token, and never does."""

    def __init__(self) -> None:
        self.at: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return that no row is done."""
        del scores, kwargs
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.at.append(perf_counter_ns())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def open_timed(folder: Path, *, device: str, threads: int) -> Predictor:
    """Return a predictor that generates greedily, and tells when.

    It takes prompts and `new_tokens`, how many each of them gets, whatever would end a text; it
    gives `token_ns` `(L,)`, the nanoseconds after which each was there.

    Raises:
        Unavailable: the device is not there.
    """
    model: Any = open_model(folder, device=device, threads=threads)
    taken = {"input_ids", "attention_mask"}

    def predict(inputs: Arrays) -> Arrays:
        many, stamps = int(inputs["new_tokens"]), _Stamps()
        start = perf_counter_ns()
        prompts = {k: torch.from_numpy(inputs[k]).to(model.device) for k in taken}
        model.generate(
            **prompts,
            min_new_tokens=many,
            max_new_tokens=many,
            do_sample=False,
            num_beams=1,
            stopping_criteria=StoppingCriteriaList([stamps]),
        )
        return {"token_ns": np.asarray(stamps.at) - start}

    return predict
