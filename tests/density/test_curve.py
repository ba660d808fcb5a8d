"""Identity 3 and the numbers read off a density curve."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import softtrace
from softtrace.density import sweep
from softtrace.density.curve import SIZES, DensityCurve, default_thresholds
from softtrace.density.distortion import NUCLEUS_SHARES, nucleus_recovered
from softtrace.density.sweep import curve_of, density_curve
from softtrace.errors import InvalidInputError
from softtrace.graph.edges import EDGE_KINDS, Edge
from softtrace.graph.masks import hard_masks
from softtrace.graph.sizes import edge_counts
from tests.support import oracle
from tests.support.literal import edges_of
from tests.support.live_bytes import LiveBytes
from tests.support.tiny import FAMILIES, VOCABULARY, tiny_model, tiny_prompt


def made_up_curve(seed: int, thresholds: int = 6, edges: int = 500) -> DensityCurve:
    """Rising sizes and TVs that mostly, not always, fall; ``[K, 2, 3]``."""
    generator = np.random.default_rng(seed)
    shape = (thresholds, 2, 3)
    size = np.sort(np.round(10 ** generator.uniform(-3.5, 0, shape) * edges), axis=0) / edges
    variation = np.sort(generator.uniform(0, 1, shape), axis=0)[::-1]
    variation = np.clip(variation + generator.normal(0, 0.05, shape), 0, 1)
    return DensityCurve(
        thresholds=torch.linspace(0.9, 0.01, thresholds, dtype=torch.float64),
        size=torch.tensor(size),
        total_variation=torch.tensor(variation),
        edges=torch.full((2, 3), edges),
        entropy=torch.zeros(2, 3),
    )


def literal_reading(curve: DensityCurve, row: int, token: int) -> tuple[np.ndarray, np.ndarray]:
    """log s, rising, and TV of one position; the empty trace at half an edge, closed by (0, 0)."""
    half = 0.5 / float(curve.edges[row, token])
    size = np.maximum(curve.size[:, row, token].numpy(), half)
    variation = curve.total_variation[:, row, token].numpy()
    return np.log(np.append(size, 1.0)), np.append(variation, 0.0)


def literal_at(x: np.ndarray, y: np.ndarray, size: float) -> float:
    """Linear in log s; held below the first size; of equal sizes the first counts from below."""
    at = math.log(size)
    if at <= x[0]:
        return float(y[0])
    right = next(index for index, value in enumerate(x) if value >= at - 1e-15)
    width = x[right] - x[right - 1]
    share = (at - x[right - 1]) / width if width else 0.0
    return float(y[right - 1] + share * (y[right] - y[right - 1]))


def literal_crossing(x: np.ndarray, y: np.ndarray, bound: float, first_size: float) -> float:
    if y[0] <= bound:
        return first_size
    index = next(i for i, value in enumerate(y) if value <= bound)
    share = (y[index - 1] - bound) / (y[index - 1] - y[index])
    return math.exp(x[index - 1] + share * (x[index] - x[index - 1]))


@settings(max_examples=30)
@given(seed=st.integers(0, 100_000), bound=st.floats(0.02, 0.95))
def test_reading_a_curve_equals_literal_interpolation(seed: int, bound: float) -> None:
    curve = made_up_curve(seed)
    sizes = (1e-4, 1e-3, 0.0123, 0.1, 0.5, 1.0)
    heights, area, crossing = curve.at_sizes(sizes), curve.area(), curve.size_at(bound)
    for row, token in np.ndindex(2, 3):
        x, y = literal_reading(curve, row, token)
        expected = [literal_at(x, y, size) for size in sizes]
        assert heights[:, row, token].tolist() == pytest.approx(expected, abs=1e-6)
        grid = np.log10(SIZES)
        all_heights = [literal_at(x, y, size) for size in SIZES]
        mean = np.trapezoid(all_heights, grid) / (grid[-1] - grid[0])
        assert area[row, token].item() == pytest.approx(mean, abs=1e-6)
        found = crossing[row, token].item()
        first = float(curve.size[0, row, token])
        assert found == pytest.approx(literal_crossing(x, y, bound, first), rel=1e-6)
        assert 0 <= area[row, token] <= 1


def test_reading_by_hand() -> None:
    curve = DensityCurve(
        thresholds=torch.tensor([0.5, 0.1]),
        size=torch.tensor([[[0.01]], [[0.1]]], dtype=torch.float64),
        total_variation=torch.tensor([[[0.9]], [[0.3]]], dtype=torch.float64),
        edges=torch.tensor([[1000]]),
        entropy=torch.zeros(1, 1),
    )
    heights = curve.at_sizes((1e-4, 0.01, 10**-1.5, 0.1, 10**-0.5, 1.0))
    assert heights.flatten().tolist() == pytest.approx([0.9, 0.9, 0.6, 0.3, 0.15, 0.0])
    # 0.9 for two decades, 0.9 -> 0.3 and 0.3 -> 0 over one each; the 26 sizes miss two corners
    assert curve.area().item() == pytest.approx((2 * 0.9 + 0.6 + 0.15) / 4, abs=5e-3)
    assert curve.size_at(0.6).item() == pytest.approx(10**-1.5)
    assert curve.size_at(0.3).item() == pytest.approx(0.1)
    assert curve.size_at(0.15).item() == pytest.approx(10**-0.5)
    assert curve.size_at(0.95).item() == pytest.approx(0.01)
    assert curve.size_at().item() == pytest.approx(10 ** (-2 / 3))


def test_what_holds_many_numbers_is_shown_in_a_line() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(8)
    importance = softtrace.edge_importance(model, ids)
    assert repr(importance) == "EdgeImportance(3 layers of 4 heads, 1 x 8 tokens)"
    trace = softtrace.extract_trace(importance, size=5)
    assert repr(trace) == f"Trace(5 of {trace.total:,} edges)"
    wanted = "DensityCurve(11 thresholds, 1 x 8 tokens, attention='recorded', exact=True)"
    assert repr(density_curve(model, ids)) == wanted


def test_an_empty_trace_under_the_bound_has_size_zero() -> None:
    curve = made_up_curve(0)
    curve.size[0] = 0
    curve.total_variation[0] = 0.1
    assert (curve.size_at(0.2) == 0).all()
    assert (curve.size_at(0.05) > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_run_serves_every_position(family: str) -> None:
    """Identity 3: the edges of another position's trace, kept too, reach no further."""
    model, input_ids = tiny_model(family, seed=2), tiny_prompt(8, seed=2)
    instrument = softtrace.attach(model)
    run = oracle.run_full(model, input_ids)
    graph = oracle.build_graph(run)
    beyond: set[Edge] = set()
    with torch.no_grad():
        recording = instrument.record(instrument.batch(input_ids))
        for tau in (0.3, 0.05, 0.005):
            masks = hard_masks(recording.importance, tau)
            logits = instrument.masked_logits(recording.batch, masks, recording.attention)
            kept = {e for e, score in edges_of(recording.importance).items() if score >= tau}
            for position in (2, 5, 7):
                ordered = oracle.best_first(graph, position)
                own = {edge for edge, _ in oracle.trace_at_threshold(ordered, tau)}
                expected = oracle.masked_distribution(
                    model, input_ids, own, position, run.attention
                )
                found = logits[0, position].double().softmax(-1)
                assert oracle.total_variation(found, expected) < 1e-5
                beyond |= kept - own
    assert len(beyond) > 50  # edges of other traces were kept and did not matter


