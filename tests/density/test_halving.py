"""Curves where memory runs out: the numbers that they have where it does not."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import softtrace
from softtrace.density.curve import DensityCurve
from softtrace.errors import InvalidInputError
from softtrace.graph import attention_maps
from softtrace.graph.batch import Batch
from softtrace.graph.edges import RowwiseEdges
from softtrace.tracing.recording import Recording
from softtrace.tracing.runner import Runner
from tests.density.test_lengths import LENGTH, THRESHOLDS, assert_same_curve, padded_batch
from tests.support.live_bytes import LiveBytes
from tests.support.tiny import tiny_model, tiny_prompt

MODEL = tiny_model("llama", dtype=torch.float64, num_hidden_layers=2)
softtrace.attach(MODEL)

Tried = tuple[int, int, bool]
"""Sequences and positions of a recording, and whether maps of all its layers were held."""


def limit(monkeypatch: pytest.MonkeyPatch, fits: Callable[[int, int, bool], bool]) -> list[Tried]:
    """Let memory run out in recordings that do not fit; what was tried is noted."""
    tried: list[Tried] = []
    record = Runner.record

    def limited(runner: Runner, batch: Batch, **options: Any) -> Recording:
        positions = batch.valid if options["positions"] is None else options["positions"]
        shape = torch.Size((len(batch.valid), 4, LENGTH, LENGTH))
        held = attention_maps.are_held(2, shape, batch.valid.device)
        tried.append((len(batch.valid), int(positions.sum()), held))
        if not fits(*tried[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return record(runner, batch, **options)

    monkeypatch.setattr(Runner, "record", limited)
    return tried


def curve(**options: Any) -> DensityCurve:
    """Of three rows, padded on either side."""
    return softtrace.density_curve(
        MODEL, *padded_batch(), THRESHOLDS, composition=True, nucleus=True, **options
    )


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage takes longer than the rest of such a test."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


@pytest.mark.parametrize(
    ("attention", "positions"),
    [("recorded", None), ("recomputed", None), ("recorded", [5, 8, -2]), ("kept", [5, 8, -2])],
)
def test_the_batch_is_halved_then_maps_are_not_held_then_positions_are_halved(
    monkeypatch: pytest.MonkeyPatch, attention: Any, positions: Any
) -> None:

    def same() -> None:
        assert_same_curve(curve(attention=attention, positions=positions), whole, 1e-11)

    whole = curve(attention=attention, positions=positions)
    with monkeypatch.context() as patch:
        tried = limit(patch, lambda rows, count, held: rows == 1)
        same()
    assert [rows for rows, *_ in tried] == [3, 1, 1, 1]
    assert all(held for *_, held in tried)
    with monkeypatch.context() as patch:
        tried = limit(patch, lambda rows, count, held: not held)
        same()
    assert [each for each in tried if not each[2]] == [(1, count, False) for count in counts(whole)]
    with monkeypatch.context() as patch:
        limit(patch, lambda rows, count, held: count <= 3)
        same()


class Budget(LiveBytes):
    """Lets an allocation fail wherever it is, once more bytes are alive than there are."""

    def __init__(self, most: int, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.most, self.error = most, error
        self.failed = 0

    def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
        self.peak = 0
        made = super().__torch_dispatch__(*args, **kwargs)
        if max(self.peak, self._alive) > self.most:
            del made
            self.failed += 1
            raise self.error()
        return made


ERRORS: tuple[Callable[[], Exception], ...] = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 B"),
)


@pytest.mark.parametrize("attention", ["recorded", "recomputed"])
def test_memory_may_run_out_anywhere(monkeypatch: pytest.MonkeyPatch, attention: Any) -> None:
    """Of less and less of it: the same numbers, then the length that would fit."""
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", 4 * LENGTH * 3)
    with LiveBytes() as live:
        whole = curve(attention=attention)
    refused = []
    for step in range(7):
        with Budget(int(live.peak * 0.75 / 2 ** (step / 1.5)), ERRORS[step % 2]) as budget:
            try:
                found = curve(attention=attention)
            except InvalidInputError as error:
                refused.append(str(error))
                continue
        assert budget.failed
        assert not refused, "what fits in less fits in more"
        assert_same_curve(found, whole, 1e-11)
        assert not any(module._forward_hooks for module in MODEL.modules())
    assert 0 < len(refused) < 6
    assert "memory ran out at one position of one sequence of" in refused[0]


def counts(measured: DensityCurve) -> list[int]:
    """Measured positions of each sequence."""
    found: list[int] = (measured.edges > 0).sum(1).tolist()
    return found


def test_a_sequence_of_which_nothing_is_measured_takes_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second one's first tokens are padding."""
    options = {"attention": "recomputed", "positions": [0, 3]}
    for exact in (False, True):
        whole = curve(**options, exact=exact)
        assert counts(whole) == [2, 0, 2]
        for fits in (lambda rows, *_: rows == 1, lambda rows, count, held: not held):
            with monkeypatch.context() as patch:
                limit(patch, fits)
                assert_same_curve(curve(**options, exact=exact), whole, 1e-11)


