"""``attach(model)``: recording and masking runs on an unmodified transformers model.

Nothing is installed between runs. Hooks, the attention implementation and eval mode are put in
place around each run of ours and taken back after it, also after an exception; the user's own
forward, attention kernel, checkpointing and compiled code never meet them.
"""

from __future__ import annotations

import inspect
import operator
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from softtrace.attention import softtrace_attention_active
from softtrace.batch import (
    check_batch,
    check_finite,
    check_length,
    check_positions,
    real_tokens,
)
from softtrace.errors import InvalidInputError, UnsupportedModelError
from softtrace.families.anatomy import Anatomy
from softtrace.families.discovery import PlainRun, forward_inputs, take_apart, tiny_inputs
from softtrace.families.proof import Verification, prove, tolerance
from softtrace.families.refusals import own_forward, refuse_early, running, unwrapped
from softtrace.families.sight import running_layers
from softtrace.graph import EdgeImportance, LayerEdges
from softtrace.hooks import register, watched
from softtrace.interception import interception_active
from softtrace.modes import all_modules, dropout_off, uncompiled
from softtrace.placement import device_of_module
from softtrace.recording import Recording
from softtrace.runs import DeepEnough, MaskedRun, RecordingRun, Run

_TINY = 6  # tokens of the batch that a model is proven on
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Instrument] = weakref.WeakKeyDictionary()


