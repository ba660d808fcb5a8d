"""Decomposition of a layer into what adds up, from what it was seen to do.

A layer is taken apart by what adds up: some module's output is what attention adds, some other's is
what the MLP adds, and entry plus these, each times a multiplier, must give what the layer gave. The
pattern names what was found; no class and no attribute of a model is on a list.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softtrace.anatomy.anatomy import LayerModules, effective_projection
from softtrace.anatomy.norms import LinearNorm, linear_norm
from softtrace.anatomy.patterns import Evidence, name_of
from softtrace.anatomy.refusals import NOT_MADE_FOR_IT
from softtrace.anatomy.tolerances import ROUNDINGS, mismatch, rounding, unit
from softtrace.anatomy.watch import Attended, Call, Candidate, LayerSight, rows_of
from softtrace.errors import UnsupportedModelError
from softtrace.libraries import first_line

_LARGEST = 16.0  # a residual multiplier; larger integers are sizes
_SCORES = ("q_proj", "k_proj")
"""What makes queries and keys. A wrong guess costs time, not correctness: the proof finds it."""


def decompose(
    index: int, sight: LayerSight, valid: Tensor, allowed: float
) -> tuple[str, LayerModules]:
    """Take one layer apart.

    Args:
        index: of the layer, for messages.
        sight: notes of a watched run.
        valid: ``[B, T]`` bool.
        allowed: largest relative mismatch.

    Returns:
        The pattern's name and the modules.

    Raises:
        UnsupportedModelError: what is missing, or that nothing adds up.
    """
    where = f"layer {index} ({type(sight.layer).__name__})"
    if sight.output is None:
        raise UnsupportedModelError(f"{where}: it did not run to its end")
    attended = _only_attention(sight, valid, where)
    search = _Search(sight, valid, allowed, where)
    projection, width = search.projection(attended)
    found = search.sequential(projection) or search.parallel(projection)
    if found is None:
        raise UnsupportedModelError(
            f"{where}: the node is not the sum of its edges: {search.why()}"
        )
    return search.describe(attended, projection, width, found)


def _only_attention(sight: LayerSight, valid: Tensor, where: str) -> Attended:
    if len(sight.attention) == 1:
        tokens = valid[:, :, None] & valid[:, None, :]
        if bool((sight.attention[0].visible & tokens).triu(1).any()):
            raise UnsupportedModelError(
                f"{where}: a token sees later ones; allowed are causal language models (set "
                "config.is_decoder=True where a model can be either)"
            )
        return sight.attention[0]
    if sight.attention:
        raise UnsupportedModelError(
            f"{where}: attention was asked for {len(sight.attention)} times; the graph has one "
            "attention sub-block a layer"
        )
    parts = ", ".join(sorted({type(c.module).__name__ for c in sight.calls if c.depth == 0}))
    raise UnsupportedModelError(
        f"{where}: no softmax attention was seen in it (its parts: {parts}). State-space, "
        "convolutional and linear-attention layers have no edge for each source token, and "
        "attention inside a fused kernel cannot be seen"
    )


@dataclass(frozen=True)
class _Sum:
    """Parts that add up: what attention adds, who reads the sum, what the MLP adds."""

    attention: Candidate
    attention_scale: float
    readers: tuple[Candidate, ...]
    mlp: tuple[Candidate, ...]
    mlp_scale: float


class _Search:
    """Looks for modules of one layer whose outputs add up."""

    def __init__(self, sight: LayerSight, valid: Tensor, allowed: float, where: str) -> None:
        self.sight, self.where = sight, where
        self.kept = valid.flatten()
        self.allowed = allowed
        self.closest = float("inf")
        seen = Counter(id(call.module) for call in sight.calls)
        # A module that ran twice in one layer cannot be told apart by a hook.
        once = [call for call in sight.calls if seen[id(call.module)] == 1]
        self.candidates = [Candidate.of(call, sight, self.kept) for call in once]
        self.scales = (1.0, *_multipliers(sight.layer))
        self.entry = self._rows(sight.entry)
        assert sight.output is not None
        self.output = self._rows(sight.output)

    def _rows(self, values: Tensor) -> Tensor:
        rows = rows_of(values, self.sight)
        if rows is None:
            raise UnsupportedModelError(
                f"{self.where}: it reads {tuple(self.sight.entry.shape)} and gives "
                f"{tuple(values.shape)}; a residual stream keeps its shape"
            )
        return rows[self.kept]

    def _near(self, found: Tensor, wanted: Tensor, magnitude: Tensor) -> list[int]:
        """Indices of those ``found`` ``[n, rows, d]`` that are ``wanted`` but for rounding."""
        errors = ((found - wanted).abs() / unit(wanted, magnitude)).flatten(1).amax(1)
        return (torch.nan_to_num(errors, nan=torch.inf) <= ROUNDINGS).nonzero()[:, 0].tolist()

    def projection(self, attended: Attended) -> tuple[Candidate, int]:
        """The first affine module that reads the mixed heads, and their width."""
        mixed = _mixed(attended)
        width = mixed.shape[-1]
        reading = [
            call
            for call in self.candidates
            if call.begin > attended.at
            and call.read is not None
            and call.read.numel() == mixed.numel()
            and mismatch(call.read.reshape(mixed.shape)[self.kept], mixed[self.kept])
            <= self.allowed
        ]
        misses = []
        for call in sorted(reading, key=lambda each: each.begin):  # an adapter before its base
            if rows_of(call.gave, self.sight) is None:
                misses.append(f"{call.name} gives no vector of the residual's width")
                continue
            try:
                weight, bias = effective_projection(call.module, width, mixed.dtype)
            except NOT_MADE_FOR_IT as error:
                misses.append(f"{call.name} ({type(call.module).__name__}): {first_line(error)}")
                continue
            assert call.gave is not None
            expected = mixed @ weight.to(mixed.dtype) + (0 if bias is None else bias)
            gave = call.gave.reshape(self.sight.rows, -1)
            miss = mismatch(expected[self.kept].to(gave.dtype), gave[self.kept])
            if miss <= self.allowed:
                return call, width
            misses.append(f"{call.name} is not affine (mismatch {miss:.2g})")
        seen = "; ".join(misses) or "no module reads them as they are"
        raise UnsupportedModelError(
            f"{self.where}: no output projection was found for the mixed heads of "
            f"{type(attended.module).__name__} ({seen}). The graph needs A·V·W_O with a W_O for "
            "each head: a gate, a norm or values shared in a latent between heads break that"
        )

    def sequential(self, projection: Candidate) -> _Sum | None:
        """Entry + attention is read by a later module; that + MLP is what the layer gave."""
        for call, scale in self._adders(projection):
            later = [c for c in self.candidates if c.begin > call.end]
            if not later:
                continue
            middle = self.entry + scale * call.gave_rows
            size = self.entry.abs() + (scale * call.gave_rows).abs()
            near = self._near(torch.stack([c.read_rows for c in later]), middle, size)
            reading = [later[i] for i in near]
            readers = [c for c in reading if not any(_inside(c, outer) for outer in reading)]
            if not readers:
                continue
            # Where a norm changes little, who reads what it gave is near the node, too.
            earliest = min(readers, key=lambda c: c.begin)
            readers = [
                c for c in readers
                if _equal(c.read_rows, earliest.read_rows)
                or not any(_equal(c.read_rows, other.gave_rows) for other in readers)
            ]  # fmt: skip
            # as a reader has it, so that its rounding is not counted twice
            node, first = earliest.read_rows, earliest.begin
            found = self._rest(node, [c for c in self.candidates if c.begin >= first])
            if found is not None:
                return _Sum(call, scale, tuple(readers), *found)
        return None

    def parallel(self, projection: Candidate) -> _Sum | None:
        """Entry + attention + MLP is what the layer gave."""
        for call, scale in self._adders(projection):
            partial = self.entry + scale * call.gave_rows
            others = [
                c
                for c in self.candidates
                if not _inside(c, call) and not _inside(call, c) and c != call
            ]
            found = self._rest(partial, others)
            if found is not None:
                return _Sum(call, scale, (), *found)
        return None

    def _adders(self, projection: Candidate) -> Iterator[tuple[Candidate, float]]:
        """What attention may add, outermost first: the projection's output, or what came of it."""
        found = [projection]
        for call in sorted(self.candidates, key=lambda c: c.end):
            reads = any(_same(call.read_rows, each.gave_rows) for each in found)
            if call is not projection and (_inside(projection, call) or reads):
                found.append(call)
        for scale in self.scales:
            for call in self._outermost(found):
                if rows_of(call.gave, self.sight) is not None:
                    yield call, scale

    def _rest(
        self, partial: Tensor, calls: list[Candidate]
    ) -> tuple[tuple[Candidate, ...], float] | None:
        """One call, or two children that read the same, whose output closes the sum."""
        if not calls:
            return None
        gave = torch.stack([call.gave_rows for call in calls])  # compared in one go, not one by one
        for scale in self.scales:
            sums = partial + scale * gave
            miss = (sums - self.output).abs().flatten(1).amax(1).nan_to_num(nan=torch.inf)
            largest = self.output.abs().max().clamp_min(1e-30)
            self.closest = min(self.closest, *(miss / largest).tolist(), 1e30)
            size = partial.abs() + (scale * gave).abs()
            near = self._near(sums, self.output, size + self.entry.abs())
            if near:
                return (self._outermost([calls[i] for i in near])[0],), scale
        children = [call for call in calls if call.depth == 0]
        for scale in self.scales:
            for first, second in itertools.combinations(children, 2):
                if not _same(first.read_rows, second.read_rows):
                    continue  # one that reads what the other added is no part of the same edge
                total = partial + scale * (first.gave_rows + second.gave_rows)
                parts = first.gave_rows.abs() + second.gave_rows.abs()
                size = partial.abs() + abs(scale) * parts + self.entry.abs()
                if self._near(total[None], self.output, size):
                    return (first, second), scale
        return None

    @staticmethod
    def _outermost(calls: list[Candidate]) -> list[Candidate]:
        return sorted(calls, key=lambda call: (call.depth, call.begin))

    def why(self) -> str:
        """What is known of a layer in which nothing added up."""
        same = [c for c in self.candidates if _same(c.gave_rows, self.output)]
        for call in same:
            try:
                linear_norm(call.module, call.read_rows, self.allowed)
            except (UnsupportedModelError, *NOT_MADE_FOR_IT):
                continue
            return (
                f"what it gives is the output of a norm, {call.name}. A norm of the residual "
                "stream itself (post-LN, as in BERT) leaves no residual edge to mask"
            )
        miss = "" if self.closest > 1e29 else f" by {self.closest:.2g} at best"
        return (
            "entry plus an output of attention plus an output of another module, each times a "
            f"multiplier, misses what the layer gave{miss} (allowed {self.allowed:.0e}). It does "
            "something else with its residual stream (a gate, a second stream, another mixer)"
        )

    def describe(
        self, attended: Attended, projection: Candidate, width: int, found: _Sum
    ) -> tuple[str, LayerModules]:
        """Name the pattern and put the modules together."""
        norm = self._norm_after(projection, found.attention)
        token_wise = self._token_wise(found)
        by_name = {call.name: call for call in self.sight.calls}
        attention_call = next((c for c in self.candidates if c.module is attended.module), None)
        outer = [by_name.get(c.name.rpartition(".")[0]) for c in (found.attention, *found.mlp)]
        evidence = Evidence(
            parallel=not found.readers,
            before=self._norm_before(attention_call),
            after=norm is not None,
            multiplied=found.attention_scale != 1 or found.mlp_scale != 1,
            inside=any(call is not None and not self._passes(call, found) for call in outer),
            bare=not token_wise and all(call.depth == 0 for call in found.mlp),
        )
        children = dict(attended.module.named_children())
        return name_of(evidence), LayerModules(
            layer=self.sight.layer,
            attention=attended.module,
            projection=projection.module,
            width=width,
            dtype=self.entry.dtype,
            attention_out=found.attention.module,
            attention_norm=norm,
            attention_scale=found.attention_scale,
            middle=tuple(call.module for call in found.readers),
            mlp_out=tuple(call.module for call in found.mlp),
            mlp_scale=found.mlp_scale,
            token_wise=token_wise,
            score_projections=tuple(children[name] for name in _SCORES if name in children),
        )

    def _norm_after(self, projection: Candidate, attention: Candidate) -> LinearNorm | None:
        raw, added = projection.gave_rows, attention.gave_rows
        if _same(added, raw):
            return None
        read = attention.read_rows
        if _same(read, raw):
            try:
                return linear_norm(attention.module, raw, self.allowed)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(
                    f"{self.where}: {attention.name}, between attention's projection and the "
                    f"sum: {error}"
                ) from error
        raise UnsupportedModelError(
            f"{self.where}: {attention.name} gives what attention adds, but does not read what the "
            "output projection gave; the edges of its heads cannot be followed through it"
        )

    def _norm_before(self, attention: Candidate | None) -> bool:
        """Whether another child gave what attention read (a norm, which may change nothing)."""
        if attention is None:
            return True
        reads = attention.read_rows
        return any(
            call.depth == 0 and call.end < attention.begin and _same(call.gave_rows, reads)
            for call in self.candidates
        )

    def _passes(self, outer: Call, found: _Sum) -> bool:
        """Whether a module around an adder gives just what is added, not the sum."""
        gave = rows_of(outer.gave, self.sight)
        if gave is None:
            return True
        gave = gave[self.kept]
        attention = found.attention.gave_rows * found.attention_scale
        sums = (self.entry + attention, self.output)
        return not any(_same(gave, each) for each in sums)

    def _token_wise(self, found: _Sum) -> tuple[nn.Module, ...]:
        """Modules that hold the whole MLP: they read the node, normed or not, and give its output.

        Empty where the MLP is no module of its own.
        """
        node = found.readers[0].read_rows if found.readers else self.entry
        readers = found.readers or tuple(
            c for c in self.candidates if c.depth == 0 and _same(c.read_rows, node)
        )
        sources = [node, *(c.gave_rows for c in readers)]
        whole = []
        for call in found.mlp:
            candidates = [call] + [
                c
                for c in self.candidates
                if c.depth == 0 and c.end < call.begin and _same(c.gave_rows, call.read_rows)
            ]
            fits = [
                c.module
                for c in candidates
                if any(_same(c.read_rows, s) for s in sources)
                and any(True for _ in c.module.children())  # a norm has none
            ]
            if not fits:
                return ()
            whole.append(fits[0])
        return tuple(whole)


def _mixed(attended: Attended) -> Tensor:
    """``[B · T, H · d_head]``: what attention gives its projection."""
    batch, heads, length, sources = attended.probabilities.shape
    value = attended.value
    grouped = attended.probabilities.to(value.dtype).reshape(batch, value.shape[1], -1, sources)
    mixed = (grouped @ value).reshape(batch, heads, length, -1)
    return mixed.transpose(1, 2).reshape(batch * length, -1)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are copies of each other, but for rounding."""
    return rounding(one, other) <= ROUNDINGS


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _inside(inner: Call, outer: Call) -> bool:
    return outer.begin < inner.begin and inner.end < outer.end


def _multipliers(layer: nn.Module) -> Sequence[float]:
    """Numbers that the layer keeps as attributes: a residual multiplier is one of them."""
    numbers = [
        float(value)
        for value in vars(layer).values()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return sorted({value for value in numbers if 0 < abs(value) <= _LARGEST and value != 1})
