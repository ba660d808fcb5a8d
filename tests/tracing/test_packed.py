"""Padding-free batches: packed documents are measured as if each had a row of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import DataCollatorWithFlattening

import softtrace
from softtrace.errors import InvalidInputError
from softtrace.graph.batch import check_positions, documents_of
from softtrace.graph.edges import EDGE_KINDS
from softtrace.lightning import DensityPenalty
from tests.support.fitting import Batches, Tuner
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.zoo import VERIFIED, tiny

LENGTHS = (4, 7, 2)
#: cases of the zoo whose masks follow position ids, windows and chunks among them
FAMILIES = ("llama", "gpt2", "mistral, window", "gemma2, window", "cohere", "olmo2", "qwen3_moe")


def documents() -> list[Tensor]:
    return [tiny_prompt(length, seed=10 + length) for length in LENGTHS]


def packed() -> tuple[Tensor, Tensor]:
    """``[1, 13]`` ids and positions, as transformers' collator makes them."""
    features = [{"input_ids": each[0].tolist()} for each in documents()]
    batch = DataCollatorWithFlattening()(features)
    assert "attention_mask" not in batch
    return batch["input_ids"], batch["position_ids"]


@torch.no_grad()
@pytest.mark.parametrize("case", FAMILIES)
def test_documents_of_a_row_are_measured_as_rows(case: str) -> None:
    kind, changes = VERIFIED[case]
    model = tiny(kind, **changes)
    ids, positions = packed()
    importance = softtrace.edge_importance(model, ids, position_ids=positions)
    curve = softtrace.density_curve(model, ids, position_ids=positions, thresholds=[0.2, 0.05])
    start = 0
    for document in documents():
        part = slice(start, start + document.shape[1])
        start = part.stop
        alone = softtrace.edge_importance(model, document)
        for one, other in zip(importance.layers, alone.layers, strict=True):
            for name in EDGE_KINDS:
                found = getattr(one, name)[..., part]
                found = found[:, :, part] if name == "attention" else found
                torch.testing.assert_close(found, getattr(other, name), atol=1e-5, rtol=1e-3)
        own = softtrace.density_curve(model, document, thresholds=[0.2, 0.05])
        assert torch.equal(curve.edges[:, part], own.edges)
        torch.testing.assert_close(curve.size[..., part], own.size)
        torch.testing.assert_close(
            curve.total_variation[..., part], own.total_variation, atol=1e-5, rtol=1e-3
        )
    number = documents_of(positions)[0]
    for seen in importance.visible:
        assert not (seen[0] & (number[:, None] != number)).any()


@pytest.mark.parametrize("case", ["bloom", "xglm", "gpt_oss"])
def test_models_that_let_documents_mix_are_refused(case: str) -> None:
    ids, positions = packed()
    kind, changes = VERIFIED[case]
    with pytest.raises(InvalidInputError, match="lets a token look at the document before its own"):
        softtrace.edge_importance(tiny(kind, **changes), ids, position_ids=positions)


def test_the_loss_of_a_packed_row_is_that_of_the_documents() -> None:
    """With one threshold and one depth, easy weights of all tokens alike."""
    model, (ids, positions) = tiny_model("llama"), packed()
    options: dict[str, Any] = {
        "share": 1.0, "easy_quantile": 1.0, "easy_width": 0.0, "strength": 1.0,
        "thresholds": (0.1, 0.1), "depths": (1.0, 1.0),
    }  # fmt: skip
    penalty = softtrace.DensityLoss(model, **options)
    found = penalty(ids, position_ids=positions, step=0)
    found.loss.backward()
    gradient = model.model.layers[0].mlp.down_proj.weight.grad.clone()  # type: ignore[union-attr, index]
    model.zero_grad()
    total = sum(LENGTHS)
    terms = [penalty(each, step=0).loss * each.shape[1] / total for each in documents()]
    expected = torch.stack(terms).sum()
    expected.backward()
    torch.testing.assert_close(found.loss, expected, atol=1e-6, rtol=1e-4)
    other = model.model.layers[0].mlp.down_proj.weight.grad  # type: ignore[union-attr, index]
    torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-3)
    mixed = penalty(ids, step=0).loss
    assert (mixed - expected).abs() > 1e-3
    cropped = softtrace.DensityLoss(model, **{**options, "crop": 6})(ids, position_ids=positions)
    assert cropped.loss.isfinite()


