"""A callback that measures while others train: densities of a fixed small set, at validation.

It takes no part in training: nothing is drawn, no gradient is taken, flags are put back, and a run
with it ends with the weights of one without, bit by bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from softtrace.checks import check_counts, check_least
from softtrace.errors import InvalidInputError, TrainerSetupError
from softtrace.lightning.penalty import DensityPenalty
from softtrace.lightning.standstill import standstill
from softtrace.lightning.support import check_strategy, name_of
from softtrace.loss.budget import LossBudget
from softtrace.loss.inputs import MODEL_INPUTS, batch_inputs
from softtrace.loss.reference import HELD_OUT
from softtrace.metrics import (
    ComputationDensity,
    DensityUncertaintyCorrelation,
    EarlyExitAgreement,
    readings,
)
from softtrace.metrics.functional import half_depth
from softtrace.model.sharding import is_sharded, note_units
from softtrace.model.wrappers import find_causal_lm
from softtrace.processes import raise_everywhere
from softtrace.tracing.attach import attach
from softtrace.tracing.masking import AttentionKind, check_attention

STATE_VERSION = 1
logger = logging.getLogger(__name__)

Inputs = dict[str, Any]


class DensityMonitor(Callback):
    """Measures a fixed small set during validation and logs how its densities move.

    Logs ``density/area_easy``, ``density/size_easy`` (median share of edges at TV 0.2),
    ``density/exit_agreement_easy`` (exits at half depth), each also as ``_all`` and ``_hard``, and
    ``density/entropy_spearman_area`` and ``_size``: all through ``LightningModule.log``, so to
    whatever logger there is, and for ``ModelCheckpoint(monitor=...)``. In several processes each
    measures its share of the set, also where they hold parts of one model (FSDP); ranks and
    quantiles are then taken of all tokens at once.

    The set is measured in the precision of the validation. Weights that another callback swaps in
    for validation (weight averaging) are seen if that callback comes after this one.

    Beside a :class:`DensityPenalty` of strength above 0 it warns once, in the log, where densities
    do not move, and names the dial; see :mod:`softtrace.lightning.standstill`. Where that has a
    ``budget`` it also logs ``density/loss_over_reference``, the share by which the held-out loss of
    this validation lies above the reference's: it may be as large as the budget. A module that logs
    its loss no earlier than in its own ``on_validation_epoch_end`` does so too late for that; the
    penalty's ``density/budget_spent`` is there all the same.

    Attributes:
        history: A dict a measurement, in order: what was logged, without the ``density/``, and
            ``step`` (optimiser steps so far) and ``tokens`` (explained positions). Kept in
            checkpoints; a fit that resumes continues it.

    Args:
        blocks: ``[N, T]`` ids to measure, without padding. None keeps the first rows of the first
            validation; give blocks where validation batches are in another order each time.
        every: Optimiser steps that lie between two measurements at least; 1 measures at every
            validation.
        max_rows: Number of rows of validation batches to keep, over all processes; given blocks are
            all measured.
        batch_size: Rows a forward; it is halved where memory runs out. Long rows take hardly more
            memory than a forward, but time: a masked run for each of 11 thresholds.
        min_context: Real tokens that stand before a position that counts; None for half of each
            row's.
        patience: Optimiser steps that densities may stand still before it warns, counted from the
            first measurement at which the penalty has its whole strength; None never warns.
        attention: Where masked runs take their attention probabilities from, see
            :func:`softtrace.density_curve`.
        allow_untested: Run under a strategy that :mod:`softtrace.lightning.support` does not list
            as supported.

    Raises:
        InvalidInputError: An argument is outside its range, or a validation batch is not a mapping
            with ``input_ids`` (override :meth:`inputs_of`); at a measurement, memory does not
            suffice for one position of one row.
        TrainerSetupError: At the start of fit: no or several causal language models, a strategy
            that is not supported, no validation.
        UnsupportedModelError, NonFiniteError: At a measurement; see
            :func:`softtrace.attach`.
        SofttraceError: In the other processes, where measuring failed in one: of the class that it
            has there, where softtrace raised it.
    """

    def __init__(
        self,
        blocks: Tensor | None = None,
        *,
        every: int = 1,
        max_rows: int = 16,
        batch_size: int = 8,
        min_context: int | None = None,
        patience: int | None = 400,
        attention: AttentionKind = "recomputed",
        allow_untested: bool = False,
    ) -> None:
        check_counts(1, every=every, max_rows=max_rows, batch_size=batch_size)
        check_least("min_context", min_context, 0, optional=True)
        check_least("patience", patience, 1, optional=True)
        check_attention(attention)
        if blocks is not None and (
            blocks.dim() != 2 or not blocks.numel() or blocks.is_floating_point()
        ):
            raise InvalidInputError(
                f"blocks: found {blocks.dtype} of shape {tuple(blocks.shape)}, allowed are token "
                "ids [N, T], integers, at least one row"
            )
        self.blocks = blocks
        self.every = every
        self.max_rows = max_rows
        self.batch_size = batch_size
        self.min_context = min_context
        self.patience = patience
        self.attention = attention
        self.allow_untested = allow_untested
        self.history: list[dict[str, float]] = []
        self._kept: list[Inputs] = []
        self._full = False
        self._last: int | None = None
        self._warned = False
        self._loss_before: Any = None  # the held-out loss as the validation before this one left it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy that is not supported; a checkpoint is read after this."""
        self._last = None
        if stage == "fit" and trainer.global_step == 0:
            self._warned = False
        if stage in ("fit", "validate"):
            check_strategy(name_of(trainer.strategy), self.allow_untested, "DensityMonitor")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model, and the validation, before time is spent."""
        self._model_of(pl_module)
        if not trainer.enable_validation:
            raise TrainerSetupError(
                "DensityMonitor measures during validation, and this fit has none; give it "
                "validation data, a validation_step and limit_val_batches above 0, or leave the "
                "monitor out"
            )

    @staticmethod
    def _model_of(pl_module: LightningModule) -> Any:
        return find_causal_lm(
            pl_module, "DensityMonitor", "For others call softtrace.metrics.readings(model, ...)"
        )

    def inputs_of(self, batch: Any) -> dict[str, Any]:
        """What is read of a validation batch; override for batches of other shapes.

        That is ``input_ids`` and, where there are any, ``attention_mask`` and ``position_ids``
        (which keep packed documents apart).

        Raises:
            InvalidInputError: The batch is no mapping, or has no ``input_ids``.
        """
        return batch_inputs(batch, "DensityMonitor")

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first rows that pass by, once; no loader is asked for more than it would give.

        A sanity check before training leaves the set alone: it may see fewer batches.
        """
        if self.blocks is not None or self._full or dataloader_idx or trainer.sanity_checking:
            return
        kept = sum(len(each["input_ids"]) for each in self._kept)
        wanted = -(-self.max_rows // trainer.world_size) - kept
        if wanted <= 0:
            return
        # Copies made here are usable where gradients are taken; those of Lightning's are not.
        with torch.inference_mode(False):
            found = self.inputs_of(batch)
            rows = {name: found.get(name) for name in MODEL_INPUTS}
            self._kept.append({
                name: None if each is None else each[:wanted].detach().cpu().clone()
                for name, each in rows.items()
            })  # fmt: skip

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log, unless too few steps lie behind."""
        if trainer.sanity_checking:
            return
        self._full = True
        step = trainer.global_step
        if self._last is not None and step < self._last + self.every:
            return
        found = {**self._measure(trainer, pl_module), **self._over_reference(trainer, pl_module)}
        self._last = step
        self.history.append({"step": step, **found})
        # The numbers are those of all processes already; their mean is what each has.
        pl_module.log_dict(
            {f"density/{name}": value for name, value in found.items() if name != "tokens"},
            on_step=False,
            on_epoch=True,
            batch_size=1,
            sync_dist=True,
        )
        self._warn(trainer, pl_module.device)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the held-out loss of the last validation, which this one may not log again."""
        self._loss_before = self._held_out(trainer)

    def _over_reference(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The held-out loss against a budget's reference; empty where one of them is not there."""
        budget, loss = _budget_of(trainer), self._held_out(trainer)
        if budget is None or loss is None or loss is self._loss_before:
            return {}
        # All processes shall have one history, whether the module synchronises or not.
        own = torch.tensor(float(loss), device=pl_module.device)
        over = float(trainer.strategy.reduce(own, reduce_op="mean"))
        return {"loss_over_reference": over / budget.reference_at(trainer.global_step) - 1}

    @staticmethod
    def _held_out(trainer: Trainer) -> Any:
        """What is logged as the held-out loss by now, a new tensor for every validation."""
        penalty = _penalty_of(trainer)
        if penalty is None or penalty.budget is None:
            return None
        return trainer.callback_metrics.get(penalty.options.monitor or HELD_OUT)

    def _warn(self, trainer: Trainer, device: torch.device) -> None:
        """Say once if the penalty does not move what is measured."""
        penalty, budget = _penalty_of(trainer), _budget_of(trainer)
        if self._warned or self.patience is None or penalty is None:
            return
        factor = 1.0 if budget is None else budget.factor
        said = standstill(self.history, penalty.options.on(device), self.patience, factor)
        self._warned = said is not None  # in every process: all have the same history
        if said and trainer.is_global_zero:
            logger.warning(said)

    # Tensors of inference mode could not be part of a backward; attaching may keep some.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        around = trainer.strategy.model  # FSDP1 wraps the module
        note_units(pl_module if around is None else around)
        metrics: tuple[Metric, ...] = (
            ComputationDensity(), DensityUncertaintyCorrelation(), EarlyExitAgreement(),
        )  # fmt: skip
        for metric in metrics:
            metric.to(pl_module.device)
        tokens = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        failure: Exception | None = None
        model = self._model_of(pl_module)
        try:
            with attach(model).in_turns():
                for inputs in self._batches(self._share(trainer)):
                    with trainer.precision_plugin.val_step_context():
                        read = self._read(model, inputs, pl_module.device)
                    tokens += read["positions"].sum()
                    exits = read.pop("exits")
                    for metric in metrics[:2]:
                        metric.update(**read)
                    metrics[2].update(**read, exits=exits)
        except Exception as error:
            if is_sharded(model):  # the others know of it
                raise
            failure = error
        # A process that raised alone would leave the others waiting for its numbers.
        raise_everywhere(failure)
        density, correlation, exits = (metric.compute() for metric in metrics)
        total = trainer.strategy.reduce(tokens, reduce_op="sum")
        return {
            "tokens": int(total),
            **{name: float(value) for name, value in density.items()},
            **{
                f"exit_agreement_{name}": float(shares[half_depth(len(shares)) - 1])
                for name, shares in exits.items()
            },
            **{f"entropy_spearman_{name}": float(value) for name, value in correlation.items()},
        }

    def _share(self, trainer: Trainer) -> list[Inputs]:
        """The rows of the set that this process measures."""
        if self.blocks is None:
            return self._kept
        own = self.blocks[trainer.global_rank :: trainer.world_size]
        return [{**dict.fromkeys(MODEL_INPUTS), "input_ids": own}]

    def _batches(self, kept: list[Inputs]) -> Iterator[Inputs]:
        for inputs in kept:
            for start in range(0, len(inputs["input_ids"]), self.batch_size):
                rows = slice(start, start + self.batch_size)
                yield {name: None if each is None else each[rows] for name, each in inputs.items()}

    def _read(self, model: Any, inputs: Inputs, device: torch.device) -> dict[str, Any]:
        options: dict[str, Any] = {
            name: None if each is None else each.to(device) for name, each in inputs.items()
        }
        options.update(min_context=self.min_context or 0, attention=self.attention)
        read = readings(model, **options, composition=False)
        if self.min_context is None:
            real = read["positions"]
            read["positions"] = real & (real.cumsum(-1) > real.sum(-1, keepdim=True) // 2)
        return read

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, and whether it has warned."""
        history = [dict(each) for each in self.history]
        return {"version": STATE_VERSION, "history": history, "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of the interrupted fit.

        Raises:
            TrainerSetupError: The state has another layout.
        """
        if state_dict.get("version") != STATE_VERSION:
            raise TrainerSetupError(
                f"checkpoint: found DensityMonitor version {state_dict.get('version')!r}, this is "
                f"{STATE_VERSION}; resume with the softtrace that wrote it"
            )
        self.history = [dict(each) for each in state_dict["history"]]
        self._last = int(self.history[-1]["step"]) if self.history else None
        self._warned = bool(state_dict.get("warned", False))  # older states lack it


def _penalty_of(trainer: Trainer) -> DensityPenalty | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, DensityPenalty)), None)


def _budget_of(trainer: Trainer) -> LossBudget | None:
    penalty = _penalty_of(trainer)
    return None if penalty is None else penalty.budget
