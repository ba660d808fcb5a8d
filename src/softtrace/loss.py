"""The density loss: on a sub-batch, the distortion of easy tokens under a sparse, early mask.

    strength · (Σ_t easy_t · TV(p_t, q_t) / Σ_t easy_t + exits · mean_u KL(p_u ‖ exit_u))

p is the full prediction (held constant), q that of a masked run with a threshold τ drawn for every
window of the batch that is looked at, read after a number of layers E drawn for every token. A
separate pass on a sub-batch leaves the user's own forward untouched and makes the cost a dial. What
exits of all tokens can learn needs more tokens than such a pass affords; they are read in the
user's forward, which is looked at and not changed (:mod:`softtrace.forward_exits`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.batch import check_finite, check_positions, is_packed, next_tokens, real_tokens
from softtrace.distortion import DISTANCES
from softtrace.draws import draw, draw_exits
from softtrace.easiness import easiness, easy_weights
from softtrace.errors import InvalidInputError, NonFiniteError
from softtrace.families.refusals import unwrapped
from softtrace.forward_exits import Seen, exit_distance, watching
from softtrace.graph import EdgeImportance, LayerEdges
from softtrace.importance import working_dtype
from softtrace.instrument import Instrument, attach
from softtrace.masks import hard_masks, soft_masks
from softtrace.modes import all_modules, dropout_off, is_compiled, is_reentrant, uncompiled
from softtrace.options import DensityOptions
from softtrace.trace import soft_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Batch:
    """A checked batch, ``[B, T]`` each: token ids, which are real, what each has to predict (-100:
    nothing), which count; position ids if given, and whether documents are packed."""

    input_ids: Tensor
    valid: Tensor
    targets: Tensor
    counted: Tensor
    positions: Tensor | None
    packed: bool


@dataclass(frozen=True)
class DensityTerm:
    """The added term of one step, and what it was made of.

    Attributes:
        loss: scalar to add to the task loss (in units of the distance, times strength). Without a
            graph, and 0, if nothing was run or read.
        distortion: Σ easy·distance / Σ easy (nats for KL), detached. This and the next two are NaN
            if nothing was run, as between the steps that ``every`` leaves.
        soft_size: easy tokens' mean size (share of |E|) of the traces at the drawn thresholds,
            before the depth cut, detached.
        easy_share: Σ easy / number of counted tokens, detached.
        strength: weight of the distortion at this step.
        skipped: why nothing was run although the strength is positive; None otherwise.
        exit_distance: mean KL(full ‖ exit) of the exits that were read (nats), detached; None if
            none was: without ``exits``, or where no forward was watched.
    """

    loss: Tensor
    distortion: Tensor
    soft_size: Tensor
    easy_share: Tensor
    strength: float
    skipped: str | None = None
    exit_distance: Tensor | None = None


class DensityLoss:
    """Computes the density term for batches of one model: the plain-loop door.

    Run your forward inside ``with density_loss.watching():``, where early exits are read, and add
    ``density_loss(input_ids, attention_mask, labels).loss`` to the task loss before the backward
    pass. With several processes the draws differ by rank; average gradients as usual.

    Args:
        model: a causal language model of transformers; attached (and proven) here unless the
            strength is 0.
        options: a ready :class:`softtrace.options.DensityOptions`; None for the defaults.
        **changes: any of its fields, by name.

    Raises:
        UnsupportedModelError: see :func:`softtrace.attach`.
        InvalidInputError: an option outside its range.
    """

    def __init__(
        self, model: nn.Module, options: DensityOptions | None = None, **changes: Any
    ) -> None:
        self.options = DensityOptions(**changes) if options is None else replace(options, **changes)
        self.model = model
        self.step = 0
        self.skipped_steps = 0
        self._seen: list[Seen] = []
        self._said: set[str] = set()
        if self.options.strength > 0:
            attach(model)

    @contextmanager
    def watching(self, host: nn.Module | None = None, step: int | None = None) -> Iterator[None]:
        """Look at the training forward inside, for the exits of the next call.

        Nothing about the forward changes; residual streams and logits are held until that call.
        Does nothing without ``options.exits``, and where something is compiled: hooks would compile
        it anew.

        Args:
            host: the module whose forward is run, where that is not the model itself.
            step: as in the call, if given there; at a step without exits nothing is watched.

        Raises:
            InvalidInputError: layers are checkpointed in the reentrant way, which runs them without
                a graph.
        """
        self._seen.clear()
        model = unwrapped(self.model)
        schedule = self.options.exit_schedule
        if not schedule.strength:
            yield
            return
        modules = all_modules(self.model, *() if host is None else (host,))
        if model.training and is_reentrant(modules):
            raise InvalidInputError(
                "exits: found activation checkpointing with use_reentrant=True, under which layers "
                "run without a graph; pass gradient_checkpointing_kwargs={'use_reentrant': False} "
                "(the default of transformers), or set exits=0"
            )
        if step is not None and not schedule(step):
            yield
            return
        if is_compiled(modules):
            self._say_once("exits: the model is compiled, so its forward is not watched")
            yield
            return
        try:
            with watching(model, attach(model).anatomy, self._seen):
                yield
        except BaseException:
            self._seen.clear()  # out of memory, say: nobody will ask for them
            raise

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        step: int | None = None,
        micro_step: int = 0,
        position_ids: Tensor | None = None,
    ) -> DensityTerm:
        """The term of one step.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]`` of 0 and 1, or None. Rows of padding alone are left out.
            labels: ``[B, T]``, -100 where the task loss looks away; positions whose next label is
                -100 do not count. None counts every real token.
            step: global step for the schedule and the draws; None counts the calls.
            micro_step: which of the batches accumulated into this step, for the draws.
            position_ids: ``[B, T]``, needed where rows are packed: they start anew with every
                document, and no edge crosses from one document into another.

        Raises:
            InvalidInputError: a malformed batch.
            NonFiniteError: logits are not finite and ``on_nonfinite`` is ``"raise"``.
        """
        if step is None:
            step, self.step = self.step, self.step + 1
        options = self.options.on(input_ids.device)
        strength, weight = options.schedule(step), options.exit_schedule(step)
        seen = list(self._seen)  # a copy: runs of ours inside an open block are seen too
        try:
            if strength == weight == 0:
                return _nothing(input_ids, 0.0, None)
            batch = self._batch(input_ids, attention_mask, labels, position_ids)
            drawn_by = (step, micro_step)
            # First what reads nothing from the device, which may still be busy with the forward.
            instrument = attach(self.model)
            exits = self._exits(instrument, seen, batch.counted, drawn_by) if weight else None
            instrument.valid(input_ids, attention_mask)
            if not bool(batch.counted.any()):
                return _nothing(input_ids, strength, "no token of the batch has a target")
            distance = None if exits is None else _mean_distance(*exits)
            if strength:  # once for all runs in it: switching modules takes longer than asking
                with dropout_off(instrument.model), uncompiled(instrument.model):
                    term = self._density(instrument, batch, drawn_by, options, strength)
            else:
                term = _nothing(input_ids, 0.0, None)
            if distance is None:
                return term
            loss = term.loss + weight * distance
            return replace(term, loss=loss, exit_distance=distance.detach())
        except NonFiniteError as error:
            named = f"step {step}: {error}"
            if self.options.on_nonfinite == "raise":
                raise NonFiniteError(named) from error
            self._warn_of_skip(named)
            return _nothing(input_ids, strength, named)
        finally:
            self._seen.clear()

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(what)

    def _warn_of_skip(self, why: str) -> None:
        """At the 1st, 2nd, 4th, 8th, ... skipped step: seen from the start, never a flood."""
        self.skipped_steps += 1
        if self.skipped_steps.bit_count() == 1:
            logger.warning(
                "%s The density term was left out; so far %d times.", why, self.skipped_steps
            )

    def _batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        position_ids: Tensor | None,
    ) -> _Batch:
        valid = real_tokens(input_ids, attention_mask)
        positions = None
        if position_ids is not None:
            positions = check_positions(position_ids, valid, attention_mask is not None)
        packed = positions is not None and is_packed(positions, valid)
        targets, counted = next_tokens(input_ids, valid, labels, positions if packed else None)
        return _Batch(input_ids, valid, targets, counted, positions, packed)

    def _density(
        self,
        instrument: Instrument,
        batch: _Batch,
        step: tuple[int, int],
        options: DensityOptions,
        strength: float,
    ) -> DensityTerm:
        """The term without exits."""
        input_ids, positions = batch.input_ids, batch.positions
        length = input_ids.shape[1]
        window = length if options.crop is None else min(options.crop, length)
        chosen = draw(
            seed=options.seed,
            step=step,
            rank=_rank(),
            counted=batch.counted,
            share=options.window_share,
            window=window,
            thresholds=options.thresholds,
            depths=options.depth_bounds(len(instrument.anatomy.layers)),
        )
        if chosen is None:
            return _nothing(input_ids, strength, "no token of the windows has a target")
        ids, mask, inside, targets = (
            chosen.of(each, window)
            for each in (input_ids, batch.valid.long(), batch.counted, batch.targets)
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and options.through_importances):
            recording = instrument.record(
                ids,
                None if batch.packed else mask,
                position_ids=None if positions is None else chosen.of(positions, window),
                checked=True,
            )
        full = recording.logits.detach()
        score = easiness(options.easiness)(full, targets)
        score = score.detach().to(working_dtype(full.dtype))
        inside = inside & torch.isfinite(score)  # of a callable: infinite where never easy
        easy = easy_weights(score, inside, options.easy_quantile, options.easy_width)
        traces, masks = self._masks(recording.importance, chosen.thresholds)
        recorded = recording.attention if options.attention == "recorded" else None
        places = (easy > 0).flatten().nonzero()[:, 0]
        if not len(places):
            return _nothing(input_ids, strength, "no token of the windows has a finite easiness")
        masked = instrument.exit_logits(
            ids,
            recording.mask,
            masks,
            chosen.depths,
            places,
            recorded,
            recording.positions,
            checked=True,
        )
        check_finite(masked.detach(), "logits of the masked run")
        total = easy.sum().clamp_min(torch.finfo(easy.dtype).tiny)
        chosen_distance = options.distance
        distance = chosen_distance if callable(chosen_distance) else DISTANCES[chosen_distance]
        distances = distance(full.flatten(0, 1).index_select(0, places), masked)
        if distances.shape != masked.shape[:1]:
            raise InvalidInputError(
                f"distance: found shape {tuple(distances.shape)} for logits {tuple(masked.shape)}, "
                f"allowed is [{len(masked)}], one number a token"
            )
        distortion = (easy.flatten().index_select(0, places) * distances).sum() / total
        size = self._size(recording.importance, traces, easy / total)
        term = distortion + options.size_weight * size if options.size_weight else distortion
        return DensityTerm(
            loss=strength * term,
            distortion=distortion.detach(),
            soft_size=size.detach(),
            easy_share=(total / inside.sum()).detach(),
            strength=strength,
        )

    def _exits(
        self, instrument: Instrument, seen: list[Seen], counted: Tensor, step: tuple[int, int]
    ) -> tuple[Tensor, Tensor] | None:
        """``[n]`` distances of exits in the last watched forward of this batch, and which count.

        None without a forward.
        """
        anatomy = instrument.anatomy
        layers = len(anatomy.layers)
        if layers < 2:
            return None
        fitting = [
            each for each in seen
            if each.ended
            and len(each.streams) == layers
            and each.streams[0].shape[:2] == counted.shape
        ]  # fmt: skip
        if not fitting:
            self._say_once(
                "exits: no forward of this batch was watched, so none is read early; run it inside "
                "'with density_loss.watching():', with gradients, or set exits=0"
            )
            return None
        drawn = draw_exits(
            seed=self.options.seed,
            step=step,
            rank=_rank(),
            counted=counted,
            share=self.options.exit_tokens,
            bounds=self.options.exit_bounds(layers),
        )
        found = exit_distance(fitting[-1], anatomy.readout, drawn.places, drawn.depths)
        return found, drawn.used

    def _masks(
        self, importance: EdgeImportance, thresholds: Tensor
    ) -> tuple[Sequence[LayerEdges], Sequence[LayerEdges]]:
        """Traces at the drawn thresholds as the size term sees them, and as the run is masked."""
        options = self.options
        if options.family == "shallow":
            every = hard_masks(importance, 0.0)
            return every, every
        hard = options.masks == "straight"
        masks = (
            hard_masks(importance, thresholds)
            if hard
            else soft_masks(importance, thresholds, options.temperature)
        )
        if hard and options.size_weight > 0:
            return soft_masks(importance, thresholds, options.temperature), masks
        return masks, masks

    def _size(
        self, importance: EdgeImportance, traces: Sequence[LayerEdges], weights: Tensor
    ) -> Tensor:
        """Weighted mean size of the traces; with gradients only if a size term wants them."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.options.size_weight > 0):
            return soft_size(importance, traces, weights).to(weights.dtype)


def _nothing(input_ids: Tensor, strength: float, why: str | None) -> DensityTerm:
    zero = torch.zeros((), dtype=torch.float32, device=input_ids.device)
    unknown = torch.full_like(zero, torch.nan)
    return DensityTerm(zero, unknown, unknown, unknown, strength, why)


def _mean_distance(distances: Tensor, used: Tensor) -> Tensor:
    check_finite(distances.detach(), "distances of early exits", used)
    return torch.where(used, distances, 0.0).sum() / used.sum()


def _rank() -> int:
    distributed = torch.distributed
    return (
        distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    )
