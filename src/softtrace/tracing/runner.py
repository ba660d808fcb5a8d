"""Recording and masked runs on an unmodified transformers model that was taken apart.

Nothing is installed between runs. Hooks, the attention implementation and eval mode are put in
place around each run of ours and taken back after it, also after an exception; the user's own
forward, attention kernel, checkpointing and compiled code never meet them. Threads that measure one
model take turns, run by run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from softtrace.anatomy.anatomy import Anatomy
from softtrace.anatomy.discovery import tiny_batch
from softtrace.errors import InvalidInputError, UnsupportedModelError
from softtrace.graph.attention_maps import AttentionMap, HeldMap, chunk_elements
from softtrace.graph.batch import Batch, check_finite, check_length
from softtrace.graph.edges import EdgeImportance, LayerEdges
from softtrace.graph.importance import Norm
from softtrace.model.alone import alone
from softtrace.model.attention_interception import interception_active
from softtrace.model.attention_interface import softtrace_attention_active
from softtrace.model.exit_maps import exit_maps_of
from softtrace.model.hooks import Hook, registered, watched
from softtrace.model.sharding import among_forwards, note_units
from softtrace.model.sharding import run as run_model
from softtrace.model.state import as_written, dropout_off, uncompiled
from softtrace.model.wrappers import one_logit
from softtrace.tracing.masking import MaskedRun
from softtrace.tracing.means import LayerMeans, MeanMaskedRun, MeansRun
from softtrace.tracing.recording import Recording, RecordingRun
from softtrace.tracing.run import DeepEnough, Run
from softtrace.tracing.turns import Kind, in_turns, turn_of

_LOGITS = "logits of the full model"


@dataclass(frozen=True, eq=False, repr=False)
class Runner:
    """Runs a model that was taken apart. :class:`softtrace.Instrument` is one that was proven.

    Attributes:
        reference: to the model, which is not kept alive by it.
        anatomy: which module computes which edge.
        configs: of the model and its modules, in which attention is switched during a run.
        forward_parameters: names that the model's forward takes.
    """

    reference: weakref.ref[nn.Module]
    anatomy: Anatomy
    configs: tuple[PretrainedConfig, ...]
    forward_parameters: tuple[str, ...]

    @property
    def model(self) -> nn.Module:
        """The model itself.

        Raises:
            UnsupportedModelError: it was deleted.
        """
        model = self.reference()
        if model is None:
            raise UnsupportedModelError(
                "the attached model no longer exists; hold it as long as its instrument is used"
            )
        return model

    def batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Batch:
        """The checked batch that all runs take.

        Arguments are those of :meth:`softtrace.graph.batch.Batch.of`.

        Raises:
            InvalidInputError: what that and :meth:`check` refuse.
        """
        batch = Batch.of(input_ids, attention_mask, position_ids)
        self.check(batch)
        return batch

    def check(self, batch: Batch) -> None:
        """Check a batch against the model.

        Raises:
            InvalidInputError: ids outside the vocabulary, a mask of other values than 0 and 1,
                padding before real tokens where the model looks at it, more tokens than it has
                learned positions.
        """
        batch.check_values(self.anatomy.vocabulary)
        valid, limit = batch.valid, self.anatomy.positions
        if self.anatomy.looks_at_padding and bool((~valid[:, :-1] & valid[:, 1:]).any()):
            raise InvalidInputError(
                "attention_mask: padding stands before real tokens, and this model's attention "
                "looks at it all the same; pad on the right, or not at all"
            )
        if limit is None:
            return
        longest = int(valid.sum(-1).max())
        if "position_ids" not in self.forward_parameters:
            longest = valid.shape[1]  # its own code numbers the columns
        elif batch.positions is not None:
            longest = int(batch.positions[valid].max()) + 1
        check_length(longest, limit)

    def record(
        self,
        batch: Batch,
        *,
        keep_hidden: bool = False,
        keep_attention: bool = True,
        norm: Norm = "l1",
        static: bool = False,
        positions: Tensor | None = None,
        keep_logits: bool = True,
    ) -> Recording:
        """Run the full model and measure every edge; differentiable unless gradients are off.

        Args:
            batch: from :meth:`batch`, or a part of one.
            keep_hidden: also keep the residual stream at every layer.
            keep_attention: keep the attention probabilities, which masked runs need.
            norm: how large an edge is, see :data:`softtrace.graph.importance.Norm`.
            static: read nothing from the device, so that a CUDA graph can capture the run; logits
                and packed documents are not checked then.
            positions: ``[B, T]`` bool, of which alone logits are made; None for all.
            keep_logits: keep the logits; otherwise they are checked in portions, and none are kept.

        Raises:
            NonFiniteError: a logit at a real token is NaN or infinite.
        """
        run = RecordingRun(self.anatomy, batch, keep_hidden, keep_attention, norm, static=static)
        if not keep_logits:
            logits = self._checked_logits(run, batch.valid if positions is None else positions)
        elif positions is None:
            logits = self.forward(run)
        else:
            logits = self.anatomy.readout.logits(self._read_by_head(run)[positions])
        if keep_logits and not static:
            valid = batch.valid if positions is None else None
            check_finite(logits.detach(), _LOGITS, valid)
        importance = EdgeImportance(run.importances(), tuple(run.visible), batch.valid)
        hidden = None if run.hidden is None else tuple(run.hidden)
        attention = tuple(
            each.values if isinstance(each, HeldMap) else each for each in run.attention
        )
        return Recording(batch, logits, importance, attention, hidden, positions)

    def _checked_logits(self, run: Run, places: Tensor) -> Tensor:
        """No logits, ``[0, V]``, of a run whose logits at some places ``[B, T]`` bool are finite.

        Of a long text they are more than all else that a run holds.
        """
        read = self._read_by_head(run).detach()[places]
        most = chunk_elements(read.device) // self.anatomy.vocabulary
        with torch.no_grad():
            for part in torch.split(read, max(1, most)):
                logits: Tensor = self.anatomy.readout.logits(part)
                check_finite(logits, _LOGITS)
        return logits[:0].clone()

    def masked_logits(
        self,
        batch: Batch,
        masks: Sequence[LayerEdges],
        attention: Sequence[Tensor | AttentionMap] | None = None,
    ) -> Tensor:
        """``[B, T, V]`` logits of the model with every edge multiplied by its mask in [0, 1].

        Args:
            batch: from :meth:`batch`, or that of a recording.
            masks: one :class:`LayerEdges` a layer.
            attention: probabilities of the recording run; None computes the masked run's own
                (see :mod:`softtrace.tracing.masking` for the difference).
        """
        return self.forward(MaskedRun(self.anatomy, batch, masks, attention))

    def masked_hidden(
        self,
        batch: Batch,
        masks: Sequence[LayerEdges],
        attention: Sequence[Tensor | AttentionMap] | None = None,
        *,
        exact: bool = False,
        means: Sequence[LayerMeans] | None = None,
    ) -> Tensor:
        """What the final norm gives in :meth:`masked_logits`, ``[B, T, d_model]``.

        Logits of a large vocabulary are the largest thing in a run; made from this in portions,
        they never exist whole. ``exact`` computes every node beside the model's own sums; ``means``
        (:meth:`means_of`) stand in for absent edges.
        """
        return self._read_by_head(
            MaskedRun(self.anatomy, batch, masks, attention, exact=exact)
            if means is None
            else MeanMaskedRun(self.anatomy, batch, masks, means, attention)
        )

    def _read_by_head(self, run: Run) -> Tensor:
        """``[B, T, d_model]``, what the final norm gives in a run of which no logits are made."""
        found: list[Tensor] = []
        norm = self.anatomy.readout.norm.module
        listen = norm.register_forward_hook
        with alone(self.model), listen(lambda module, args, output: found.append(output)):
            self.forward(run, **one_logit(self.forward_parameters))
        return found[-1].to(run.valid.device)

    @torch.no_grad()
    def means_of(self, batches: Iterable[Batch]) -> tuple[LayerMeans, ...]:
        """Means of what every edge carries over the real tokens of a text, one a layer.

        Args:
            batches: from :meth:`batch`, at least one.
        """
        totals: list[dict[str, Tensor]] = [{} for _ in self.anatomy.layers]
        tokens, run = 0, None
        for batch in batches:
            run = MeansRun(self.anatomy, batch)
            self.forward(run, **one_logit(self.forward_parameters))
            tokens += int(batch.valid.sum())
            for total, found in zip(totals, run.sums, strict=True):
                for name, values in found.items():
                    total[name] = values + total.get(name, 0)
        if run is None or not tokens:
            raise InvalidInputError("means: found no real token; give a text to take them over")
        return tuple(run.means(layer, total, tokens) for layer, total in enumerate(totals))

    def exit_logits(
        self,
        batch: Batch,
        masks: Sequence[LayerEdges],
        depths: Tensor,
        places: Tensor,
        attention: Sequence[Tensor | AttentionMap] | None = None,
        *,
        static: bool = False,
    ) -> Tensor:
        """Logits of an early-phase masked run: masks in the first E layers, residuals above.

        Nothing but residual edges lies above E, so a position is read right there, as decoding with
        early exits reads it: constants of the layers above (biases of output projections) are not
        added. The run ends at the deepest exit, and only chosen positions reach the vocabulary.

        Args:
            batch, masks, attention: see :meth:`masked_logits`.
            depths: ``[B, T]`` integers, E of each position, 1 to L.
            places: ``[N]`` int64, the positions that are read, as numbers into ``[B·T]``.
            static: read nothing from the device, so that a CUDA graph can capture the run: all
                layers run, and all MLPs on all tokens.

        Returns:
            ``[N, V]``.
        """
        if static:
            return self._exit_logits_static(batch, masks, depths, places, attention)
        levels, order = depths.flatten().index_select(0, places).sort(stable=True)
        layers = len(self.anatomy.layers)
        numbers = torch.arange(layers + 1, device=levels.device)
        counts = (levels == numbers[:, None]).sum(1).tolist()  # once: it waits for the device
        deepest = max(level for level, count in enumerate(counts) if count)
        counts = counts[: deepest + 1]
        whole = deepest == layers or watched(self.model)
        run = MaskedRun(
            self.anatomy,
            batch,
            masks,
            attention,
            keep_hidden=True,
            stop=None if whole else deepest,
        )
        with suppress(DeepEnough):
            self.forward(run, **one_logit(self.forward_parameters))
        hidden = run.hidden or []
        read = [
            hidden[level].flatten(0, 1).index_select(0, chosen)
            for level, chosen in enumerate(torch.split(places.index_select(0, order), counts))
            if len(chosen)
        ]
        with alone(self.model), dropout_off(self.model), uncompiled(self.model):
            logits: Tensor = self.anatomy.readout.early(torch.cat(read))
        return logits.index_select(0, order.argsort())

    def read_exit(self, hidden: Tensor, depth: int) -> Tensor:
        """Logits of the exit after so many layers, ``[..., V]``, of the stream there.

        Through the map that the model has for this exit, if it has one
        (:mod:`softtrace.model.exit_maps`).
        """
        with alone(self.model):
            return self.anatomy.readout.early(self.exit_stream(hidden, depth))

    def exit_stream(self, hidden: Tensor, depth: int) -> Tensor:
        """That stream as the final norm reads it, through the exit's map if there is one."""
        maps = exit_maps_of(self.model)
        return hidden if maps is None else maps(hidden, depth)

    def _exit_logits_static(
        self,
        batch: Batch,
        masks: Sequence[LayerEdges],
        depths: Tensor,
        places: Tensor,
        attention: Sequence[Tensor | AttentionMap] | None,
    ) -> Tensor:
        run = MaskedRun(self.anatomy, batch, masks, attention, keep_hidden=True, static=True)
        self.forward(run, **one_logit(self.forward_parameters))
        hidden = torch.stack(run.hidden or []).flatten(0, 2)
        levels = depths.flatten().index_select(0, places)
        read = hidden.index_select(0, levels * depths.numel() + places)
        with alone(self.model), dropout_off(self.model), uncompiled(self.model):
            logits: Tensor = self.anatomy.readout.early(read)
        return logits

    def forward(self, run: Run, **options: int) -> Tensor:
        """``[B, T, V]`` logits of the model with ``run`` listening to every half-layer.

        Args:
            run: what listens, to the forward of its own batch.
            options: of the model's own forward.
        """
        inputs = run.batch.forward_inputs(self.forward_parameters)
        kind: Kind = "recording" if isinstance(run, RecordingRun) else "masked"
        with alone(self.model), turn_of(self.model, kind), self._running(run):
            output = run_model(self.model, **inputs, **options)
        logits: Tensor = output.logits
        return logits

    def in_turns(self, norm: Norm = "l1") -> AbstractContextManager[None]:
        """Let each process run a model that is sharded as often as it needs to; all come here.

        Of a model that is whole nothing happens. See :func:`softtrace.tracing.turns.in_turns`.

        Args:
            norm: of recordings, the same in all processes.
        """
        model, readout = self.model, self.anatomy.readout

        def recording() -> None:
            self.record(tiny_batch(model, 4), keep_attention=False, norm=norm, keep_logits=False)

        def masked() -> None:  # masks are no weights
            inputs = tiny_batch(model, 4).forward_inputs(self.forward_parameters)
            with turn_of(model, "masked"), as_written(model):
                run_model(model, **inputs)

        stand_ins: dict[Kind, Callable[[], None]] = {"recording": recording, "masked": masked}
        return in_turns(model, (readout.norm.module, readout.head), stand_ins)

    @contextmanager
    def _running(self, run: Run) -> Iterator[None]:
        """Put a run's hooks, attention and eval mode in place; take them back at exit."""
        note_units(self.model)
        hooks, attention = run.hooks(), self._attention_of(run)
        with registered(hooks), as_written(self.model), attention, among_forwards(self.model):
            yield

    @contextmanager
    def _attention_of(self, run: Run) -> Iterator[None]:
        if self.anatomy.route == "interface":
            with softtrace_attention_active(self.configs, run):
                yield
            return
        asking: list[nn.Module] = []
        hooks = []
        for modules in self.anatomy.layers:
            hooks += [
                Hook(modules.attention, lambda module, *_: asking.append(module), before=True),
                Hook(modules.attention, lambda *_: asking.clear(), before=False),
            ]

        def asked() -> nn.Module | None:
            return asking[-1] if asking else None

        with registered(hooks), interception_active(self.configs, run, asked, run.valid.shape):
            yield