@settings(max_examples=8)
@given(family=st.sampled_from(FAMILIES), seed=st.integers(0, 99), left=st.booleans())
def test_curves_of_models_keep_their_promises(family: str, seed: int, left: bool) -> None:
    model, ids = tiny_model(family, seed=seed), tiny_prompt(7, seed=seed, batch=3)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if left else slice(4, None)] = 0
    mask[2, slice(0, 6) if left else slice(1, None)] = 0
    curve = density_curve(model, ids, mask)
    valid = mask.bool()
    assert curve.size.shape == curve.total_variation.shape == (len(default_thresholds()), 3, 7)
    for values in (curve.size, curve.total_variation):
        assert values[:, ~valid].isnan().all()
        assert ((values[:, valid] >= 0) & (values[:, valid] <= 1)).all()
    assert (curve.size[:, valid].diff(dim=0) >= 0).all()  # monotone in tau
    assert (curve.thresholds.diff() < 0).all()
    for values in (curve.area(), curve.size_at(0.2), curve.entropy):
        assert (values.isnan() == ~valid).all()
    order = [2, 0, 1]
    turned = density_curve(model, ids[order], mask[order])
    torch.testing.assert_close(turned.size[:, [1, 2, 0]], curve.size, equal_nan=True)
    torch.testing.assert_close(
        turned.total_variation[:, [1, 2, 0]],
        curve.total_variation,
        atol=1e-5,
        rtol=0,
        equal_nan=True,
    )