class Instrument:
    """A model that was proven to be the sum of its edges. Made by :func:`attach`."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, configs: Sequence[PretrainedConfig]
    ) -> None:
        self._model = weakref.ref(model)
        self.anatomy = anatomy
        self.verification = Verification()
        self.forward_parameters = _parameters(model)
        # Held, not numbered: a freed module's id could come back as that of its replacement.
        self._parts = tuple(part for part in all_modules(model) if part is not model)
        self._configs = configs
        self._one_logit = (
            {"logits_to_keep": 1} if "logits_to_keep" in self.forward_parameters else {}
        )

    @property
    def model(self) -> nn.Module:
        """The model itself, not kept alive by the instrument."""
        model = self._model()
        if model is None:
            raise UnsupportedModelError("the attached model no longer exists")
        return model

    def fits(self, model: nn.Module) -> bool:
        """Whether ``model`` still has the modules that were proven, none added or replaced."""
        parts = [part for part in all_modules(model) if part is not model]
        return len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts))

    def detach(self) -> None:
        """Forget the model. Between runs nothing of ours is on it, so nothing is left behind."""
        model = self._model()
        if model is not None:
            _ATTACHED.pop(model, None)

    def valid(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, checked: bool = False
    ) -> Tensor:
        """Check a batch, unless that was done; return ``[B, T]`` bool, True at real tokens."""
        if checked:
            return real_tokens(input_ids, attention_mask)
        valid = check_batch(input_ids, attention_mask, self.anatomy.vocabulary)
        if self.anatomy.looks_at_padding and bool((~valid[:, :-1] & valid[:, 1:]).any()):
            raise InvalidInputError(
                "attention_mask: padding stands before real tokens, and this model's attention "
                "looks at it all the same; pad on the right, or not at all"
            )
        return valid

    def _positions(
        self, valid: Tensor, position_ids: Tensor | None, *, masked: bool
    ) -> Tensor | None:
        """Check the length of a batch and position ids that were given; None: the usual ones."""
        positions = None if position_ids is None else check_positions(position_ids, valid, masked)
        limit = self.anatomy.positions
        if limit is not None:
            longest = int(valid.sum(-1).max())
            if "position_ids" not in self.forward_parameters:
                longest = valid.shape[1]  # its own code numbers the columns
            elif positions is not None:
                longest = int(positions[valid].max()) + 1
            check_length(longest, limit)
        return positions

    def record(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        keep_hidden: bool = False,
        keep_attention: bool = True,
        position_ids: Tensor | None = None,
        checked: bool = False,
    ) -> Recording:
        """Run the full model and measure every edge; differentiable unless gradients are off.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]`` of 0 and 1, or None.
            keep_hidden: also keep the residual stream at every layer.
            keep_attention: keep the attention probabilities, which masked runs need.
            position_ids: ``[B, T]`` of packed rows: they start anew with every document, no edge
                crosses from one document into another, and there is no padding. None otherwise.
            checked: the batch is a part of one that :meth:`valid` accepted.

        Raises:
            InvalidInputError: see :func:`softtrace.batch.check_batch`.
            NonFiniteError: a logit at a real token is NaN or infinite.
        """
        valid = self.valid(input_ids, attention_mask, checked=checked)
        positions = self._positions(valid, position_ids, masked=attention_mask is not None)
        run = RecordingRun(self.anatomy, valid, keep_hidden, keep_attention, positions)
        logits = self.forward(run, input_ids)
        check_finite(logits.detach(), "logits of the full model", valid)
        importance = EdgeImportance(run.importances(), tuple(run.visible), valid)
        hidden = None if run.hidden is None else tuple(run.hidden)
        return Recording(logits, importance, tuple(run.attention), hidden, positions)

    def masked_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        masks: Sequence[LayerEdges],
        attention: Sequence[Tensor] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """``[B, T, V]`` logits of the model with every edge multiplied by its mask in [0, 1].

        Args:
            input_ids, attention_mask: the batch.
            masks: one :class:`LayerEdges` a layer.
            attention: probabilities of the recording run; None computes the masked run's own
                (see :mod:`softtrace.runs` for the difference).
            position_ids: of packed rows, see :meth:`record`.
        """
        run = self._masked_run(input_ids, attention_mask, masks, attention, position_ids)
        return self.forward(run, input_ids)

    def _masked_run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        masks: Sequence[LayerEdges],
        attention: Sequence[Tensor] | None,
        position_ids: Tensor | None,
        checked: bool = False,
        **options: Any,
    ) -> MaskedRun:
        valid = self.valid(input_ids, attention_mask, checked=checked)
        positions = self._positions(valid, position_ids, masked=attention_mask is not None)
        return MaskedRun(self.anatomy, valid, masks, attention, positions=positions, **options)

    def masked_hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        masks: Sequence[LayerEdges],
        attention: Sequence[Tensor] | None = None,
        position_ids: Tensor | None = None,
        *,
        exact: bool = False,
    ) -> Tensor:
        """What the final norm gives in :meth:`masked_logits`, ``[B, T, d_model]``.

        Logits of a large vocabulary are the largest thing in a run; made from this in portions,
        they never exist whole. ``exact`` computes every node beside the model's own sums.
        """
        found: list[Tensor] = []
        norm = self.anatomy.readout.norm.module
        run = self._masked_run(
            input_ids, attention_mask, masks, attention, position_ids, exact=exact
        )
        handle = norm.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            self.forward(run, input_ids, **self._one_logit)
        finally:
            handle.remove()
        return found[-1]

    def exit_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        masks: Sequence[LayerEdges],
        depths: Tensor,
        places: Tensor,
        attention: Sequence[Tensor] | None = None,
        position_ids: Tensor | None = None,
        checked: bool = False,
    ) -> Tensor:
        """Logits of an early-phase masked run: masks in the first E layers, residuals above.

        Nothing but residual edges lies above E, so a position is read right there, as decoding with
        early exits reads it: constants of the layers above (biases of output projections) are not
        added. The run ends at the deepest exit, and only chosen positions reach the vocabulary.

        Args:
            input_ids, attention_mask, masks, attention, position_ids: see :meth:`masked_logits`.
            depths: ``[B, T]`` integers, E of each position, 1 to L.
            places: ``[N]`` int64, the positions that are read, as numbers into ``[B·T]``.
            checked: see :meth:`record`.

        Returns:
            ``[N, V]``.
        """
        levels, order = depths.flatten().index_select(0, places).sort(stable=True)
        layers = len(self.anatomy.layers)
        numbers = torch.arange(layers + 1, device=levels.device)
        counts = (levels == numbers[:, None]).sum(1).tolist()  # once: it waits for the device
        deepest = max(level for level, count in enumerate(counts) if count)
        counts = counts[: deepest + 1]
        whole = deepest == layers or watched(self.model)
        run = self._masked_run(
            input_ids,
            attention_mask,
            masks,
            attention,
            position_ids,
            checked,
            keep_hidden=True,
            stop=None if whole else deepest,
        )
        with suppress(DeepEnough):
            self.forward(run, input_ids, **self._one_logit)
        hidden = run.hidden or []
        read = [
            hidden[level].flatten(0, 1).index_select(0, chosen)
            for level, chosen in enumerate(torch.split(places.index_select(0, order), counts))
            if len(chosen)
        ]
        with dropout_off(self.model), uncompiled(self.model):
            logits: Tensor = self.anatomy.readout.early(torch.cat(read))
        return logits.index_select(0, order.argsort())

    def forward(self, run: Run, input_ids: Tensor, **options: int) -> Tensor:
        """``[B, T, V]`` logits of the model with ``run`` listening to every half-layer.

        Args:
            run: what listens.
            input_ids: ``[B, T]``.
            options: of the model's own forward.
        """
        inputs = forward_inputs(input_ids, run.valid, run.positions, self.forward_parameters)
        with self._running(run):
            output = self.model(**inputs, **options)
        logits: Tensor = output.logits
        return logits

    @contextmanager
    def _running(self, run: Run) -> Iterator[None]:
        """Put a run's hooks, attention and eval mode in place; take them back at exit."""
        handles: list[RemovableHandle] = []
        try:
            register(run.hooks(), handles)
            attention = self._attention_of(run, handles)
            with uncompiled(self.model), dropout_off(self.model), attention:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _attention_of(
        self, run: Run, handles: list[RemovableHandle]
    ) -> AbstractContextManager[Any]:
        if self.anatomy.route == "interface":
            return softtrace_attention_active(self._configs, run)
        asking: list[nn.Module] = []
        for modules in self.anatomy.layers:
            attention = modules.attention
            handles.append(attention.register_forward_pre_hook(lambda m, _: asking.append(m)))
            handles.append(attention.register_forward_hook(lambda m, _, out: asking.clear()))
        return interception_active(
            self._configs, run, lambda: asking[-1] if asking else None, run.valid.shape
        )


