"""What transformers' Trainer keeps of the term in its checkpoints, and tells it of evaluations."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from softtrace.errors import TrainerSetupError
from softtrace.loss.budget import LossBudget
from softtrace.loss.integration import measured_loss, state_of
from softtrace.loss.reference import EVAL_LOSS

_PREFIX = "eval_"  # of what a Trainer's own evaluations give


class DensityState(TrainerCallback, ExportableState):
    """Keeps the term's seed, what is logged next, and the budget in ``trainer_state.json``.

    All else is a function of the step. A budget is told of every evaluation in training.

    Args:
        seed: of the term.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.log: list[dict[str, Any]] | None = None
        self.budget: LossBudget | None = None
        self.monitor = EVAL_LOSS

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Let the strength follow the held-out loss; before a checkpoint is saved.

        Raises:
            TrainerSetupError: the evaluation gave none of that name.
        """
        metrics = kwargs["metrics"]
        # What transformers restores here from a checkpoint is what was kept of one, and no budget.
        if not isinstance(self.budget, LossBudget):
            return
        # Of several eval_datasets each is evaluated by itself, and has a name of its own; so has
        # what a user evaluates besides (metric_key_prefix="test").
        of_trainer = any(name.startswith(_PREFIX) for name in metrics)
        of_another = not of_trainer or EVAL_LOSS not in (*metrics, self.monitor)
        if self.monitor in metrics or not of_another:
            self.budget.update(state.global_step, measured_loss(metrics, self.monitor))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the term."""
        return {"args": {}, "attributes": state_of(self.seed, self.log, self.budget)}


def check_evaluates(trainer: Any, monitor: str) -> None:
    """Refuse a training that never evaluates what its strength is to follow, where that is seen.

    Args:
        trainer: of transformers, which has begun to train.
        monitor: name of the held-out loss.

    Raises:
        TrainerSetupError: why there is nothing to follow, and how to have it.
    """
    args, state, sets = trainer.args, trainer.state, trainer.eval_dataset
    found = None
    if args.eval_strategy == "no":
        found = "no evaluation (eval_strategy='no')"
    elif args.eval_strategy == "steps" and state.eval_steps > state.max_steps:
        found = (
            f"its first evaluation after {state.eval_steps} steps, and ends after {state.max_steps}"
        )
    if found is not None:
        raise TrainerSetupError(
            f"budget: this training has {found}, so the strength has nothing to follow; give it an "
            "eval_dataset, eval_strategy='steps' and eval_steps, some twenty evaluations in all, "
            "or leave the budget out"
        )
    if isinstance(sets, dict) and not any(monitor.startswith(f"{_PREFIX}{name}_") for name in sets):
        losses = ", ".join(f"{_PREFIX}{name}_loss" for name in sets)
        raise TrainerSetupError(
            f"budget: found monitor {monitor}, but several eval_datasets, whose held-out losses "
            f"are {losses}; name one of them by monitor"
        )