def test_composition_and_nucleus() -> None:
    layers = 6
    model, ids = tiny_model("gpt2", num_hidden_layers=layers), tiny_prompt(6, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    taus = [0.2, 0.01]
    plain = density_curve(model, ids, mask, taus)
    assert plain.composition is None
    assert plain.nucleus is None
    curve = density_curve(model, ids, mask, taus, composition=True, nucleus=True)
    assert curve.composition is not None
    assert curve.nucleus is not None
    instrument = softtrace.attach(model)
    with torch.no_grad():
        recording = instrument.record(instrument.batch(ids, mask))
        kept = [hard_masks(recording.importance, tau) for tau in taus]
        for index, masks in enumerate([*kept, recording.importance.existing()]):
            counts = edge_counts(masks)
            for quartile, members in enumerate(([0, 1], [2], [3, 4], [5])):
                torch.testing.assert_close(
                    curve.composition[index, :, :, quartile], counts[:, :, members].sum(2)
                )
            logits = instrument.masked_logits(recording.batch, masks, recording.attention)
            expected = nucleus_recovered(recording.logits, logits)
            assert torch.equal(curve.nucleus[index][mask.bool()], expected[mask.bool()])
    assert curve.composition.shape == (3, 2, 6, 4, len(EDGE_KINDS))
    assert curve.nucleus.shape == (3, 2, 6, len(NUCLEUS_SHARES))
    assert curve.nucleus[-1].all()
    shares = curve.composition.sum((-1, -2)) / curve.composition[-1].sum((-1, -2))
    torch.testing.assert_close(shares[:2, mask.bool()], curve.size[:, mask.bool()])
    read = curve.at_sizes((0.1, 1.0), curve.composition)
    torch.testing.assert_close(read[1][mask.bool()], curve.composition[-1][mask.bool()])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_portions_of_the_vocabulary_do_not_show(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(family), tiny_prompt(7, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    whole = density_curve(model, ids, mask, nucleus=True)
    for rows in (1, 4):
        monkeypatch.setattr(sweep, "_CACHED", rows * VOCABULARY)
        parts = density_curve(model, ids, mask, nucleus=True)
        torch.testing.assert_close(
            parts.total_variation, whole.total_variation, equal_nan=True, atol=1e-6, rtol=0
        )
        assert parts.nucleus is not None
        assert whole.nucleus is not None
        assert torch.equal(parts.nucleus[:, mask.bool()], whole.nucleus[:, mask.bool()])


def test_few_copies_of_the_logits_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the recording, the probabilities, and a portion."""
    model, ids = tiny_model("llama", vocab_size=4000), tiny_prompt(24)
    softtrace.attach(model)
    monkeypatch.setattr(sweep, "_CACHED", 4000)
    monkeypatch.setattr(sweep, "_ROWS", 1)
    with LiveBytes() as live:
        density_curve(model, ids, thresholds=[0.1])
    assert live.peak < 3 * ids.numel() * 4000 * 4


def test_a_curve_needs_and_leaves_no_gradients() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(5)
    curve = density_curve(model, ids, thresholds=torch.tensor([0.3, 0.1]))
    assert not curve.total_variation.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
    assert curve.thresholds.tolist() == pytest.approx([0.3, 0.1])
    assert curve.size.dtype == curve.thresholds.dtype == torch.float64


def test_the_default_grids() -> None:
    grid = np.array(default_thresholds())
    assert (np.diff(grid) < 0).all()
    assert ((grid > 0) & (grid < 1)).all()
    assert len(SIZES) == 26
    assert SIZES[0] == 1e-4
    assert SIZES[-1] == 1
    np.testing.assert_allclose(np.diff(np.log10(SIZES)), 4 / 25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, ids: density_curve(model, ids, thresholds=[]), "thresholds: found none"),
        (lambda model, ids: density_curve(model, ids, thresholds=[0.0]), r"allowed \(0, 1\)"),
        (lambda model, ids: density_curve(model, ids, thresholds=[0.5, 1.0]), "threshold: found 1"),
        (lambda model, ids: density_curve(model, ids, thresholds=[math.nan]), "found nan"),
        (
            lambda model, ids: density_curve(model, ids, thresholds=["a"]),
            r"thresholds: found \['a'\]",
        ),
        (lambda model, ids: density_curve(model, ids, thresholds=0.5), r"thresholds: found 0\.5"),
        (lambda model, ids: made_up_curve(0).size_at(1.0), r"found 1\.0, allowed \(0, 1\)"),
        (lambda model, ids: made_up_curve(0).size_at(0.0), "total_variation: found 0.0"),
        (lambda model, ids: made_up_curve(0).size_at(1.5), "total_variation: found 1.5"),
        (lambda model, ids: made_up_curve(0).at_sizes([0.0]), "size: found 0.0"),
        (lambda model, ids: made_up_curve(0).at_sizes([2.0]), "size: found 2.0"),
    ],
)
def test_numbers_out_of_range_are_refused(call: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call(tiny_model("llama"), tiny_prompt(4))


def test_reader_sees_every_masked_prediction_and_the_full_one() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(9, batch=2)
    instrument = softtrace.attach(model)
    explained = torch.zeros(2, 9, dtype=torch.bool)
    explained[0, 4:], explained[1, 2] = True, True
    with torch.no_grad():
        recording = instrument.record(instrument.batch(ids))

        def sweep(**options: Any) -> DensityCurve:
            grid = (0.3, 0.05)
            return curve_of(instrument, recording, recording.importance, grid, **options)

        everywhere = sweep(reader=lambda logits: logits[:, :5], nucleus=True)
        somewhere = sweep(reader=lambda logits: logits[:, :5], nucleus=True, positions=explained)
        for level, tau in enumerate((0.3, 0.05)):
            masks = hard_masks(recording.importance, tau)
            masked = instrument.masked_logits(recording.batch, masks, recording.attention)[..., :5]
            assert everywhere.readings is not None
            torch.testing.assert_close(everywhere.readings[level], masked, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(everywhere.readings[-1], recording.logits[..., :5])
    for whole, part in (
        (everywhere.readings, somewhere.readings),
        (everywhere.nucleus, somewhere.nucleus),
    ):
        assert whole is not None
        assert part is not None
        torch.testing.assert_close(part[:, explained], whole[:, explained])
        assert not bool(part[:-1, ~explained].any())
    whole, part = everywhere.total_variation, somewhere.total_variation
    torch.testing.assert_close(part[:, explained], whole[:, explained])
    assert sweep().readings is None


@settings(max_examples=20)
@given(seed=st.integers(0, 100_000))
def test_positions_may_be_read_at_sizes_of_their_own(seed: int) -> None:
    curve = made_up_curve(seed)
    wanted = torch.tensor(10 ** np.random.default_rng(seed).uniform(-4, 0, (2, 2, 3)))
    found = curve.at_sizes(wanted)
    for index in np.ndindex(2, 2, 3):
        one = curve.at_sizes([float(wanted[index])])[(0, *index[1:])]
        assert float(found[index]) == pytest.approx(float(one), abs=1e-9)
    # the size at a bound is where the curve crosses it
    crossing = curve.size_at(0.3)
    inside = (curve.total_variation[0] > 0.3) & (curve.size.diff(dim=0) > 0).all(0)
    read = curve.at_sizes(crossing[None])[0]
    torch.testing.assert_close(read[inside], torch.full_like(read[inside], 0.3))
    with pytest.raises(InvalidInputError, match="size: found 2"):
        curve.at_sizes(torch.full((1, 2, 3), 2.0))
