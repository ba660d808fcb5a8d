"""A LightningModule's bound ``training_step``, wrapped for one fit so that the term is added.

A Lightning callback has no official way to add to the loss. The bound step is wrapped as an
instance attribute and put back at the end; ``functools.wraps`` keeps its signature readable for
Lightning, which looks for ``batch_idx``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from softtrace.errors import TrainerSetupError
from softtrace.loss.density_loss import DensityLoss
from softtrace.loss.integration import ExpectedGradient
from softtrace.loss.term import DensityTerm


class WrappedStep:
    """Wraps the training step of a module; :meth:`restore` puts back what was there.

    Args:
        trainer: that fits the module.
        module: whose step is wrapped.
        density: computes the term.
        inputs_of: what the term reads of a batch.
        log: is given the module, the task loss and the term of every step.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        density: DensityLoss,
        inputs_of: Callable[[Any], dict[str, Any]],
        log: Callable[[LightningModule, Tensor, DensityTerm], None],
    ) -> None:
        self._trainer, self._module = trainer, module
        self._density: DensityLoss | None = density  # None once the step was put back
        self._inputs_of, self._log = inputs_of, log
        self._expected: list[ExpectedGradient] = []
        self._step: Callable[..., Any] = module.training_step
        self._was_own = "training_step" in vars(module)  # an instance attribute of the user's
        module.training_step = self._with_term(self._step)  # type: ignore[method-assign]

    def _with_term(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            density = self._density
            if density is None:  # another wrapper put this one back after the end of its fit
                return step(*args, **kwargs)
            at = self._trainer.global_step
            batch = args[0] if args else kwargs.get("batch")
            begun = batch if isinstance(batch, Mapping) else None
            with density.watching(self._module, at, begun) as watched:
                output = step(*args, **kwargs)
            task = output.get("loss") if isinstance(output, Mapping) else output
            # None skips the batch, and the term with it; what Lightning refuses is left to it.
            if not isinstance(task, Tensor):
                return output
            read = self._inputs_of(batch)
            micro = micro_step_of(self._trainer)
            term = density(**read, step=at, micro_step=micro, watched=watched)
            self._log(self._module, task, term)
            if term.loss.requires_grad:
                self._expected.append(ExpectedGradient(term.loss))
            loss = task + term.loss
            return {**output, "loss": loss} if isinstance(output, Mapping) else loss

        # Lightning looks through one decorator only; it shall find what it would without this one.
        training_step.__wrapped__ = getattr(step, "__wrapped__", step)
        return training_step

    def forget_terms(self) -> None:
        """Expect no gradient any more, as where a batch was skipped after its training step."""
        self._expected.clear()

    def check_used(self) -> None:
        """Prove after a backward that the term was part of what was differentiated.

        Raises:
            TrainerSetupError: no gradient reached it.
        """
        used = all(each.arrived for each in self._expected)
        self._expected.clear()
        if not used:
            raise TrainerSetupError(
                f"step {self._trainer.global_step}: the density term was computed but no gradient "
                "reached it. Something after training_step dropped or replaced the loss it "
                "returned; let the backward pass begin with that loss"
            )

    def finish(self) -> None:
        """Say what is left to say of the last step."""
        if self._density is not None:
            self._density.finish()

    def restore(self) -> None:
        """Put the step back, once; a wrapper that others hold on to does nothing from now on."""
        if self._density is None:
            return
        self._density = None
        self._expected.clear()
        if self._was_own:
            self._module.training_step = self._step  # type: ignore[method-assign]
        else:
            vars(self._module).pop("training_step", None)  # gone if another one tidied up before


def micro_step_of(trainer: Trainer) -> int:
    """Which of the accumulated batches of this optimiser step is running."""
    ready: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return (ready - 1) % max(1, trainer.accumulate_grad_batches)
