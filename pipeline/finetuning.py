"""Recover accuracy by training, with the unpruned model as teacher.

    L = a task + (1 - a) T^2 KL(teacher / T || student / T) + h mean_l |s_l - t_l|^2 / |t_l|^2

Hinton et al. 2015, section 2, https://arxiv.org/abs/1503.02531; the last term compares hidden
states, whose width no cut changes. The loop is `transformers.Trainer`'s.

B examples of a batch, T tokens, C classes.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from benchmarks.accuracy import Track, silent
from benchmarks.tasks import IGNORED, Example, collate


class TrainingError(RuntimeError):
    """Training went wrong: the loss is no longer a number."""


@dataclass(frozen=True)
class Teacher:
    """The model to imitate, and how; `temperature` as in the module's formula, weights a and h."""

    model: PreTrainedModel
    temperature: float
    task_weight: float
    hidden_weight: float


def finetune(
    model: PreTrainedModel,
    examples: Sequence[Example],
    padding: Mapping[str, int],
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    freeze_embeddings: bool = False,
    teacher: Teacher | None = None,
    seed: int = 0,
    device: str = "cpu",
    track: Track = silent,
) -> float:
    """Train the model in place, and return the mean loss over the whole training.

    Args:
        model: changed in place, left in evaluation mode.
        examples: what to train on; every window is one training example.
        padding: padding values, by the names of inputs and labels.
        epochs: passes over the examples; a fraction ends within one.
        learning_rate: the highest; it rises from 0 during `warmup` and falls to 0 linearly.
        batch_size: windows a step.
        warmup: the share of all steps in which the learning rate rises.
        weight_decay: AdamW's.
        freeze_embeddings: leave the embedding tables as they are.
        teacher: what to imitate beside the task's own loss.
        seed: of the order and of dropout.
        device: "cpu" or "cuda".
        track: shows progress.

    Raises:
        TrainingError: the loss is not finite; the message names the step.
    """
    windows = [{**w.inputs, **w.labels} for example in examples for w in example.windows]
    set_seed(seed)
    frozen = list(model.get_input_embeddings().parameters()) if freeze_embeddings else []
    frozen = [parameter for parameter in frozen if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)  # noqa: FBT003 - torch takes no keyword
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            warmup_steps=warmup,
            weight_decay=weight_decay,
            lr_scheduler_type="linear",
            seed=seed,
            use_cpu=device == "cpu",
            save_strategy="no",
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            train_sampling_strategy="group_by_length" if "input_ids" in windows[0] else "random",
        )
        trainer = _Distiller(
            teacher,
            model=model,
            args=arguments,
            train_dataset=windows,
            data_collator=_Collator(padding),
        )
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":
                trainer.remove_callback(callback)
        trainer.add_callback(_Watch(track))
        result = trainer.train()
    for parameter in frozen:
        parameter.requires_grad_(True)  # noqa: FBT003
    model.eval()
    return float(result.training_loss)


def distillation(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None
) -> Tensor:
    """Return T^2 KL(teacher / T || student / T), averaged over positions `()`.

    `student` and `teacher` are logits `(..., C)`; `mask` `(...)` says which positions count.
    """
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, dim=-1),
        functional.log_softmax(teacher / temperature, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return temperature**2 * _mean(divergence, mask)


def hidden_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None
) -> Tensor:
    """Return the mean over layers and positions of |s - t|^2 / |t|^2 `()`.

    With fewer layers in the student, each is compared with the teacher's at the same relative
    depth.
    """
    total = student[0].new_zeros(())
    for at, state in enumerate(student):
        matching = teacher[round(at * (len(teacher) - 1) / max(len(student) - 1, 1))]
        error = (state - matching).square().sum(-1) / matching.square().sum(-1).clamp_min(1e-12)
        total = total + _mean(error, mask)
    return total / len(student)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != values.shape:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp_min(1)


class _Collator:
    def __init__(self, padding: Mapping[str, int]) -> None:
        self._padding = padding

    def __call__(self, windows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        arrays = collate(windows, self._padding)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class _Watch(TrainerCallback):
    """Shows the steps, and stops where the loss is not a number."""

    def __init__(self, track: Track) -> None:
        self._track = track
        self._steps: Iterator[int] = iter(())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        del args, control
        self._steps = iter(self._track(range(state.max_steps), "training", state.max_steps))
        next(self._steps, None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        del args, state, control
        next(self._steps, None)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del args, control
        loss = kwargs.get("logs", {}).get("loss")
        if loss is not None and not torch.isfinite(torch.tensor(float(loss))):
            raise TrainingError(
                f"finetune: found the loss {loss} at step {state.global_step}, expected a number;"
                " lower the learning rate"
            )


class _Distiller(Trainer):
    """`Trainer` with the teacher's outputs in the loss; a method more, as the library asks for."""

    def __init__(self, teacher: Teacher | None, **options: Any) -> None:
        super().__init__(**options)
        self._teacher = teacher
        if teacher is not None:
            nn.Module.to(teacher.model, self.args.device).eval()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - the library's signature
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss of the module's formula."""
        del num_items_in_batch
        teacher = self._teacher
        states = teacher is not None and teacher.hidden_weight > 0
        outputs = model(**inputs, output_hidden_states=states)
        loss = outputs.loss
        if teacher is not None:
            with torch.no_grad():
                target = teacher.model(**inputs, output_hidden_states=states)
            mask = inputs.get("attention_mask")
            labels = inputs.get("labels")
            counted = labels != IGNORED if labels is not None and labels.dim() > 1 else mask
            imitation = [
                distillation(outputs[name], target[name], teacher.temperature, counted)
                for name in ("logits", "start_logits", "end_logits")
                if name in outputs
            ]
            loss = teacher.task_weight * loss + (1 - teacher.task_weight) * sum(imitation)
            if states:
                loss = loss + teacher.hidden_weight * hidden_distance(
                    outputs.hidden_states, target.hidden_states, mask
                )
        return (loss, outputs) if return_outputs else loss
