"""The Lightning door: ``Trainer(callbacks=[DensityPenalty()])``; ``DensityMonitor`` only measures.

A Lightning callback has no official way to add to the loss. The bound ``training_step`` is wrapped
as an instance attribute from ``on_train_start`` on and put back at the end, also after an
exception; ``functools.wraps`` keeps its signature readable for Lightning, which looks for
``batch_idx``.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from softtrace.errors import TrainerSetupError
from softtrace.host import batch_inputs, find_causal_lm
from softtrace.loss import DensityLoss, DensityTerm
from softtrace.monitor import DensityMonitor
from softtrace.options import DensityOptions
from softtrace.support import check_strategy

__all__ = ["DensityMonitor", "DensityPenalty"]

STATE_KEY = "softtrace.DensityPenalty"
STATE_VERSION = 1


class DensityPenalty(Callback):
    """Adds the density term to the loss of any LightningModule that holds one causal LM.

    The batch has to be a mapping with ``input_ids`` ``[B, T]`` and, where there are any,
    ``attention_mask`` and ``labels``; override :meth:`inputs_of` for other batches.

    Logs every step ``loss/task`` and ``loss/density`` (mean of what the last ``every`` batches had
    added), and of the last masked run ``density/soft_size`` (share of edges),
    ``density/distortion`` (in units of the chosen distance) and ``density/easy_share``; NaN before
    the first and where it was skipped. With ``exits`` also ``density/exit_distance`` (nats), NaN
    where none was read. Strength 0 is inert: the training step is not even wrapped.

    Args:
        strength: weight of the term, >= 0.
        allow_untested: run under a strategy that :mod:`softtrace.support` does not list as
            supported.
        **options: see :class:`softtrace.options.DensityOptions`.

    Raises:
        InvalidInputError: an option outside its range.
        TrainerSetupError: at the start of fit: two DensityPenalty callbacks, no or several causal
            language models, manual optimisation, a ``dataloader_iter`` training step, a strategy
            that is not supported.
        UnsupportedModelError: at the start of training; see :func:`softtrace.attach`.
    """

    def __init__(
        self, strength: float = 0.35, allow_untested: bool = False, **options: Any
    ) -> None:
        self.options = DensityOptions(strength=strength, **options)
        self.allow_untested = allow_untested
        self._loss: DensityLoss | None = None
        self._module: LightningModule | None = None
        self._own_step: Any = None
        self._had_own_step = False
        self._waiting: list[int] = []
        self._added: deque[Tensor] = deque()
        self._measured: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything runs, what can be seen without the model."""
        if stage != "fit":
            return
        twins = [c for c in trainer.callbacks if isinstance(c, DensityPenalty)]  # type: ignore[attr-defined]
        if len(twins) > 1:
            raise TrainerSetupError(
                f"found {len(twins)} DensityPenalty callbacks, allowed is one: their terms would "
                "add up unseen. Keep one and raise its strength"
            )
        if self.options.strength == 0:
            return
        check_strategy(type(trainer.strategy).__name__, self.allow_untested)
        if not pl_module.automatic_optimization:
            raise TrainerSetupError(
                f"{type(pl_module).__name__} uses manual optimisation; DensityPenalty works with "
                "automatic optimisation only. Use the plain-loop door inside your training_step: "
                "loss = loss + softtrace.DensityLoss(model, ...)(input_ids, attention_mask).loss"
            )
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise TrainerSetupError(
                f"{type(pl_module).__name__}.training_step takes dataloader_iter, so the batch "
                "never passes the callback; take (batch) or (batch, batch_idx)"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model early, before sanity checks spend time."""
        if self.options.strength > 0:
            find_causal_lm(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the model and wrap the bound training step."""
        if self.options.strength == 0:
            return
        model = find_causal_lm(pl_module)
        self._loss = DensityLoss(model, self.options)
        self._added = deque(maxlen=self.options.on(pl_module.device).every)
        self._measured = {}
        self._module = pl_module
        self._had_own_step = "training_step" in vars(pl_module)
        self._own_step = vars(pl_module).get("training_step")
        pl_module.training_step = self._wrap(trainer, pl_module)  # type: ignore[method-assign]

    def _wrap(self, trainer: Trainer, pl_module: LightningModule) -> Callable[..., Any]:
        step, density = pl_module.training_step, self._loss

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            live = density if density is self._loss else None
            with live.watching(pl_module, trainer.global_step) if live else nullcontext():
                output = step(*args, **kwargs)
            task = output.get("loss") if isinstance(output, Mapping) else output
            # None skips the batch, and the term with it; what Lightning refuses is left to it. A
            # wrapper that another one puts back after the end of this fit does nothing any more.
            if density is None or density is not self._loss or not isinstance(task, Tensor):
                return output
            term = density(
                **self.inputs_of(args[0] if args else kwargs["batch"]),
                step=trainer.global_step,
                micro_step=micro_step_of(trainer),
            )
            self._log(pl_module, task, term)
            if term.loss.requires_grad:
                self._expect_use(term.loss)
            loss = task + term.loss
            return {**output, "loss": loss} if isinstance(output, Mapping) else loss

        # Lightning looks through one decorator only; it shall find what it would without this one.
        training_step.__wrapped__ = getattr(step, "__wrapped__", step)
        return training_step

    def inputs_of(self, batch: Any) -> dict[str, Any]:
        """What the loss reads of a batch; override for batches of other shapes.

        That is ``input_ids`` and, where there are any, ``attention_mask``, ``labels`` and
        ``position_ids`` (which keep packed documents apart).

        Raises:
            InvalidInputError: no mapping, or no ``input_ids`` in it.
        """
        return batch_inputs(batch)

    def _log(self, pl_module: LightningModule, task: Tensor, term: DensityTerm) -> None:
        # Loggers look at every 50th step or so, where the masked runs of ``every`` seldom are.
        self._added.append(term.loss.detach())
        if term.strength > 0 or not self._measured:
            self._measured = {
                "density/soft_size": term.soft_size,
                "density/distortion": term.distortion,
                "density/easy_share": term.easy_share,
            }
        values = {
            "loss/task": task.detach(),
            "loss/density": torch.stack(list(self._added)).mean(),
            **self._measured,
        }
        if self.options.exits:
            unread = torch.full_like(task.detach(), torch.nan)
            read = term.exit_distance
            values["density/exit_distance"] = unread if read is None else read
        pl_module.log_dict(values, on_step=True, on_epoch=False)

    def _expect_use(self, loss: Tensor) -> None:
        """A gradient has to arrive at the term in this backward; see on_after_backward."""
        token = id(loss)
        self._waiting.append(token)

        def arrived(gradient: Tensor) -> None:
            if bool(gradient != 0) and token in self._waiting:
                self._waiting.remove(token)

        loss.register_hook(arrived)  # type: ignore[no-untyped-call]

    def on_train_batch_start(self, *_: Any) -> None:
        """Forget a term whose batch something after training_step skipped by returning None."""
        self._waiting.clear()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prove that the term was part of what was differentiated."""
        if self._waiting:
            self._waiting.clear()
            raise TrainerSetupError(
                f"step {trainer.global_step}: the density term was computed but no gradient "
                "reached it. Something after training_step dropped or replaced the loss it returned"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the training step back."""
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put the training step back."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the training step back."""
        self._restore()

    def _restore(self) -> None:
        if self._module is None:
            return
        if self._had_own_step:
            self._module.training_step = self._own_step  # type: ignore[method-assign]
        else:
            vars(self._module).pop("training_step", None)  # gone if another one tidied up before
        self._module = self._loss = self._own_step = None
        self._waiting.clear()

    # Not state_dict: Lightning refuses two callbacks with state before setup can say it better.
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep a version and the seed; draws and strength are functions of the step."""
        checkpoint[STATE_KEY] = {"version": STATE_VERSION, "seed": self.options.seed}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint of another layout or seed; one made without the penalty is fine."""
        for name, own in (("version", STATE_VERSION), ("seed", self.options.seed)):
            if (state := checkpoint.get(STATE_KEY)) is not None and state.get(name) != own:
                raise TrainerSetupError(
                    f"checkpoint: found DensityPenalty {name} {state.get(name)!r}, this run has "
                    f"{own!r}; a fit resumes only with what it was started with"
                )


def micro_step_of(trainer: Trainer) -> int:
    """Which of the accumulated batches of this optimiser step is running."""
    ready: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return (ready - 1) % max(1, trainer.accumulate_grad_batches)
