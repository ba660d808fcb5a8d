"""What the term sees of a batch: windows, each a sequence of its own, wherever padding is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from softtrace import DensityLoss
from softtrace.graph.batch import Batch, documents_of
from softtrace.loss.draws import Draw
from softtrace.loss.windows import Windows, first_token_of
from softtrace.tracing.instrument import Instrument
from tests.support.tiny import tiny_model, tiny_prompt


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What every recording run was given."""
    seen: list[Batch] = []
    record = Instrument.record

    def spy(self: Instrument, batch: Batch, **options: Any) -> Any:
        seen.append(batch)
        return record(self, batch, **options)

    monkeypatch.setattr(Instrument, "record", spy)
    return seen


def test_windows_of_padding_alone_are_never_looked_at(windows: list[Batch]) -> None:
    model, ids = tiny_model("llama"), tiny_prompt(12, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :8], mask[1, 4:] = 0, 0  # left and right
    penalty = DensityLoss(model, share=1.0, crop=4)
    windows.clear()  # attaching records too
    for step in range(4):
        term = penalty(ids, mask, step=step)
        assert term.skipped is None
    for seen in windows:
        assert seen.input_ids.shape == (1 + 1 + 3, 4)  # none of the four that are padding alone
        assert seen.valid.any(-1).all()


def test_the_term_of_a_window_is_that_of_the_window_alone() -> None:
    """No token outside has a say: the windows of a batch given as rows of their own."""
    model, ids = tiny_model("llama", dtype=torch.float64), tiny_prompt(12, batch=2)
    whole = DensityLoss(model, share=1.0, crop=4)(ids, step=3)
    alone = DensityLoss(model, share=1.0, crop=None)(ids.reshape(6, 4), step=3)
    torch.testing.assert_close(whole.loss, alone.loss)
    other = ids.clone()
    other[:, 5] = 66 - other[:, 5] + 3
    assert DensityLoss(model, share=1.0, crop=4)(other, step=3).loss != whole.loss


@pytest.mark.thorough
def test_more_share_is_less_noise_around_the_same_mean() -> None:
    """Every window has the same chance, so that the share moves the spread of the term alone."""
    model, ids = tiny_model("llama"), tiny_prompt(16, batch=4)
    found = {}
    for share in (1 / 8, 1.0):
        penalty = DensityLoss(
            model, strength=1.0, share=share, crop=4, easy_quantile=1.0, thresholds=(0.2, 0.2),
            depths=(1.0, 1.0),
        )  # fmt: skip
        terms = [penalty(ids, step=step).loss.item() for step in range(60)]
        found[share] = torch.tensor(terms)
    assert found[1.0].std() < 1e-6  # every window, one threshold, one depth
    error = found[1 / 8].std() / 60**0.5
    assert error > 0
    assert (found[1 / 8].mean() - found[1.0].mean()).abs() < 4 * error


BOS = 1


def cut(batch: Batch, window: int, rows: list[int], starts: list[int]) -> Windows:
    """Windows at given places, for a model whose texts begin with token 1."""
    drawn = Draw(
        torch.tensor(rows),
        torch.tensor(starts),
        torch.full((len(rows),), 0.1),
        torch.arange(len(rows) * window).reshape(len(rows), window) % 3 + 1,
    )
    return Windows.of(batch, drawn, window, BOS)


def test_windows_of_a_text_that_begins_with_bos_begin_with_it_too() -> None:
    ids = torch.tensor([[0, 0, BOS, 5, 6, 7, 8, 9], [BOS, 15, 16, 17, 18, 19, 0, 0], [5] * 8])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0], [1] * 8])
    labels = ids.masked_fill((mask == 0) | (ids == 7), -100)
    found = cut(Batch.of(ids, mask, labels=labels), 4, [0, 0, 1, 1, 2], [0, 4, 0, 4, 4])
    batch = found.batch
    assert batch.input_ids.tolist() == [
        [BOS, 0, 0, BOS, 5],  # its own stands in it
        [BOS, 6, 7, 8, 9],
        [BOS, BOS, 15, 16, 17],
        [BOS, 18, 19, 0, 0],
        [BOS, 5, 5, 5, 5],
    ]
    assert batch.valid.int().tolist() == [
        [0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1],
    ]  # fmt: skip
    assert batch.targets.tolist() == [
        [-100, -100, -100, 5, 6],
        [-100, -100, 8, 9, -100],
        [-100, 15, 16, 17, 18],
        [-100, 19, -100, -100, -100],
        [-100, 5, 5, 5, -100],
    ]
    assert torch.equal(batch.counted, batch.targets >= 0)
    assert not batch.counted[:, 0].any()
    assert found.depths.shape == (5, 5)
    assert torch.equal(found.depths[:, 1:], torch.arange(20).reshape(5, 4) % 3 + 1)