def test_lightning_passes_positions_on() -> None:
    features = [{"input_ids": each[0].tolist(), "labels": each[0].tolist()} for each in documents()]
    batch = dict(DataCollatorWithFlattening()(features))
    seen: list[Any] = []

    class Listening(DensityPenalty):
        def inputs_of(self, batch: Any) -> dict[str, Any]:
            seen.append(super().inputs_of(batch))
            return seen[-1]  # type: ignore[no-any-return]

    Trainer(
        max_steps=1,
        callbacks=[Listening(share=1.0)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Tuner("llama"), Batches(batch))
    assert torch.equal(seen[0]["position_ids"], packed()[1])


def test_positions_that_are_checked() -> None:
    valid = torch.ones(2, 4, dtype=torch.bool)
    plain = torch.arange(4).expand(2, -1)
    assert check_positions(plain, valid, masked=True) is None
    assert check_positions(plain[:1].to(torch.int16), valid, masked=True) is None
    later = check_positions(plain + 5, valid, masked=True)  # one document, that begins later
    assert later is not None
    assert torch.equal(later, plain + 5)
    packed_row = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    found = check_positions(packed_row, valid, masked=False)
    assert found is not None
    assert torch.equal(found, packed_row)
    assert documents_of(packed_row).tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    padded = valid.clone()
    padded[1, 0] = False
    left = torch.tensor([[0, 1, 2, 3], [1, 0, 1, 2]])  # padding has any position
    assert check_positions(left, padded, masked=True) is None
    for positions, mask, masked, message in (
        (packed_row, padded, True, "start anew inside a row .* and an attention mask was given"),
        (packed_row, valid, True, "keeps packed documents apart only without one"),
        (packed_row[:, :3], valid, False, "expected a tensor of the shape of input_ids"),
        (packed_row.float(), valid, False, "found torch.float32, expected integers"),
        (packed_row - 1, valid, False, "found negative ones"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            check_positions(positions, mask, masked)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_positions_that_begin_later_are_the_models_own(family: str) -> None:
    model, ids = tiny_model(family), tiny_prompt(6, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    positions = (mask.cumsum(-1) + 4) * mask
    instrument = softtrace.attach(model)
    plain = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    found = instrument.record(instrument.batch(ids, mask, position_ids=positions))
    torch.testing.assert_close(found.logits[mask.bool()], plain[mask.bool()], atol=2e-5, rtol=1e-4)
    usual = instrument.record(instrument.batch(ids, mask)).logits[mask.bool()]
    assert ((usual - plain[mask.bool()]).abs().max() > 1e-2) == (family == "gpt2")


@torch.no_grad()
def test_a_hole_in_the_mask_is_no_packing() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(8)
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]])
    found = softtrace.edge_importance(model, ids, mask, torch.arange(8)[None])
    expected = softtrace.edge_importance(model, ids, mask)
    for one, other in zip(found.visible, expected.visible, strict=True):
        assert torch.equal(one, other)


def test_learned_positions_bound_a_document_not_a_row() -> None:
    model, ids = tiny_model("gpt2"), tiny_prompt(80)  # 64 positions
    positions = torch.arange(40).repeat(2)[None]
    assert softtrace.density_curve(model, ids, position_ids=positions, thresholds=[0.5]).edges.any()
    for given in (None, torch.arange(80)[None]):
        with pytest.raises(InvalidInputError, match="found sequences of 80 tokens, allowed are at"):
            softtrace.edge_importance(model, ids, position_ids=given)
    with pytest.raises(InvalidInputError, match="found sequences of 101 tokens"):
        softtrace.edge_importance(model, ids[:, :2], position_ids=torch.tensor([[99, 100]]))
    numbered, mask = tiny("pegasus"), torch.ones(1, 80, dtype=torch.long)
    mask[:, :40] = 0  # its own code numbers the columns, padding too
    with pytest.raises(InvalidInputError, match="found sequences of 80 tokens"):
        softtrace.edge_importance(numbered, ids, mask)


def test_a_documents_last_token_has_no_target_without_labels() -> None:
    seen: list[Tensor] = []

    def easiness(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets)
        return logits[..., 0]

    ids, positions = packed()
    softtrace.DensityLoss(tiny_model("llama"), easiness=easiness)(ids, position_ids=positions)
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    assert (seen[0][0, last] == -100).all()
    assert (seen[0] == -100).sum() == len(LENGTHS)
