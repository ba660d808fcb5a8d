"""Why no exit is read: what really happened is said, once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from softtrace import DensityLoss
from softtrace.errors import InvalidInputError
from softtrace.loss.early_exits import MIXED
from tests.support.tiny import tiny_model, tiny_prompt

OPTIONS: dict[str, Any] = {"strength": 0.7, "exits": 0.4}
REST = ", or set exits=0, exit_map=False"


def batch(length: int = 12) -> tuple[Tensor, Tensor]:
    ids = tiny_prompt(length, 0, 4)
    return ids, torch.ones_like(ids)


def test_a_forward_that_nobody_watched_or_that_has_no_gradients(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    density = DensityLoss(model, **OPTIONS)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert density(ids, mask).exit_distance is None
            with density.watching(), torch.no_grad():
                model(input_ids=ids, attention_mask=mask)
            assert density(ids, mask).exit_distance is None
    assert [record.message for record in caplog.records] == [
        "exits: no forward was watched, so none is read early; run it inside "
        f"'with density_loss.watching():'{REST}",
        "exits: the forward that was watched ran without gradients, so none is read early; run it "
        f"with gradients{REST}",
    ]
    caplog.clear()
    DensityLoss(model, strength=0.7, exits=0.0)(ids, mask)
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "mixed"),
    [
        ({}, True),
        ({"use_cache": False}, False),
        ({"use_cache": False, "attention_mask": torch.ones(4, 12, dtype=torch.int64)}, True),
        ({"attention_mask": torch.ones(4, 1, 12, 12, dtype=torch.bool).tril()}, False),
    ],
)
def test_packed_rows_that_a_forward_reads_as_one_document(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any], mixed: bool
) -> None:
    """A mask of more dimensions may keep documents apart itself."""
    model, (ids, _) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    density, packed = DensityLoss(model, **OPTIONS), torch.arange(12).expand(4, 12) % 6
    others = ids.clone()
    others[:, :6] = others[:, :6].flip(1)
    with torch.no_grad():
        first, second = (
            model(input_ids=each, position_ids=packed, **options).logits[:, 6:]
            for each in (ids, others)
        )
    assert torch.allclose(first, second) == ("use_cache" in options and not mixed)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with density.watching() as watched:
                model(input_ids=ids, position_ids=packed, **options)
            found = density(ids, position_ids=packed, watched=watched)
            assert found.exit_distance is not None
    assert [record.message for record in caplog.records] == ([MIXED] if mixed else [])


def test_a_forward_of_some_rows(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama", num_hidden_layers=3).train()
    density = DensityLoss(model, **OPTIONS)
    with caplog.at_level(logging.WARNING):
        for length in (12, 10):  # said once, though the numbers are others
            ids, mask = batch(length)
            with density.watching() as watched:
                for rows in (slice(0, 2), slice(2, 4)):
                    model(input_ids=ids[rows], attention_mask=mask[rows])
            assert density(ids, mask, watched=watched).exit_distance is None
    assert [record.message for record in caplog.records] == [
        "exits: the forward that was watched had 2 rows of 12 tokens, and this batch has 4 of 12, "
        f"so none is read early; give the call the rows that one forward ran{REST}"
    ]


def test_a_forward_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    density = DensityLoss(model, **OPTIONS)

    def fails(*_: Any) -> None:
        raise RuntimeError("of the head")

    with density.watching() as watched:
        handle = model.lm_head.register_forward_hook(fails)
        with pytest.raises(RuntimeError, match="of the head"):
            model(input_ids=ids, attention_mask=mask)
        handle.remove()
    with caplog.at_level(logging.WARNING):
        assert density(ids, mask, watched=watched).exit_distance is None
    assert "did not end, or left layers out" in caplog.text


@pytest.mark.parametrize("layers", [3, 5])
def test_a_handle_of_another_model_is_refused(layers: int) -> None:
    """One of as many layers was read as if it were the model's own."""
    model, other = (tiny_model("llama", num_hidden_layers=n).train() for n in (3, layers))
    ids, mask = batch()
    density, its = DensityLoss(model, **OPTIONS), DensityLoss(other, **OPTIONS)
    with its.watching() as watched:
        other(input_ids=ids, attention_mask=mask)
    with pytest.raises(InvalidInputError, match="watched: found what a DensityLoss of another"):
        density(ids, mask, watched=watched)
    second = DensityLoss(other, **OPTIONS)  # of the same model one may read what another watched
    assert second(ids, mask, watched=watched).exit_distance is not None


def test_a_forward_that_failed_does_not_hide_the_next() -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    density = DensityLoss(model, **OPTIONS)
    with density.watching() as watched:
        with pytest.raises(IndexError):
            model(input_ids=ids + 100, attention_mask=mask)  # in the decoder: no such tokens
        model(input_ids=ids, attention_mask=mask)
    assert density(ids, mask, watched=watched).exit_distance is not None


def test_a_layer_that_is_called_by_itself_is_not_read() -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    density = DensityLoss(model, **OPTIONS)
    with density.watching() as watched:
        model(input_ids=ids, attention_mask=mask)
        (own,) = watched.forwards
        before, hidden = dict(own.streams), torch.zeros(4, 12, model.config.hidden_size)
        angles = model.model.rotary_emb(hidden, torch.arange(12)[None])
        for layer in model.model.layers:
            layer(hidden, position_embeddings=angles)
        (after,) = watched.forwards
    assert before
    assert all(after.streams[depth] is stream for depth, stream in before.items())
