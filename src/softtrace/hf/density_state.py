"""What transformers' Trainer keeps of the term in its checkpoints, and tells it of evaluations."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from softtrace.loss.budget import LossBudget
from softtrace.loss.integration import measured_loss, state_of
from softtrace.loss.reference import EVAL_LOSS


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
        if self.budget is None:
            return
        # Of several eval_datasets each is evaluated by itself, and has a name of its own.
        of_another = self.monitor not in metrics and EVAL_LOSS not in (*metrics, self.monitor)
        if not of_another:
            self.budget.update(state.global_step, measured_loss(metrics, self.monitor))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the term."""
        return {"args": {}, "attributes": state_of(self.seed, self.log, self.budget)}
