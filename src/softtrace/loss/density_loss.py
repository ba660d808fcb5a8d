"""The density loss: on a sub-batch, the distortion of easy tokens under a sparse, early mask.

    strength · (Σ_t easy_t · TV(p_t, q_t) / Σ_t easy_t + exits · mean_u KL(p_u ‖ exit_u))

p is the full prediction (held constant), q that of a masked run with a threshold τ drawn for every
window of the batch that is looked at, read after a number of layers E drawn for every token. A
separate pass on a sub-batch leaves the user's own forward untouched and makes the cost a dial. What
exits of all tokens can learn needs more tokens than such a pass affords; they are read in the
user's forward, which is looked at and not changed (:mod:`softtrace.loss.early_exits`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from softtrace.anatomy.anatomy import Anatomy
from softtrace.errors import InvalidInputError, NonFiniteError
from softtrace.graph.batch import Batch, check_is_tensor
from softtrace.loss import draws
from softtrace.loss.captured import CapturedTerms
from softtrace.loss.compiled_exits import CompiledStreams, noting_places
from softtrace.loss.early_exits import MIXED, Watched, watching
from softtrace.loss.exit_term import ExitDistance, ExitTerm
from softtrace.loss.inputs import MANY_BATCHES, NO_TARGETS, refuse_types
from softtrace.loss.kept_state import resume_loop, state_of_loop
from softtrace.loss.learned_maps import LearnedMaps
from softtrace.loss.non_finite import NonFiniteSteps
from softtrace.loss.options import DensityOptions
from softtrace.loss.reference import loss_budget
from softtrace.loss.term import DensityTerm
from softtrace.loss.together import together_term
from softtrace.loss.transfers import EarlyCopies, LaterChecks, sent
from softtrace.loss.windows import draw_windows
from softtrace.model.exit_maps import set_exit_maps
from softtrace.model.flat_units import bare, is_flat_unit
from softtrace.model.sharding import as_one_forward, held, is_sharded, note_units, unit_of
from softtrace.model.state import (
    all_modules,
    dropout_off,
    is_checkpointed,
    is_compiled,
    is_reentrant,
    uncompiled,
)
from softtrace.model.wrappers import checked_module, unwrapped
from softtrace.processes import agreed
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument

logger = logging.getLogger(__name__)


class DensityLoss:
    """Computes the density term for batches of one model, in a loop of your own.

    Run your forward inside ``with density_loss.watching() as watched:``, where early exits are
    read, and add ``density_loss(input_ids, attention_mask, labels, watched=watched).loss`` to the
    task loss before the backward pass. With several processes the draws differ by rank; average
    gradients as usual. Where weights are sharded (FSDP) all processes construct this and call it at
    the same steps, also with nothing to look at: each waits for the others. With a budget, call
    ``density_loss.budget.update(step, loss)`` with every held-out loss, the same in all processes.

    Args:
        model: A causal language model of transformers; attached (and proven) here unless the
            strength is 0.
        options: A ready :class:`softtrace.loss.DensityOptions`; None for the defaults.
        **changes: Any of its fields, by name.

    Attributes:
        exit_maps: Learns the maps of exits; None without ``options.exit_map``.
        budget: Holds the strength, a :class:`softtrace.loss.budget.LossBudget`; None without one.

    Raises:
        UnsupportedModelError: See :func:`softtrace.attach`.
        InvalidInputError: An option is outside its range, or there is none of a name.
    """

    def __init__(
        self, model: nn.Module, options: DensityOptions | None = None, **changes: Any
    ) -> None:
        self.options = DensityOptions.changed(options, changes)
        self.budget = loss_budget(self.options)
        self.model = bare(checked_module(model))
        self.step = 0
        self._non_finite = NonFiniteSteps(self.options.on_nonfinite)
        self._without_targets = 0  # batches in a row
        self._watched = Watched()
        self._streams = CompiledStreams()
        self._later = LaterChecks()
        self._captured = CapturedTerms(self._later)
        self._said: set[str] = set()
        self.exit_maps: LearnedMaps | None = None
        if self.options.strength > 0:
            instrument = attach(model)
            if self.options.exit_map:
                self.exit_maps = LearnedMaps.of(instrument, self.options)
        self._exit_term = ExitTerm(self.exit_maps, self._later, self._captured.memory)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was pickled: exits of its own model are read through its own maps."""
        vars(self).update(state)
        if self.exit_maps is not None:
            set_exit_maps(self.model, self.exit_maps.maps)

    def options_of_a_step(self, device: torch.device) -> DensityOptions:
        """The options as they are on a device, and for a model that is sharded."""
        options = self.options
        if is_sharded(unwrapped(self.model)):  # units let go of weights: no CUDA graph can be made
            options = replace(options, cuda_graph=False)
        asked = options.fuse is None and device.type == "cuda"  # elsewhere nothing is captured
        if asked and (self._streams.places or is_compiled(all_modules(self.model))):
            options = replace(options, fuse=True)
        return options.on(device)

    @contextmanager
    def watching(
        self,
        host: nn.Module | None = None,
        step: int | None = None,
        batch: Mapping[str, Any] | None = None,
    ) -> Iterator[Watched]:
        """Look at the training forward inside, for the exits of the call that is given the handle.

        Nothing about the forward changes; residual streams and logits are held until that call. A
        call that is given none takes the handle of the newest block. Nothing is watched without
        ``options.exits``. Where something is compiled, hooks stay on the layers, which only look;
        a model that was compiled as a whole before they came is compiled once more, and read too.

        Args:
            host: The module whose forward is run, where that is not the model itself.
            step: As in the call, if given there; at a step without exits nothing is watched.
            batch: Holds the tensors that the call will be given. On CUDA their copies to the CPU
                begin before the forward, which the call would wait for otherwise.

        Raises:
            InvalidInputError: Layers are checkpointed in the reentrant way, which runs them without
                a graph; or the batch holds token types that the model reads.
        """
        model = unwrapped(self.model)
        refuse_types(batch if self.options.strength > 0 else None, model)
        watched = self._watched = Watched(copies=EarlyCopies(batch), model=model)
        if host is not None and is_flat_unit(host) and unit_of(model) is None:  # wrapped after us
            note_units(host)
        if not self.options.reads_exits:
            yield watched
            return
        own = all_modules(self.model)
        modules = own if host is None else all_modules(self.model, host)
        if model.training and is_reentrant(modules):
            raise InvalidInputError(
                "exits: found activation checkpointing with use_reentrant=True, under which layers "
                "run without a graph; pass gradient_checkpointing_kwargs={'use_reentrant': False} "
                "(the default of transformers), or set exits=0"
            )
        anatomy, compiled = attach(model).anatomy, is_compiled(modules)
        noted = compiled and self._note_compiled(anatomy, own)
        if step is not None and not self._reads_exits(step):
            yield watched
            return
        if compiled and not noted:
            self._say_once("exits: compiled and checkpointed with hooks, so none is read")
            yield watched
            return
        if compiled:
            looking = self._streams.watching(watched, self._say_once)
        else:
            looking = watching(model, anatomy, watched, self._depths(anatomy))
        try:
            with looking:
                yield watched
        except BaseException:  # out of memory, say: nobody will ask for what is held
            watched.forget()
            self._streams.clear()
            raise

    def _note_compiled(self, anatomy: Anatomy, modules: list[nn.Module]) -> bool:
        """Put hooks for a compiled forward on, where they can be; also where this step reads none.

        What is compiled now is not compiled again then.
        """
        checkpointed = unwrapped(self.model).training and is_checkpointed(modules)
        places = noting_places(anatomy, self._depths(anatomy), modules if checkpointed else None)
        if places:
            self._streams.note(places)
        return bool(places)

    def _reads_exits(self, step: int) -> bool:
        """Whether exits are read at a step, for the model or for their map."""
        schedule = self.options.exit_schedule
        return bool(schedule(step)) or (self.exit_maps is not None and schedule.comes(step))

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        step: int | None = None,
        micro_step: int = 0,
        position_ids: Tensor | None = None,
        watched: Watched | None = None,
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
                document, and no edge crosses. Your forward needs ``use_cache=False`` for the same.
            watched: what :meth:`watching` gave, with the forward whose exits are read; None for
                that of the newest block. What it holds is let go.

        Raises:
            InvalidInputError: a malformed batch, or a handle of another model.
            NonFiniteError: logits are not finite and ``on_nonfinite`` is ``"raise"``.
        """
        check_is_tensor(input_ids)
        if step is None:
            step, self.step = self.step, self.step + 1
        watched = self._watched if watched is None else watched
        watched.check(unwrapped(self.model))
        found: list[DensityTerm] = []

        def loss() -> Tensor:
            read = input_ids, attention_mask, labels, position_ids
            found.append(self._term(read, (step, micro_step), watched))
            return found[0].loss

        added = as_one_forward(unwrapped(self.model), loss)
        return replace(found[0], loss=added)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training starts from, alike in all processes."""
        return state_of_loop(self.options.seed, self.step, self.budget, self.exit_maps)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a :meth:`state_dict`.

        Raises:
            TrainerSetupError: It is of another seed, or of a term with other options.
        """
        self.step = resume_loop(state_dict, self.options.seed, self.budget, self.exit_maps)

    def finish(self) -> None:
        """Say what was not finite at the last step; to be called once a training has ended.

        Of what a GPU replays it is said at the next step otherwise. Both trainers call this.
        """
        try:
            self._later.begin(self.step)
        except NonFiniteError as error:
            logger.warning("%s It was the last step; its density term was left out.", error)

    def _term(
        self,
        read: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
        drawn_by: tuple[int, int],
        watched: Watched,
    ) -> DensityTerm:
        """The term; ``read`` as :meth:`_batch` takes it, drawn by step and accumulated batch."""
        step, device = drawn_by[0], read[0].device
        together, options = is_sharded(unwrapped(self.model)), self.options_of_a_step(device)
        factor = 1.0 if self.budget is None else self.budget.factor
        strength, weight = factor * options.schedule(step), factor * options.exit_schedule(step)
        exits, reads_exits = None, self._reads_exits(step)
        try:
            self._later.begin(step)
        except NonFiniteError as error:  # of an earlier step, which it names itself
            self._non_finite.met(str(error), error)
        try:
            if not strength and not reads_exits:
                return DensityTerm.of_no_run(device)
            instrument = attach(self.model)
            with agreed(together):  # before any waits for the others in a forward
                batch = self._batch(*watched.copies.of(*read))
                instrument.check(batch)
            if self.exit_maps is not None:
                self.exit_maps.begin(step)
            term = DensityTerm.of_no_run(device)
            self._without_targets = 0 if bool(batch.counted.any()) else self._without_targets + 1
            if self._without_targets == MANY_BATCHES:
                self._say_once(NO_TARGETS)
            if together or not self._without_targets:
                if reads_exits:
                    exits = self._exits(
                        instrument, watched, batch, drawn_by, options, bool(weight), device
                    )
                with agreed(together):
                    if exits is not None:
                        exits.check()
                if strength:
                    term = self._density(instrument, batch, drawn_by, options, strength, device)
                if exits is not None:
                    loss = term.loss + weight * exits.mean if weight else term.loss
                    term = replace(term, loss=loss, exit_distance=exits.mean.detach())
                if term.strength and term.skipped is None and not term.loss.requires_grad:
                    self._say_without_gradient()
            else:
                term = DensityTerm.of_no_run(device, strength, "no token of the batch has a target")
        except NonFiniteError as error:
            self._non_finite.met(named := f"step {step}: {error}", error)
            term, exits = DensityTerm.of_no_run(device, strength, named), None
        finally:
            watched.forget()
            self._streams.clear()  # our own runs pass by its hooks too
        if self.exit_maps is not None and reads_exits:  # in every process, whatever its batch was
            given = (None, None) if exits is None else (exits.mean, exits.map_gradients)
            self.exit_maps.collect(device, *given)
        return term

    def _batch(self, input_ids: Tensor, *read: Tensor | None) -> Batch:
        """Which tokens a call looks at; what it says of ids and mask is checked later."""
        attention_mask, labels, position_ids = read
        return Batch.of(input_ids, attention_mask, position_ids, labels)

    def _depths(self, anatomy: Anatomy) -> range:
        """After how many layers exits are; a single layer has none."""
        layers = len(anatomy.layers)
        low, high = self.options.exit_bounds(layers) if layers > 1 else (0, -1)
        return range(low, high + 1)

    def _say_once(self, *said: str) -> None:
        if said[0] not in self._said:  # the kind of what is said last: numbers in that may change
            self._said.add(said[0])
            logger.warning(said[-1])

    def _say_without_gradient(self) -> None:
        """The term is added all the same, and nothing learns from it."""
        trained = any(parameter.requires_grad for parameter in self.model.parameters())
        if torch.is_grad_enabled() and trained:
            self._say_once(
                "the density term has no gradient: none of the weights that are trained has a part "
                "in it. Recorded attention gives none to queries and keys; set "
                "attention='recomputed' or exits above 0, or train other weights too"
            )

    def _density(
        self,
        instrument: Instrument,
        batch: Batch,
        step: tuple[int, int],
        options: DensityOptions,
        strength: float,
        device: torch.device,
    ) -> DensityTerm:
        """The term without exits."""
        chosen = draw_windows(instrument, batch, step, options)
        windows = None if chosen is None else chosen.on(device)
        if is_sharded(instrument.model):
            with dropout_off(instrument.model), uncompiled(instrument.model):
                return together_term(instrument, windows, options, strength)
        why = "no token of the windows has a target"
        if windows is not None:
            if (found := self._captured(instrument, windows, options)) is not None:
                return found.at(strength)
            why = "no token of the windows has a finite easiness"
        return DensityTerm.of_no_run(device, strength, why)

    def _exits(
        self,
        instrument: Instrument,
        watched: Watched,
        batch: Batch,
        step: tuple[int, int],
        options: DensityOptions,
        learned: bool,
        device: torch.device,
    ) -> ExitDistance | None:
        """Distance of exits in the last watched forward; None without one, or if nobody learns."""
        depths = self._depths(instrument.anatomy)
        if not depths or not (learned or self.exit_maps):
            return None
        seen = watched.last_of(batch.counted.shape, depths)
        if seen is None:
            self._say_once(*watched.why_none(batch.counted.shape))
            return None
        if batch.packed and seen.mixes:
            self._say_once(MIXED)
        drawn = draws.draw_exits(
            seed=options.seed,
            step=step,
            rank=draws.rank(),
            counted=batch.counted,
            share=options.exit_tokens,
            bounds=(depths[0], depths[-1]),
        )
        targets, readout = sent(batch.targets, device), instrument.anatomy.readout
        with held((readout.norm.module, readout.head)):
            return self._exit_term(instrument, seen, drawn.on(device), targets, options, learned)
