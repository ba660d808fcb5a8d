"""What the study reads of a model: against density curves of one sequence or window at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import softtrace
from softtrace.density.distortion import divergence
from softtrace.errors import InvalidInputError
from softtrace.evaluation.study.readings import (
    STUDY_SIZES,
    Readings,
    read_model,
    window_ends,
    windows_of,
)
from softtrace.evaluation.study.unigrams import Unigrams
from softtrace.graph.batch import Batch
from softtrace.graph.masks import hard_masks
from softtrace.tracing.recording import Recording
from softtrace.tracing.runner import Runner
from tests.support.tiny import VOCABULARY, tiny_model, tiny_prompt

BLOCKS = tiny_prompt(16, seed=3, batch=3)
COUNTS = torch.arange(VOCABULARY) % 7
ENDS = torch.tensor([9, 14])
LENGTHS = (4, 9)


def read(batch_size: int = 3, **options: Any) -> Readings:
    return read_model(
        tiny_model("llama"),
        BLOCKS,
        Unigrams(COUNTS, 1.0),
        first=8,
        ends=ENDS,
        lengths=LENGTHS,
        batch_size=batch_size,
        progress=lambda count: None,
        **options,
    )


@pytest.fixture(scope="module")
def readings() -> Readings:
    return read()


def test_windows_of_all_lengths_end_at_the_same_tokens() -> None:
    blocks = torch.arange(60).reshape(3, 20)  # every token is one of its kind
    ends = window_ends(20, first=10, longest=8, count=4)
    assert ends.tolist() == [10, 13, 15, 18]
    nothing = blocks.new_empty(0)
    windows = {length: windows_of(blocks, ends, length, nothing) for length in (2, 5, 8)}
    for length, found in windows.items():
        assert found.shape == (3, 4, length)
        assert torch.equal(found[..., -1], blocks[:, ends])
        assert torch.equal(found, windows[8][..., 8 - length :])  # and what is seen is nested


def test_windows_begin_as_a_text_begins() -> None:
    blocks = torch.arange(60).reshape(3, 20)
    ends = torch.tensor([7, 12])
    found = windows_of(blocks, ends, 5, torch.tensor([98, 99]))
    assert found[1].tolist() == [[98, 99, 25, 26, 27], [98, 99, 30, 31, 32]]
    assert blocks.max() == 59  # the blocks themselves are left as they are


def test_windows_are_read_with_their_beginning() -> None:
    begun, other = (read(beginning=torch.tensor(each)) for each in ([5], [6]))
    for length in LENGTHS:
        rows = windows_of(BLOCKS, ENDS, length, torch.tensor([5])).flatten(0, 1)
        curve = softtrace.density_curve(tiny_model("llama"), rows, attention="recomputed")
        expected = curve.entropy[:, -1].reshape(3, 2)
        torch.testing.assert_close(begun.windows[length].entropy, expected)
        assert not torch.equal(other.windows[length].entropy, expected)
    assert torch.equal(begun.whole.entropy, other.whole.entropy)


def test_ends_have_a_window_before_and_a_target_after() -> None:
    assert window_ends(16, first=8, longest=12, count=99).tolist() == [11, 12, 13, 14]
    assert window_ends(16, first=8, longest=4, count=1).tolist() == [8]
    with pytest.raises(InvalidInputError, match="lengths: found 16, allowed are at most 15"):
        window_ends(16, first=8, longest=16, count=2)


def test_windows_equal_curves_of_each_window_alone(readings: Readings) -> None:
    model = tiny_model("llama")
    for length in LENGTHS:
        found = readings.windows[length]
        for row in range(3):
            for place, end in enumerate(ENDS.tolist()):
                window = BLOCKS[row : row + 1, end - length + 1 : end + 1]
                curve = softtrace.density_curve(
                    model, window, composition=True, attention="recomputed"
                )
                size = float(curve.size_at(0.2)[0, -1])
                assert float(found.size[row, place]) == pytest.approx(size, rel=1e-4)
                assert float(found.area[row, place]) == pytest.approx(
                    float(curve.area()[0, -1]), rel=1e-4
                )
                assert float(found.edges[row, place]) == pytest.approx(
                    size * int(curve.edges[0, -1]), rel=1e-4
                )
                at_size = curve.at_sizes([size], curve.composition)[0, 0, -1].sum(0)
                assert float(found.attention[row, place]) == pytest.approx(
                    float(at_size[0] / at_size.sum()), rel=1e-3
                )
                with torch.no_grad():
                    logs = model(input_ids=window).logits[0, -1].log_softmax(-1)
                target = int(BLOCKS[row, end + 1])
                assert float(found.surprisal[row, place]) == pytest.approx(
                    -float(logs[target]), rel=1e-4
                )


def test_whole_sequences_equal_density_curves(readings: Readings) -> None:
    model = tiny_model("llama")
    curve = softtrace.density_curve(
        model, BLOCKS, composition=True, nucleus=True, attention="recomputed"
    )
    explained = slice(8, 15)
    torch.testing.assert_close(readings.whole.size, curve.size_at(0.2)[:, explained])
    torch.testing.assert_close(readings.whole.entropy, curve.entropy[:, explained])
    for found, values in (
        (readings.variation, None),
        (readings.composition, curve.composition),
        (readings.nucleus, curve.nucleus),
    ):
        expected = curve.at_sizes(STUDY_SIZES, values)[:, :, explained].sum(2).transpose(0, 1)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(readings.whole_at_ends().size, curve.size_at(0.2)[:, [9, 14]])


def test_unigrams_are_compared_with_masked_predictions(readings: Readings) -> None:
    model = tiny_model("llama")
    corpus = Unigrams(COUNTS, 1.0)
    with torch.no_grad():
        instrument = softtrace.attach(model)
        recording = instrument.record(instrument.batch(BLOCKS))
        full = recording.logits[:, 8:15]
        curve = softtrace.density_curve(model, BLOCKS, attention="recomputed")
        levels = []
        for tau in curve.thresholds.tolist():
            masks = hard_masks(recording.importance, tau)
            masked = instrument.masked_logits(recording.batch, masks)
            unigrams = corpus.probabilities.log().float().expand_as(masked)
            levels.append(divergence(masked, unigrams))
        levels.append(divergence(recording.logits, corpus.probabilities.log().float()))
    expected = curve.at_sizes(STUDY_SIZES, torch.stack(levels))[:, :, 8:15].sum(2).T
    torch.testing.assert_close(readings.unigram[..., 0], expected.double(), rtol=1e-4, atol=1e-4)
    # the last size is the full model
    shares = corpus.read(full.flatten(0, 1)).reshape(3, 7, 2).sum(1)
    torch.testing.assert_close(readings.unigram[:, -1], shares, rtol=1e-5, atol=1e-6)


def assert_same_readings(other: Readings, readings: Readings) -> None:
    torch.testing.assert_close(other.unigram, readings.unigram, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.composition, readings.composition, rtol=1e-4, atol=1e-3)
    pairs = [(other.whole, readings.whole)]
    pairs += [(other.windows[length], readings.windows[length]) for length in LENGTHS]
    for mine, theirs in pairs:
        for name, values in vars(theirs).items():
            torch.testing.assert_close(getattr(mine, name), values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_size_changes_no_number(readings: Readings, batch_size: int) -> None:
    assert_same_readings(read(batch_size), readings)


def test_where_memory_runs_out_positions_are_halved(
    readings: Readings, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Runner.record

    def limited(runner: Runner, batch: Batch, **options: Any) -> Recording:
        if "positions" in options and options["positions"].sum() > 3:  # not in the proof
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return record(runner, batch, **options)

    monkeypatch.setattr(Runner, "record", limited)
    monkeypatch.setattr("gc.collect", lambda: 0)  # it takes longer than the rest
    assert_same_readings(read(), readings)
