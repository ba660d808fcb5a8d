"""Short trainings by transformers' Trainer with the term, and its loop written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from softtrace import DensityLoss
from softtrace.hf import with_density
from tests.support.fitting import batches
from tests.support.processes import as_rank
from tests.support.tiny import tiny_model

ROWS, MICRO = 16, 2
OPTIONS: dict[str, Any] = {"strength": 0.6, "share": 1.0, "crop": 6, "seed": 3}


class Ordered:
    """No shuffling, so that a loop by hand sees the same batches."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(rows())


class OrderedTrainer(Ordered, Trainer):
    pass


DensityTrainer = with_density(OrderedTrainer)


def rows() -> list[dict[str, Tensor]]:
    """Sequences of 12 tokens; every fourth ends in padding, and some labels are left out."""
    found = []
    for batch in batches(count=ROWS // 4):
        labels = batch["labels"].clone()
        labels[1, 4:9] = -100
        for row in range(4):
            both = {**batch, "labels": labels}
            found.append({name: value[row] for name, value in both.items()})
    return found


def stacked(part: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in part]) for name in part[0]}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": MICRO,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "num_train_epochs": 1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return TrainingArguments(**{**usual, **changes})


def train(folder: Path, density: Any = OPTIONS, family: str = "llama", **changes: Any) -> Any:
    """A short training from a fixed random state; the trainer."""
    torch.manual_seed(0)
    model = tiny_model(family, dtype=torch.float64).train()
    kind, own = (OrderedTrainer, {}) if density is None else (DensityTrainer, {"density": density})
    trainer: Any = kind(model=model, args=arguments(folder, **changes), train_dataset=rows(), **own)
    trainer.train()
    return trainer


def by_hand(
    accumulate: int,
    counted: bool,
    options: dict[str, Any],
    ranks: int = 1,
    added: list[float] | None = None,
    dtype: torch.dtype = torch.float64,
    clip: float = 0.5,
    epsilon: float = 1e-8,
) -> nn.Module:
    """The Trainer's loop written out, the batches of all processes one after the other.

    Args:
        accumulate: batches of a process in a step.
        counted: the task loss is a mean over all targets.
        options: of the term.
        ranks: processes; each draws by its rank.
        added: gets what each step adds to the task loss.
        dtype: of the weights.
        clip: the largest norm of gradients; 0 for any.
        epsilon: of AdamW; a large one does not blow up rounding of gradients that are next to 0.
    """
    model = tiny_model("llama", dtype=dtype).train()
    density = DensityLoss(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0, eps=epsilon)
    micro = [stacked(rows()[i : i + MICRO]) for i in range(0, ROWS, MICRO)]
    for step, first in enumerate(range(0, len(micro), accumulate * ranks)):
        group = micro[first : first + accumulate * ranks]
        targets = sum(int((each["labels"][:, 1:] != -100).sum()) for each in group)
        terms = []
        for number, each in enumerate(group):
            with density.watching():
                logits = model(**each).logits[:, :-1].flatten(0, 1).float()  # as there
            losses = F.cross_entropy(logits, each["labels"][:, 1:].flatten(), reduction="sum")
            own = int((each["labels"][:, 1:] != -100).sum())
            task = losses / targets if counted else losses / own / len(group)
            with as_rank(number % ranks):
                term = density(**each, step=step, micro_step=number // ranks).loss / len(group)
            terms.append(term.item())
            (task + term).backward()
        if added is not None:
            added.append(sum(terms))
        nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
    return model


def resumed(folder: Path, step: int, density: Any = OPTIONS, **changes: Any) -> Any:
    """A new trainer that resumes from the checkpoint of a step."""
    torch.manual_seed(99)
    trainer = DensityTrainer(
        model=tiny_model("gpt2", seed=5, dtype=torch.float64).train(),
        args=arguments(folder, **{"save_strategy": "steps", "save_steps": 1, **changes}),
        train_dataset=rows(), density=density,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return trainer