def test_windows_of_packed_rows_continue_the_document_that_they_cut() -> None:
    ids = torch.tensor([[5, 6, 7, BOS, 15, 16, 17, 18, BOS, 25, 26, 27]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3]])
    batch = Batch.of(ids, None, positions)
    batch = cut(batch, 4, [0, 0, 0, 0], [1, 5, 8, 3]).batch
    assert batch.packed
    assert batch.valid.all()  # packed rows can have no padding
    assert batch.input_ids[:, 1:].tolist() == [
        [6, 7, BOS, 15], [16, 17, 18, BOS], [BOS, 25, 26, 27], [BOS, 15, 16, 17],
    ]  # fmt: skip
    assert batch.positions is not None
    assert documents_of(batch.positions).tolist() == [
        [0, 1, 1, 2, 2],  # a document that did not begin with it: it stands alone
        [0, 0, 0, 0, 1],
        [0, 1, 1, 1, 1],
        [0, 1, 1, 1, 1],
    ]
    assert not batch.counted[:, 0].any()
    assert batch.counted[:, 1:].all()


def test_nothing_is_put_in_front_where_no_text_begins_so() -> None:
    batch = Batch.of(torch.tensor([[5, BOS, 6, 7], [BOS, 6, 7, 8]]))
    assert cut(batch, 2, [0, 0], [0, 2]).batch.input_ids.tolist() == [[5, BOS], [6, 7]]
    assert cut(batch, 2, [1], [0]).batch.input_ids.tolist() == [[BOS, 6]]
    assert cut(batch, 2, [1], [2]).batch.input_ids.tolist() == [[BOS, 7, 8]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_term_predicts_as_the_model_does_with_bos_in_front(
    monkeypatch: pytest.MonkeyPatch, family: str, packed: bool
) -> None:
    model = tiny_model(family, dtype=torch.float64)
    model.config.get_text_config().bos_token_id = BOS
    ids = tiny_prompt(12, batch=2)
    ids[:, 0] = BOS
    positions = torch.arange(12).expand(2, 12) % 6 if packed else None
    if packed:
        ids[:, 6] = BOS
    seen: list[tuple[Batch, torch.Tensor]] = []
    record = Instrument.record

    def spy(self: Instrument, batch: Batch, **options: Any) -> Any:
        recording = record(self, batch, **options)
        seen.append((batch, recording.logits))
        return recording

    penalty = DensityLoss(model, share=1.0, crop=3)
    monkeypatch.setattr(Instrument, "record", spy)
    term = penalty(ids, position_ids=positions)
    assert term.distortion is not None
    assert term.distortion > 0
    ((batch, logits),) = seen
    begun = 0
    for row, valid, found in zip(batch.input_ids, batch.valid, logits, strict=True):
        if packed or row[1] == BOS:
            continue
        assert row[0] == BOS
        assert valid.all()
        torch.testing.assert_close(found, model(row[None]).logits[0])
        begun += 1
    assert packed or begun == 6


def test_the_first_token_is_the_text_configs() -> None:
    model = tiny_model("llama")
    model.config.bos_token_id = 7
    assert first_token_of(model) == 7
    model.config.bos_token_id = None
    assert first_token_of(model) is None
    assert first_token_of(torch.nn.Linear(1, 1)) is None


def test_a_token_ahead_of_a_hole_has_a_position_that_there_is() -> None:
    ids, mask = torch.tensor([[BOS, 4, 5, 6, 7, 8]]), torch.tensor([[1, 1, 0, 1, 1, 1]])
    batch = Batch.of(ids, mask, position_ids=torch.arange(3, 9)[None])
    drawn = Draw(torch.tensor([0]), torch.tensor([2]), torch.tensor([0.1]), torch.ones(1, 4).long())
    begun = Windows.of(batch, drawn, 4, BOS).batch
    assert begun.input_ids.tolist() == [[BOS, 5, 6, 7, 8]]
    assert begun.positions is not None
    assert begun.positions.tolist() == [[0, 0, 6, 7, 8]]