def attach(model: nn.Module) -> Instrument:
    """Prove that ``model`` is the sum of its edges, and return the instrument that runs it.

    A tiny batch is run (no gradients, no change to the global random state) and every layer must
    satisfy ``out == in + Σ edges``, also with edges masked. Attaching twice returns the same
    instrument, unless modules of the model were replaced in between: then it is proven anew. What
    is proven holds for the weights at that time; where all output projections are still zero, a
    wrong reading can fit.

    Args:
        model: a causal language model of transformers, as ``AutoModelForCausalLM`` returns it.

    Raises:
        UnsupportedModelError: names the layer and the mismatch.
        NonFiniteError: its logits are not finite, so that nothing can be proven.
    """
    model = unwrapped(model)
    known = _ATTACHED.get(model)
    if known is not None and known.fits(model):
        return known
    refuse_early(model)
    device = device_of_module(model).type
    # Autocast rounds every product, which is no mismatch of the model's layout.
    exact = torch.autocast(device, enabled=False)
    with torch.no_grad(), exact, own_forward(model), uncompiled(model), dropout_off(model):
        instrument = _proven(model)
    _ATTACHED[model] = instrument
    return instrument


def _proven(model: nn.Module) -> Instrument:
    """Take a model apart and prove that it was taken apart rightly."""
    configs = {id(config): config for config in map(_config_of, model.modules()) if config}
    inputs = tiny_inputs(model, _parameters(model), _TINY)
    valid = inputs["attention_mask"].bool()
    plain, layers = running_layers(model, lambda: _plain(model, inputs))
    check_finite(plain, "logits of the model on a tiny batch, run to attach", valid)
    allowed = tolerance(next(model.parameters()).dtype)
    anatomy = take_apart(PlainRun(model, inputs, plain, layers, tuple(configs.values()), allowed))
    instrument = Instrument(model, anatomy, tuple(configs.values()))
    try:
        instrument.verification = prove(instrument, inputs, plain)
    except UnsupportedModelError:
        if not any(modules.score_projections for modules in anatomy.layers):
            raise
        # Keys that are values too, or shared between layers, cannot be left out of masked runs.
        narrower = tuple(replace(modules, score_projections=()) for modules in anatomy.layers)
        instrument.anatomy = replace(anatomy, layers=narrower)
        instrument.verification = prove(instrument, inputs, plain)
    return instrument


def _plain(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The model's own logits ``[B, T, V]`` on a tiny batch."""
    with running(f"{type(model).__name__} does not run on a batch of token ids alone"):
        logits = getattr(model(**inputs), "logits", None)
    shape = inputs["input_ids"].shape
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(
            f"{type(model).__name__} gives logits of shape {found} for token ids {tuple(shape)}; "
            "a causal language model gives [B, T, V], one row a token (no language-model head, or "
            "logits of the last token alone?)"
        )
    return logits


def _parameters(model: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(model.forward).parameters)


def _config_of(module: nn.Module) -> PretrainedConfig | None:
    config = getattr(module, "config", None)
    return config if isinstance(config, PretrainedConfig) else None
