"""The Lightning integration: ``Trainer(callbacks=[DensityPenalty()])``.

The training step is wrapped (:mod:`softtrace.lightning.wrapped_step`) from ``on_train_start`` on
and put back at the end, also after an exception.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from transformers import PreTrainedModel

from softtrace.errors import TrainerSetupError
from softtrace.lightning.due_validation import check_validates, is_due, validate
from softtrace.lightning.support import check_strategy, name_of
from softtrace.lightning.wrapped_step import WrappedStep
from softtrace.loss.budget import LossBudget
from softtrace.loss.density_loss import DensityLoss
from softtrace.loss.inputs import batch_inputs
from softtrace.loss.integration import TermLog, check_state, measured_loss, state_of
from softtrace.loss.learned_maps import LearnedMaps
from softtrace.loss.options import DensityOptions, check_names
from softtrace.loss.reference import HELD_OUT, loss_budget
from softtrace.loss.term import DensityTerm
from softtrace.model.exit_maps import exit_maps_of, use_exit_maps
from softtrace.model.sharding import note_units
from softtrace.model.wrappers import find_causal_lm

STATE_KEY = "softtrace.DensityPenalty"


class DensityPenalty(Callback):
    """Adds the density term to the loss of a LightningModule with one causal model.

    The batch has to be a mapping with ``input_ids`` ``[B, T]`` and, where there are any,
    ``attention_mask`` and ``labels``; override :meth:`inputs_of` for other batches.

    Logs every step ``loss/task`` and ``loss/density`` (mean of what the last ``every`` batches had
    added), and of the last masked run ``density/soft_size`` (share of edges),
    ``density/distortion`` (in units of the chosen distance) and ``density/easy_share``; NaN before
    the first and where it was skipped. With ``exits`` also ``density/exit_distance`` (nats), NaN
    where none was read. Strength 0 is inert: the training step is not even wrapped.

    With ``budget`` the strength follows what the trainer's own validation logs as ``monitor``
    (``loss/held_out``, as ``softtrace fit`` does); also logged are ``density/strength``, with the
    factor that it was given, and ``density/budget_spent``, the share of the budget that the last
    validation found spent, NaN before the first. Validate some twenty times in a fit.

    Args:
        strength: Weight of the term, >= 0; 0 runs nothing and changes nothing. None: the preset's.
        allow_untested: Run also under a strategy that :mod:`softtrace.lightning.support` does not
            list as supported.
        **options: See :class:`softtrace.loss.DensityOptions`.

    Raises:
        InvalidInputError: An option is outside its range, or there is none of a name.
        TrainerSetupError: At the start of fit: two DensityPenalty callbacks, no or several causal
            language models, manual optimisation, a ``dataloader_iter`` training step, a strategy
            that is not supported; a budget without a validation, or one that logs no ``monitor``.
        UnsupportedModelError: At the start of training; see :func:`softtrace.attach`.
    """

    def __init__(
        self, strength: float | None = None, allow_untested: bool = False, **options: Any
    ) -> None:
        check_names("DensityPenalty", options)
        self.options = DensityOptions(strength=strength, **options)  # type: ignore[arg-type]
        self.allow_untested = allow_untested
        self._wrapped: WrappedStep | None = None
        self._term_log = TermLog(self.options)
        self._kept: Mapping[str, Any] = {}  # of the checkpoint that a fit resumes from
        self._budget: LossBudget | None = None
        self._exit_maps: LearnedMaps | None = None
        self._measured_after = -1  # number of the batch whose validation was taken in last

    @property
    def budget(self) -> LossBudget | None:
        """What the strength of this fit, or of the last one, is held by; None without a budget."""
        return self._budget

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything runs, what can be seen without the model."""
        if stage != "fit":
            return
        # Until here those of the last fit: a checkpoint may be saved after its end.
        self._kept, self._budget, self._exit_maps, self._measured_after = {}, None, None, -1
        twins = [c for c in trainer.callbacks if isinstance(c, DensityPenalty)]  # type: ignore[attr-defined]
        if len(twins) > 1:
            raise TrainerSetupError(
                f"found {len(twins)} DensityPenalty callbacks, allowed is one: their terms would "
                "add up unseen. Keep one and raise its strength"
            )
        if self.options.strength == 0:
            return
        loss_budget(self.options)  # a reference that cannot be read is refused here already
        check_strategy(name_of(trainer.strategy), self.allow_untested)
        if not pl_module.automatic_optimization:
            raise TrainerSetupError(
                f"{type(pl_module).__name__} uses manual optimisation; DensityPenalty works with "
                "automatic optimisation only. Use DensityLoss inside your training_step: "
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
            if self.options.budget is not None:
                check_validates(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the model and wrap the bound training step."""
        if self.options.strength == 0:
            return
        self._restore()  # of a fit that ended without saying so: never two terms
        around = trainer.strategy.model  # FSDP1 wraps the module
        note_units(pl_module if around is None else around)
        density = DensityLoss(find_causal_lm(pl_module), self.options)
        self._budget, self._exit_maps = density.budget, density.exit_maps
        if self._exit_maps is not None and (maps := self._kept.get("exit_maps")) is not None:
            self._exit_maps.load(maps)
        every = density.options_of_a_step(pl_module.device).schedule.every
        self._term_log = TermLog(self.options, every, self._budget)
        if (log := self._kept.get("log")) is not None:
            self._term_log.load(log, pl_module.device)
        self._wrapped = WrappedStep(trainer, pl_module, density, self.inputs_of, self._log)
        if self._budget is not None:
            check_validates(trainer)
            if (kept := self._kept.get("budget")) is not None:
                self._budget.load(kept)
                self._measured_after = self._kept["measured_after"]
            if self._kept.get("validation_is_due"):
                validate(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the strength follow the held-out loss; before ModelCheckpoint saves."""
        batch = trainer.fit_loop.total_batch_idx
        if self._budget is None or self._wrapped is None or batch == self._measured_after:
            return
        own = measured_loss(trainer.callback_metrics, self.options.monitor or HELD_OUT)
        # All processes shall continue with one strength, whether the module synchronises or not.
        loss = trainer.strategy.reduce(torch.tensor(own, device=pl_module.device), reduce_op="mean")
        self._budget.update(trainer.global_step, float(loss))
        self._measured_after = batch

    def inputs_of(self, batch: Any) -> dict[str, Any]:
        """What the loss reads of a batch; override for batches of other shapes.

        That is ``input_ids`` and, where there are any, ``attention_mask``, ``labels`` and
        ``position_ids`` (which keep packed documents apart).

        Raises:
            InvalidInputError: The batch is no mapping, or has no ``input_ids``.
        """
        return batch_inputs(batch)

    def _log(self, pl_module: LightningModule, task: Tensor, term: DensityTerm) -> None:
        values = {"loss/task": task.detach(), **self._term_log.of(term)}
        pl_module.log_dict(values, on_step=True, on_epoch=False)

    def on_train_batch_start(self, *_: Any) -> None:
        """Forget a term whose batch something after training_step skipped by returning None."""
        if self._wrapped is not None:
            self._wrapped.forget_terms()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prove that the term was part of what was differentiated."""
        if self._wrapped is not None:
            self._wrapped.check_used()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is left to say of the last step, and put the training step back."""
        if self._wrapped is not None:
            self._wrapped.finish()
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put the training step back."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the training step back."""
        self._restore()

    def _read_through(self, model: PreTrainedModel, maps: Mapping[str, Tensor]) -> None:
        """Read a model's exits through the maps that its weights were saved with."""
        learned = self._exit_maps  # of the last fit, and saved with its model
        if learned is not None and learned.maps is exit_maps_of(model):
            learned.load(maps)
        else:
            use_exit_maps(model, maps)

    def _restore(self) -> None:
        if self._wrapped is not None:
            self._wrapped.restore()
            self._wrapped = None

    # Not state_dict: Lightning refuses two callbacks with state before setup can say it better.
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep a version, the seed, what is logged next, the budget's state and maps of exits.

        All else is a function of the step.

        What is logged is of this process; a checkpoint holds the first one's, as the loggers do.
        """
        checkpoint[STATE_KEY] = state_of(self.options.seed, self._term_log.state(), self._budget)
        if self._exit_maps is not None:
            checkpoint[STATE_KEY]["exit_maps"] = self._exit_maps.state()
        if self._budget is not None:
            unmeasured = self._measured_after != trainer.fit_loop.total_batch_idx
            checkpoint[STATE_KEY] |= {
                "measured_after": self._measured_after,
                "validation_is_due": unmeasured and is_due(trainer),
            }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take what was kept, of which older checkpoints and those without the penalty lack some.

        Without a fit, as in ``trainer.validate(ckpt_path=...)``, these are the maps of exits.

        Raises:
            TrainerSetupError: In a fit, the layout is unknown, or the seed is another.
        """
        kept = checkpoint.get(STATE_KEY)
        if kept is not None and trainer.state.fn != TrainerFn.FITTING:
            if (maps := kept.get("exit_maps")) is not None:
                self._read_through(find_causal_lm(pl_module), maps)
        elif kept is not None:
            found = "DensityPenalty {name} {value}"
            check_state(kept, self.options.seed, found=found, resumed="a fit")
            self._kept = kept
