"""A small LightningModule around one tiny causal language model, and fits of it in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure
from torch import Tensor

from tests.support.tiny import tiny_model, tiny_prompt

Batch = dict[str, Tensor]


class Batches:
    """The same batches every epoch. (Lightning would take a plain list for several loaders.)"""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def batches(count: int = 4, rows: int = 4, length: int = 12) -> Batches:
    """Different random batches; the last two tokens of every first row are padding."""
    made = []
    for seed in range(count):
        input_ids = tiny_prompt(length, seed, rows)
        mask = torch.ones_like(input_ids)
        mask[0, -2:] = 0
        labels = input_ids.masked_fill(mask == 0, -100)
        made.append({"input_ids": input_ids, "attention_mask": mask, "labels": labels})
    return Batches(*made)


class Tuner(LightningModule):
    """What a user has: one causal LM and its loss.

    Args:
        family: of the tiny model; gpt2 has dropout.
        model: instead of one.
    """

    def __init__(self, family: str = "llama", model: Any = None) -> None:
        super().__init__()
        self.model = tiny_model(family) if model is None else model
        self.model.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class OnlyBatch(Tuner):
    def training_step(self, batch: Batch) -> Any:  # type: ignore[override]
        return self.model(**batch).loss


class Manual(Tuner):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TakesIterator(Tuner):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        raise AssertionError


class Calls(Callback):
    """Calls a function at one hook: ``Calls(on_train_batch_end=lambda trainer, module, *_: ...)``.

    Given last in a Trainer's list, it runs after the penalty's hook of the same name.
    """

    def __init__(self, **functions: Callable[..., Any]) -> None:
        for name, function in functions.items():
            if not callable(getattr(Callback, name, None)):
                raise AttributeError(name)
            setattr(self, name, function)


def forget_warnings() -> None:
    """Lightning warns of a skipped batch once a process; let it do so once more."""
    Closure.warning_cache.clear()


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
    }
    return Trainer(
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **options},
    )


def fit(
    module: LightningModule, *callbacks: Callback, data: Batches | None = None, **options: Any
) -> Trainer:
    """Fit on four batches unless told otherwise, from a fixed global random state."""
    torch.manual_seed(0)
    fitting = trainer(*callbacks, **options)
    fitting.fit(module, batches() if data is None else data)
    return fitting


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