def test_it_is_told_which_length_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, lambda rows, count, held: False)
    message = f"one sequence of {LENGTH} tokens; allowed is what fits. Take shorter sequences"
    with pytest.raises(InvalidInputError, match=message):
        curve()


def test_the_longest_half_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Runner.record

    def limited(runner: Runner, batch: Batch, **options: Any) -> Recording:
        if batch.valid.shape[1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return record(runner, batch, **options)

    monkeypatch.setattr(Runner, "record", limited)
    with pytest.raises(InvalidInputError, match=f"of {LENGTH} tokens; 3 tokens fit here"):
        softtrace.density_curve(MODEL, tiny_prompt(LENGTH), thresholds=THRESHOLDS)


def test_runs_of_single_positions_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = curve(attention="recomputed", exact=True, positions=range(-7, -2))
    tried: list[int] = []
    masked_hidden = Runner.masked_hidden

    def limited(runner: Runner, batch: Batch, *args: Any, **options: Any) -> Any:
        tried.append(len(batch.valid))
        if len(batch.valid) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return masked_hidden(runner, batch, *args, **options)

    monkeypatch.setattr(Runner, "masked_hidden", limited)
    found = curve(attention="recomputed", exact=True, positions=range(-7, -2))
    assert_same_curve(found, whole, 1e-11)
    many = sum(counts(whole))
    assert tried[:2] == [many, many // 2]
    assert max(tried[3:]) <= 3  # what was halved stays so, also at other thresholds


@pytest.mark.parametrize(
    ("fits", "told"),
    [
        (lambda rows, length: rows == 1, "1 of them fit here"),
        (lambda rows, length: length <= 6, "one of 6 tokens fits here"),
        (lambda rows, length: False, "allowed is what fits"),
    ],
)
def test_importances_that_do_not_fit_are_refused_with_what_does(
    monkeypatch: pytest.MonkeyPatch, fits: Callable[[int, int], bool], told: str
) -> None:
    record = Runner.record

    def limited(runner: Runner, batch: Batch, **options: Any) -> Recording:
        if not fits(*batch.valid.shape):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return record(runner, batch, **options)

    monkeypatch.setattr(Runner, "record", limited)
    message = f"3 sequence\\(s\\) of {LENGTH} tokens; {told}. Take fewer"
    with pytest.raises(InvalidInputError, match=message):
        softtrace.edge_importance(MODEL, *padded_batch())


def test_importances_hold_no_maps_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = softtrace.edge_importance(MODEL, *padded_batch())
    tried = limit(monkeypatch, lambda rows, positions, held: not held)
    found = softtrace.edge_importance(MODEL, *padded_batch())
    assert [held for *_, held in tried] == [True, False]
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert isinstance(one, RowwiseEdges)
        torch.testing.assert_close(one.attention, other.attention)
