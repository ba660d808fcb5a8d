"""Gradients of the density term: against a replay, by finite differences, and in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softtrace import DensityLoss, DensityOptions
from softtrace.density.distortion import divergence, total_variation
from softtrace.graph.masks import hard_masks, soft_masks
from softtrace.graph.sizes import soft_size
from softtrace.tracing.attach import attach
from tests.loss.test_density_loss import batch, drawn, exits, literal_weights
from tests.support.tiny import FAMILIES, tiny_model, tiny_prompt


def replay(
    model: nn.Module,
    options: DensityOptions,
    ids: Tensor,
    mask: Tensor,
    step: int,
    micro_step: int = 0,
) -> Callable[[], Tensor]:
    """The term as a function of the current weights, all that it holds constant held constant."""
    chosen = drawn(options, mask.bool(), (step, micro_step))
    window = ids.shape[1] if options.crop is None else min(options.crop, ids.shape[1])
    ids, mask = chosen.of(ids, window), chosen.of(mask, window)
    instrument = attach(model)
    with torch.no_grad():
        still = instrument.record(instrument.batch(ids, mask))
    p = still.logits
    logs = p.log_softmax(-1)
    entropies = -(logs.exp() * logs).sum(-1)[mask.bool()]
    easy = torch.zeros_like(p[..., 0])
    easy[mask.bool()] = torch.tensor(
        literal_weights(entropies.tolist(), options.easy_quantile, options.easy_width),
        dtype=easy.dtype,
    )
    easy = easy / easy.sum()
    fixed = hard_masks(still.importance, chosen.thresholds)

    def term() -> Tensor:
        live = (
            instrument.record(instrument.batch(ids, mask)) if options.through_importances else still
        )
        soft = soft_masks(live.importance, chosen.thresholds, options.temperature)
        kept = soft if options.masks == "soft" else fixed
        if options.family == "shallow":
            kept = hard_masks(live.importance, 0.0)
        recorded = live.attention if options.attention == "recorded" else None
        q = exits(instrument, ids, mask, kept, chosen.depths, recorded)
        distance = total_variation if options.distance == "tv" else divergence
        value = (easy * distance(p, q)).sum()
        if options.size_weight:
            value = value + options.size_weight * soft_size(live.importance, soft, easy)
        return options.strength * value

    return term


DIALS: list[dict[str, Any]] = [
    {"masks": "straight"},
    {"masks": "straight", "attention": "recomputed", "distance": "kl"},
    {"masks": "straight", "size_weight": 2.0, "family": "sparse"},
    {"masks": "soft", "family": "both"},
    {"masks": "soft", "family": "sparse", "distance": "kl", "attention": "recomputed"},
    {"masks": "soft", "family": "both", "size_weight": 0.5},
    {"masks": "soft", "family": "shallow"},
]


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }


@pytest.mark.parametrize("dials", DIALS, ids=str)
def test_values_and_gradients_equal_a_replay(dials: dict[str, Any]) -> None:
    for family in ("gpt2", "qwen2"):
        model = tiny_model(family, seed=7, dtype=torch.float64)
        ids, mask = batch()
        options = DensityOptions(share=1.0, thresholds=(0.02, 0.3), **dials)
        value = DensityLoss(model, options)(ids, mask, step=2).loss
        expected = replay(model, options, ids, mask, 2)()
        torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-7)
        ours, theirs = gradients(model, value), gradients(model, expected)
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dials", DIALS, ids=str)
def test_gradients_equal_finite_differences(dials: dict[str, Any]) -> None:
    """End to end through importances, masks, reachability and the masked run."""
    model = tiny_model("gpt2", seed=8, dtype=torch.float64)
    ids, mask = tiny_prompt(5, seed=3, batch=2), torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])
    options = DensityOptions(share=1.0, thresholds=(0.05, 0.3), **dials)
    function = replay(model, options, ids, mask, 1)
    found = gradients(model, DensityLoss(model, options)(ids, mask, step=1).loss)
    generator = torch.Generator().manual_seed(0)
    names = (
        "h.0.attn.c_attn.weight",
        "h.1.attn.c_proj.weight",
        "h.1.mlp.c_fc.weight",
        "ln_f.weight",
    )
    for name, parameter in model.named_parameters():
        if not name.endswith(names):
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        ends, step = [], 1e-6
        with torch.no_grad():
            for sign in (1, -2, 1):  # ahead, behind, back
                parameter += sign * step * direction
                if sign != 1 or not ends:
                    ends.append(function().item())
        slope = (ends[0] - ends[1]) / (2 * step)
        assert (found[name] * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-8)
        assert abs(slope) > 1e-6


def norm_of(found: dict[str, Tensor], part: str) -> float:
    return sum(value.abs().sum().item() for name, value in found.items() if part in name)


def test_straight_terms_reach_queries_and_keys_only_when_attention_is_recomputed() -> None:
    model, (ids, mask) = tiny_model("llama", seed=1, dtype=torch.float64), batch()
    reached = {}
    for attention in ("recorded", "recomputed"):
        term = DensityLoss(model, share=1.0, attention=attention)(ids, mask)
        found = gradients(model, term.loss)
        assert norm_of(found, "v_proj") > 0
        reached[attention] = norm_of(found, "q_proj") + norm_of(found, "k_proj")
    assert reached["recorded"] == 0 < reached["recomputed"]


def test_the_size_term_adds_its_gradient_through_the_importances() -> None:
    model, (ids, mask) = tiny_model("llama", seed=1, dtype=torch.float64), batch()
    terms = [DensityLoss(model, share=1.0, size_weight=w)(ids, mask, step=0) for w in (0.0, 1.0)]
    plain, sized = terms
    assert sized.distortion.item() == pytest.approx(plain.distortion.item(), rel=1e-9)
    strength = DensityOptions().strength
    assert sized.loss.item() == pytest.approx(
        strength * (sized.distortion + sized.soft_size).item(), rel=1e-9
    )
    before, after = gradients(model, plain.loss), gradients(model, sized.loss)
    assert norm_of(before, "q_proj") == 0 < norm_of(after, "q_proj")
    for term in terms:
        for detached in (term.distortion, term.soft_size, term.easy_share):
            assert not detached.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_term_trains_every_family(family: str) -> None:
    """A few steps on one batch bring the distortion down: the sign and the scale are right."""
    model, ids = tiny_model(family, seed=9), tiny_prompt(8, seed=2, batch=4)
    penalty = DensityLoss(model, thresholds=(0.1, 0.1), depths=(1.0, 1.0), share=1.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    values = []
    for _ in range(12):
        term = penalty(ids, step=0)
        optimiser.zero_grad()
        term.loss.backward()
        optimiser.step()
        values.append(term.distortion.item())
    assert values[-1] < 0.8 * values[0]
