"""The three kinds of attention of masked runs, against a forward written from the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import softtrace
from softtrace.density import exact
from softtrace.density.curve import DensityCurve
from softtrace.errors import InvalidInputError
from softtrace.graph import reach
from softtrace.tracing.masking import AttentionKind
from tests.density.test_exactness import safe_thresholds
from tests.support import oracle
from tests.support.tiny import tiny_model, tiny_prompt

FAMILIES: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 6, {"attention_bias": True, "mlp_bias": True}),
    ("mistral", 7, {"sliding_window": 2, "num_hidden_layers": 4}),
    ("qwen2", 6, {}),
    ("qwen3", 5, {"num_hidden_layers": 2}),
    ("gpt2", 6, {}),
]
named = pytest.mark.parametrize(
    ("family", "length", "overrides"), FAMILIES, ids=[family for family, *_ in FAMILIES]
)


def distortions(
    model: nn.Module, ids: torch.Tensor, attention: AttentionKind, tau: float, traces: bool
) -> list[float]:
    """TV at every position: its own trace alone is kept, or (one run) all edges over the threshold.

    With ``"kept"`` all attention edges stay besides.
    """
    run = oracle.run_full(model, ids)
    graph = oracle.build_graph(run)
    found = []
    for position in range(ids.shape[1]):
        kept = {edge for edge, importance in run.importance.items() if importance >= tau}
        if traces:
            ordered = oracle.best_first(graph, position)
            kept = {edge for edge, _ in oracle.trace_at_threshold(ordered, tau)}
        if attention == "kept":
            kept |= {edge for edge in run.importance if edge.kind == "attention"}
        recorded = run.attention if attention == "recorded" else None
        masked = oracle.masked_distribution(model, ids, kept, position, recorded)
        full = run.logits[position].double().softmax(-1)
        found.append(oracle.total_variation(full, masked))
    return found


@named
@pytest.mark.parametrize("attention", ["recorded", "recomputed", "kept"])
def test_every_kind_equals_the_literal_runs(
    family: str, length: int, overrides: dict[str, Any], attention: AttentionKind
) -> None:
    model = tiny_model(family, seed=7, **overrides)
    ids = tiny_prompt(length, seed=8)
    thresholds = safe_thresholds(oracle.run_full(model, ids), 4)
    together = softtrace.density_curve(model, ids, thresholds=thresholds, attention=attention)
    alone = softtrace.density_curve(
        model, ids, thresholds=thresholds, attention=attention, exact=True
    )
    assert together.attention == alone.attention == attention
    assert alone.exact
    assert together.exact is (attention == "recorded")
    for index, tau in enumerate(together.thresholds.tolist()):
        for curve, traces in ((together, False), (alone, True)):
            expected = distortions(model, ids, attention, tau, traces)
            assert curve.total_variation[index, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(together.size, alone.size)
    if attention == "recorded":
        assert torch.equal(together.total_variation, alone.total_variation)


def test_kinds_differ_and_one_run_is_an_approximation() -> None:
    model, ids = tiny_model("llama", seed=7), tiny_prompt(9, seed=8)
    curves: list[DensityCurve] = [
        softtrace.density_curve(model, ids, thresholds=[0.2, 0.1, 0.05], **options)
        for options in (
            {"attention": "recorded"},
            {"attention": "recomputed"},
            {"attention": "recomputed", "exact": True},
            {"attention": "kept"},
            {"attention": "kept", "exact": True},
        )
    ]
    for number, first in enumerate(curves):
        for second in curves[number + 1 :]:
            difference = (first.total_variation - second.total_variation).abs()
            assert difference.max() > 1e-3
            assert torch.equal(first.size, second.size)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["recomputed", "kept"])
def test_exact_runs_of_chosen_positions_in_padded_batches(
    monkeypatch: pytest.MonkeyPatch, attention: AttentionKind, side: str
) -> None:
    model = tiny_model("qwen2", seed=3)
    ids = tiny_prompt(8, seed=4, batch=3)
    mask = torch.ones_like(ids)
    own = slice(2, 8) if side == "left" else slice(0, 6)
    mask[1] = 0
    mask[1, own] = 1
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[0, 5] = positions[1, own.start + 4] = positions[1, 0] = positions[1, 7] = True
    options: dict[str, Any] = {
        "thresholds": [0.1, 0.03], "attention": attention, "exact": True, "composition": True,
    }  # fmt: skip
    monkeypatch.setattr(reach, "_MASK_ELEMENTS", 1)  # one sequence at a time
    curve = softtrace.density_curve(model, ids, mask, positions=positions, **options)
    monkeypatch.undo()
    expected = softtrace.density_curve(model, ids[1:2, own], **options)
    measured = positions & mask.bool()
    assert torch.equal(~curve.total_variation.isnan(), measured.expand(2, -1, -1))
    assert torch.equal(~curve.size.isnan(), measured.expand(2, -1, -1))
    torch.testing.assert_close(
        curve.total_variation[:, 1, own.start + 4], expected.total_variation[:, 0, 4]
    )
    area = curve.area()[1, own.start + 4]
    torch.testing.assert_close(area, expected.area()[0, 4], atol=1e-6, rtol=0)
    whole = softtrace.density_curve(model, ids, mask, **options)
    torch.testing.assert_close(curve.total_variation[:, 0, 5], whole.total_variation[:, 0, 5])


@pytest.mark.parametrize("attention", ["recomputed", "kept"])
def test_exact_runs_of_packed_rows(attention: AttentionKind) -> None:
    model, ids = tiny_model("llama", seed=3), tiny_prompt(8, seed=4)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    options: dict[str, Any] = {"thresholds": [0.1, 0.03], "attention": attention, "exact": True}
    curve = softtrace.density_curve(model, ids, position_ids=packed, **options)
    for part in (slice(0, 3), slice(3, 8)):
        alone = softtrace.density_curve(model, ids[:, part], **options)
        torch.testing.assert_close(curve.total_variation[..., part], alone.total_variation)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), tiny_prompt(6)
    with pytest.raises(InvalidInputError, match=r"attention: found 'frozen', allowed are 'rec"):
        softtrace.density_curve(model, ids, attention="frozen")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"positions: found shape \(6,\), expected a ten"):
        softtrace.density_curve(model, ids, positions=torch.ones(6, dtype=torch.bool))
    with pytest.raises(InvalidInputError, match="positions: found no real token among them"):
        softtrace.density_curve(model, ids, positions=torch.zeros_like(ids))
    monkeypatch.setattr(exact, "MOST_RUNS", 65)
    message = r"found 6 positions at 11 thresholds, allowed are 65 runs.*about \d+\.\d hours here"
    with pytest.raises(InvalidInputError, match=message):
        softtrace.density_curve(model, ids, attention="recomputed", exact=True)
    softtrace.density_curve(model, ids, exact=True)  # recorded: no runs of their own
    monkeypatch.setattr(exact, "MOST_RUNS", 66)
    softtrace.density_curve(model, ids, attention="recomputed", exact=True)
