"""The matrix: every type of the zoo against its own logits and a literal reference, or refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import softtrace
from softtrace.errors import UnsupportedModelError
from softtrace.graph.edges import EDGE_KINDS
from softtrace.loss import DensityLoss
from softtrace.tracing.attach import attach
from tests.support.matrix import coins, inputs_of, literal, padded
from tests.support.reference import Layer
from tests.support.state import state
from tests.support.zoo import REFUSED, VERIFIED, tiny

pytestmark = pytest.mark.thorough

CASES = sorted(VERIFIED)
ROUNDING = 1e-4  # absolute, of logits: float32 of two routes through three or four layers


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    """All tests of a case come one after the other: its model is made once, and proven twice."""
    name: str = request.param
    return name


@functools.lru_cache(maxsize=1)
def model_of(case: str) -> PreTrainedModel:
    kind, changes = VERIFIED[case]
    return tiny(kind, **changes)


def test_the_zoo_is_as_large_as_promised() -> None:
    types = {kind for kind, _ in VERIFIED.values()}
    assert len(types) >= 90
    assert types <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@torch.no_grad()
def test_equals_the_models_own_run_and_a_literal_reference(case: str) -> None:
    ids, mask = padded()
    valid, model = mask.bool(), model_of(case)
    instrument, own = literal(case, model_of(case))
    before = state(model)
    plain = model(**inputs_of(instrument, ids, mask)).logits
    logits, importances = own.run(None)
    torch.testing.assert_close(logits[valid], plain[valid], atol=ROUNDING, rtol=1e-4)
    recording = instrument.record(instrument.batch(ids, mask))
    torch.testing.assert_close(recording.logits[valid], plain[valid], atol=ROUNDING, rtol=1e-4)
    for found, expected in zip(recording.attention, own.probabilities, strict=True):
        rows = valid[:, None].expand(found.shape[:3])
        torch.testing.assert_close(found[rows], expected[rows], atol=ROUNDING, rtol=1e-3)
    for found, expected in zip(recording.importance.layers, importances, strict=True):
        for kind in EDGE_KINDS:
            one, other = getattr(found, kind), getattr(expected, kind)
            rows = valid[:, None].expand(one.shape[:3]) if one.dim() == 4 else valid
            torch.testing.assert_close(one[rows], other[rows], atol=2e-5, rtol=1e-3)
            assert not one[~rows].any()  # edges into padding
        parallel = not expected.mlp_residual.any()
        assert found.parallel == parallel
    seen = torch.stack(recording.importance.visible)
    assert not seen[:, ~valid[:, None].expand(2, 7, 7)].any()  # edges out of padding
    instrument.detach()
    assert state(model) == before


@torch.no_grad()
def test_masked_runs_equal_a_literal_reference(case: str) -> None:
    """Coins for every edge, with the attention of the full run; then the residual edges alone."""
    ids, mask = padded()
    valid = mask.bool()
    instrument, own = literal(case, model_of(case))
    recording = instrument.record(instrument.batch(ids, mask))
    for residual_only in (False, True):
        masks = coins(recording.importance, 2, residual_only=residual_only)
        found = instrument.masked_logits(recording.batch, masks, recording.attention)
        expected, _ = own.run([Layer(*each) for each in masks])
        torch.testing.assert_close(found[valid], expected[valid], atol=ROUNDING, rtol=1e-3)
        full = recording.logits[valid]
        assert (found[valid] - full).abs().max() > 1e-2 * full.abs().max()


@torch.no_grad()
def test_exits_are_read_where_they_are(case: str) -> None:
    """With every edge kept, exits of the full run; at full depth, the whole masked run."""
    ids, mask = padded()
    valid = mask.bool()
    instrument = attach(model_of(case))
    recording = instrument.record(instrument.batch(ids, mask), keep_hidden=True)
    layers, full = len(instrument.anatomy.layers), recording.attention
    places = valid.flatten().nonzero()[:, 0]
    assert recording.hidden is not None
    every = [layer.map(Tensor.float) for layer in recording.importance.existing()]
    for depth in range(1, layers):
        depths = torch.full_like(ids, depth)
        found = instrument.exit_logits(instrument.batch(ids, mask), every, depths, places, full)
        early = instrument.anatomy.readout.early(recording.hidden[depth])[valid]
        torch.testing.assert_close(found, early, atol=ROUNDING, rtol=1e-3)
    masks = coins(recording.importance, 2, residual_only=False)
    depths = torch.full_like(ids, layers)
    found = instrument.exit_logits(instrument.batch(ids, mask), masks, depths, places, full)
    whole = instrument.masked_logits(instrument.batch(ids, mask), masks, full)[valid]
    torch.testing.assert_close(found, whole, atol=ROUNDING, rtol=1e-3)


def test_gradients_reach_what_the_plain_loss_reaches(case: str) -> None:
    model, (ids, mask) = model_of(case), padded()
    instrument = softtrace.attach(model)
    model.zero_grad()
    logits = model(**inputs_of(instrument, ids, mask)).logits
    target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100).flatten()
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target).backward()
    plain = reached(model)
    model.zero_grad()
    penalty = DensityLoss(
        model,
        masks="soft",
        temperature=2.0,
        attention="recomputed",
        family="sparse",
        easy_quantile=1.0,
        share=1.0,
    )
    penalty(ids, mask, step=0).loss.backward()
    assert len(plain) > 10
    assert not plain - reached(model)
    model.zero_grad()
    # Masks as they ship; every token counts, since tiny prompts have next to no easy ones.
    DensityLoss(model, share=1.0, easy_quantile=1.0)(ids, mask, step=0).loss.backward()
    assert len(reached(model)) > len(plain) / 3


def reached(model: nn.Module) -> set[str]:
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_types_that_are_not_the_sum_of_their_edges_are_refused(case: str) -> None:
    kind, changes, reason = REFUSED[case]
    model = tiny(kind, **changes)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        softtrace.attach(model)
    assert state(model) == before


@torch.no_grad()
def test_windows_and_chunks_are_edges_that_do_not_exist() -> None:
    """|E| of a window, a chunk and a local layer, counted from their definitions."""
    ids = torch.arange(3, 12)[None]
    positions = range(9)
    seen: dict[str, Any] = {
        "mistral, window": [lambda t, s: t - s < 3] * 3,
        "gemma2, window": [lambda t, s: t - s < 3, lambda t, s: True, lambda t, s: t - s < 3],
        "gpt_neo": [lambda t, s: True, lambda t, s: t - s < 3, lambda t, s: True],
        "llama4_text, chunks": None,
    }
    for case, rules in seen.items():
        model = model_of(case)
        if rules is None:  # layers with positions are chunked
            chunked = [kind == "chunked_attention" for kind in model.config.layer_types]
            assert any(chunked)
            rules = [
                (lambda t, s: t // 3 == s // 3) if each else (lambda t, s: True) for each in chunked
            ]
        visible = attach(model).record(attach(model).batch(ids)).importance.visible
        for found, rule in zip(visible, rules, strict=True):
            expected = [[s <= t and rule(t, s) for s in positions] for t in positions]
            assert found[0].tolist() == expected
