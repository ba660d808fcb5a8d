"""Long sequences: equal to short ones' way and to the oracle, with no map of all layers alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import softtrace
from softtrace.density.curve import DensityCurve
from softtrace.density.sweep import curve_of
from softtrace.errors import InvalidInputError
from softtrace.graph import attention_maps
from softtrace.graph.edges import EdgeImportance, LayerEdges, RowwiseEdges
from softtrace.graph.sizes import held_traces_at
from softtrace.model.attention_interface import SoftmaxMap
from softtrace.tracing.recording import _say_held
from tests.support import oracle
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.zoo import VERIFIED, of_each_kind, tiny

LENGTH = 12
THRESHOLDS = (0.3, 0.08, 0.02, 0.004)
FAMILIES = ("llama", "mistral", "qwen2", "gpt2")


@pytest.fixture
def rowwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are long from the first token on, and blocks hold a few rows."""
    monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 0)
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", 4 * LENGTH * 5)


def both_ways(monkeypatch: pytest.MonkeyPatch, function: Any) -> tuple[Any, Any]:
    """What a function gives with maps that are held, and row by row."""
    held = function()
    with monkeypatch.context() as patch:
        patch.setattr(attention_maps, "HELD_ELEMENTS", 0)
        patch.setattr(attention_maps, "CHUNK_ELEMENTS", 4 * LENGTH * 5)
        return held, function()


def padded_batch() -> tuple[Tensor, Tensor]:
    """Three rows: whole, padded on the left, padded on the right."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :4] = mask[2, -3:] = 0
    return tiny_prompt(LENGTH, seed=3, batch=3), mask


def assert_same_curve(one: DensityCurve, other: DensityCurve, tolerance: float = 1e-5) -> None:
    for name in ("size", "total_variation", "edges", "entropy", "composition", "nucleus"):
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_importances_row_by_row_equal_those_that_are_held(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    model = tiny_model(family, dtype=dtype)
    ids, mask = padded_batch()
    with torch.no_grad():
        held, made = both_ways(monkeypatch, lambda: softtrace.edge_importance(model, ids, mask))
    assert made.shape == held.shape == (3, 3, 4, LENGTH)
    for one, other in zip(made.layers, held.layers, strict=True):
        assert isinstance(one, RowwiseEdges)
        assert not isinstance(other, RowwiseEdges)
        for ours, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["recorded", "recomputed", "kept"])
@pytest.mark.parametrize("family", FAMILIES)
def test_curves_row_by_row_equal_those_of_held_maps(
    monkeypatch: pytest.MonkeyPatch, family: str, attention: Any
) -> None:
    model = tiny_model(family)
    ids, mask = padded_batch()
    held, made = both_ways(
        monkeypatch,
        lambda: softtrace.density_curve(
            model, ids, mask, THRESHOLDS, attention=attention, composition=True, nucleus=True
        ),
    )
    assert_same_curve(made, held)


@pytest.mark.parametrize("attention", ["recorded", "recomputed", "kept"])
def test_curves_of_bfloat16_row_by_row_equal_those_of_held_maps(
    monkeypatch: pytest.MonkeyPatch, attention: Any
) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    ids, mask = padded_batch()
    held, made = both_ways(
        monkeypatch,
        lambda: softtrace.density_curve(model, ids, mask, THRESHOLDS, attention=attention),
    )
    assert_same_curve(made, held)


@pytest.mark.parametrize("attention", ["recomputed", "kept"])
def test_exact_runs_row_by_row_equal_those_of_held_maps(
    monkeypatch: pytest.MonkeyPatch, attention: Any
) -> None:
    model = tiny_model("llama")
    ids, mask = padded_batch()
    held, made = both_ways(
        monkeypatch,
        lambda: softtrace.density_curve(
            model, ids, mask, THRESHOLDS, attention=attention, exact=True, positions=[5, 8]
        ),
    )
    assert_same_curve(made, held)


@pytest.mark.thorough
@pytest.mark.parametrize("family", of_each_kind())
def test_every_kind_of_family_row_by_row(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Also those whose own code makes the whole map of a layer, and parallel layers."""
    kind, changes = VERIFIED[family]
    model = tiny(kind, **changes)
    ids = torch.randint(3, 60, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    held, made = both_ways(
        monkeypatch,
        lambda: softtrace.density_curve(model, ids, thresholds=THRESHOLDS, composition=True),
    )
    assert_same_curve(made, held)
    positions = softtrace.density_curve(
        model, ids, thresholds=THRESHOLDS, composition=True, positions=[4, -2]
    )
    assert_same_curve(of_positions(positions, [4, -2]), of_positions(held, [4, -2]))
    with torch.no_grad():
        every = softtrace.edge_importance(model, ids)
        some = softtrace.edge_importance(model, ids, positions=[7])
    assert some.shape[3] == 8  # tokens up to the chosen one
    for one, other in zip(some.layers, every.layers, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            own = theirs[..., :8, :8] if ours.dim() == 4 else theirs[:, :8]
            torch.testing.assert_close(ours, own, atol=1e-5, rtol=0)
    found = softtrace.extract_trace(some, size=20)
    expected = softtrace.extract_trace(every, position=7, size=20)
    assert found.total == expected.total
    assert found.importances == pytest.approx(expected.importances, abs=1e-5)


def of_positions(
    curve: DensityCurve, positions: list[int], rows: list[int] | None = None
) -> DensityCurve:
    """The curve at some positions alone, of all sequences unless some are named."""
    composition = curve.composition
    at = torch.tensor(rows or range(len(curve.edges)))[:, None], torch.tensor(positions)
    return DensityCurve(
        curve.thresholds,
        curve.size[:, *at],
        curve.total_variation[:, *at],
        curve.edges[at],
        curve.entropy[at],
        composition=None if composition is None else composition[:, *at],
    )


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("attention", ["recorded", "recomputed", "kept"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_positions_have_the_curves_they_have_among_all(
    request: pytest.FixtureRequest, family: str, attention: Any, long: bool
) -> None:
    model = tiny_model(family)
    ids, mask = padded_batch()
    every = softtrace.density_curve(
        model, ids, mask, THRESHOLDS, attention=attention, composition=True
    )
    if long:
        request.getfixturevalue("rowwise")
    some = softtrace.density_curve(
        model, ids, mask, THRESHOLDS, attention=attention, composition=True, positions=[6, -4]
    )
    assert some.size.shape == (len(THRESHOLDS), 3, LENGTH)
    for row, end in enumerate((LENGTH, LENGTH, LENGTH - 3)):  # of its real tokens
        ours, theirs = (of_positions(each, [6, end - 4], [row]) for each in (some, every))
        assert_same_curve(ours, theirs)
        others = [at for at in range(LENGTH) if at not in (6, end - 4)]
        assert some.size[:, row, others].isnan().all()
        assert some.total_variation[:, row, others].isnan().all()
        assert (some.edges[row, others] == 0).all()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_positions_equal_the_oracle(
    request: pytest.FixtureRequest, family: str, long: bool
) -> None:
    """Every edge that the position's literal trace has, through earlier tokens too, is kept."""
    model, ids = tiny_model(family, seed=1), tiny_prompt(LENGTH, seed=2)
    if long:
        request.getfixturevalue("rowwise")
    positions = [LENGTH - 4, LENGTH - 2]
    run = oracle.run_full(model, ids)
    curve = softtrace.density_curve(model, ids, thresholds=THRESHOLDS, positions=positions)
    importance = softtrace.edge_importance(model, ids, positions=positions)
    assert importance.shape[3] == LENGTH - 1  # tokens up to the last chosen one
    graph = oracle.build_graph(run)
    for position in positions:
        ordered = oracle.best_first(graph, position)
        assert curve.edges[0, position] == len(ordered)
        literal = oracle.threshold_curve(model, ids, run, ordered, position, THRESHOLDS)
        for index, (kept, expected) in enumerate(literal):
            assert curve.size[index, 0, position] * len(ordered) == pytest.approx(kept)
            assert curve.total_variation[index, 0, position] == pytest.approx(expected, abs=1e-5)
        for count in (1, 20, len(ordered) // 2):
            trace = softtrace.extract_trace(importance, position=position, size=count)
            assert trace.total == len(ordered)
            assert set(trace.edges) == {edge for edge, _ in ordered[:count]}
            theirs = dict(ordered)
            assert trace.importances == pytest.approx([theirs[e] for e in trace.edges], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_traces_row_by_row_equal_those_of_held_maps(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model = tiny_model("llama", dtype=dtype)
    ids, mask = padded_batch()
    with torch.no_grad():
        held, made = both_ways(
            monkeypatch,
            lambda: [
                softtrace.extract_trace(softtrace.edge_importance(model, ids, mask), row, at, size)
                for row, at in ((0, -1), (0, 5), (1, -1), (2, 6))
                for size in (0.05, 40, 1.0)
            ],
        )
    for one, other in zip(made, held, strict=True):
        assert one.edges == other.edges
        assert one.total == other.total


def test_few_values_are_held_to_find_where_a_trace_ends(
    rowwise: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model("llama", dtype=torch.float64), tiny_prompt(LENGTH)
    with torch.no_grad():
        importance = softtrace.edge_importance(model, ids)
    whole = softtrace.extract_trace(importance, size=1.0)
    monkeypatch.setattr("softtrace.graph.trace._AT_LEAST", 1)
    for count in (1, 7, 60):
        assert softtrace.extract_trace(importance, size=count).edges == whole.edges[:count]


def test_a_trace_is_found_where_single_rows_round_otherwise(rowwise: None) -> None:
    """Half precision: a row made alone may be a little below what it was in its block."""
    model, ids = tiny_model("llama"), tiny_prompt(LENGTH)
    with torch.no_grad():
        importance = softtrace.edge_importance(model, ids)

    class Lower(attention_maps.AttentionMap):
        def __init__(self, source: attention_maps.AttentionMap) -> None:
            self.source, self.shape, self.device = source, source.shape, source.device

        def rows(self, rows: attention_maps.Rows) -> Tensor:
            alone = isinstance(rows.at, slice) and rows.at.stop - rows.at.start == 1
            return self.source.rows(rows) * (0.95 if alone else 1)

    lowered = tuple(layer.with_attention(Lower(layer.attention_map)) for layer in importance.layers)
    changed = EdgeImportance(lowered, importance.visible, importance.valid)
    for count in (3, 30, 200):
        assert len(softtrace.extract_trace(changed, size=count).edges) == count


def test_the_last_layer_makes_rows_of_chosen_positions_alone(
    rowwise: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model("llama"), tiny_prompt(LENGTH)
    softtrace.attach(model)
    rows_of = SoftmaxMap.rows
    made: dict[int, int] = {}

    def counted(self: SoftmaxMap, rows: attention_maps.Rows) -> Tensor:
        found = rows_of(self, rows)
        made[id(self)] = made.get(id(self), 0) + found.shape[2]
        return found

    with torch.no_grad():
        recording_of = softtrace.attach(model)
        batch = recording_of.batch(ids)
        chosen = torch.zeros_like(batch.valid)
        chosen[:, 8] = True
        before, own = batch.up_to(chosen)
        assert own.shape == (1, 9)
        recording = recording_of.record(before, positions=own)
        assert recording.logits.shape == (1, recording_of.anatomy.vocabulary)
        monkeypatch.setattr(SoftmaxMap, "rows", counted)
        curve_of(
            recording_of, recording, recording.importance, [0.05, 0.01], positions=chosen[:, :9]
        )
    maps = [made.get(id(each), 0) for each in recording.attention]
    assert maps[-1] == 3  # its one row, for sizes of both thresholds at once and for masked runs
    assert all(each <= 3 * 9 for each in maps)


def test_nodes_that_reach_no_chosen_position_do_not_run() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(LENGTH)
    last = model.model.layers[-1].mlp.down_proj  # the hook's own module is narrowed after it
    seen: list[int] = []
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    softtrace.attach(model)  # sees the hook, which is not asked about later
    seen.clear()
    try:
        softtrace.density_curve(model, ids, thresholds=[1e-4], positions=[-1])
    finally:
        handle.remove()
    assert seen == [LENGTH, 1]  # recorded whole; masked where the prediction is read


def test_a_model_that_makes_its_own_maps_says_so(
    rowwise: None, caplog: pytest.LogCaptureFixture
) -> None:
    _say_held.cache_clear()
    model = tiny("bloom")
    for _ in range(2):
        softtrace.edge_importance(model, tiny_prompt(LENGTH))
    (said,) = [each.message for each in caplog.records if "held for every layer" in each.message]
    assert said.startswith("BloomAttention makes")


@pytest.mark.parametrize(
    "positions",
    [
        [LENGTH], [-LENGTH - 1], [], range(0), "last", [0.5], 3, [[0, 1]], [True, False],
        torch.zeros(1, LENGTH), torch.full((1, LENGTH), 2), torch.full((1, LENGTH), 0.5),
        torch.ones(LENGTH, dtype=torch.bool), torch.tensor(3), torch.tensor([0.5]),
    ],
)  # fmt: skip
def test_positions_that_there_are_not_are_refused(positions: Any) -> None:
    model, ids = tiny_model("llama"), tiny_prompt(LENGTH)
    for function in (softtrace.density_curve, softtrace.edge_importance):
        with pytest.raises(InvalidInputError, match="positions: found"):
            function(model, ids, positions=positions)


@pytest.mark.parametrize(
    "positions",
    [
        range(-3, 0), torch.tensor([9, 10, 11]), torch.tensor([9, 10, 11], dtype=torch.uint8),
        [9, -1, 11, -2, 9], iter([-1, -2, -3]), None,
    ],
)  # fmt: skip
def test_positions_can_be_given_in_several_ways(positions: Any) -> None:
    model, ids = tiny_model("llama"), tiny_prompt(LENGTH)
    if positions is None:
        positions = torch.zeros(1, LENGTH)
        positions[:, -3:] = 1
    curve = softtrace.density_curve(model, ids, thresholds=THRESHOLDS, positions=positions)
    assert curve.size.isfinite()[0, 0].tolist() == [False] * 9 + [True] * 3


def test_negative_positions_count_from_the_last_real_token() -> None:
    """Also where rows of unequal length are padded on the right, as tokenizers do it."""
    model, (ids, mask) = tiny_model("llama"), padded_batch()
    curve = softtrace.density_curve(model, ids, mask, THRESHOLDS, positions=[-1, -9])
    assert [row.nonzero()[:, 0].tolist() for row in curve.edges] == [
        [LENGTH - 9, LENGTH - 1],
        [LENGTH - 1],  # of its eight real tokens none is the ninth from the end
        [0, LENGTH - 4],
    ]
    with torch.no_grad():
        importance = softtrace.edge_importance(model, ids, mask, positions=[-1])
    last = softtrace.extract_trace(importance, 2, size=9)
    assert last == softtrace.extract_trace(importance, 2, LENGTH - 4, 9)
    assert {edge.target for edge in last.edges} <= set(range(LENGTH - 3))
    with pytest.raises(InvalidInputError, match="padding"):
        softtrace.extract_trace(importance, 2, -LENGTH)


def test_gradients_row_by_row_equal_those_of_held_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama", dtype=torch.float64), tiny_prompt(LENGTH)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        layers: tuple[LayerEdges, ...] = softtrace.edge_importance(model, ids).layers
        sum(part.square().sum() for layer in layers for part in layer).backward()  # type: ignore[union-attr]
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    for one, other in zip(*both_ways(monkeypatch, gradients), strict=True):
        torch.testing.assert_close(one, other)


def test_curves_of_chosen_positions_as_a_gpu_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = tiny_model("llama"), padded_batch()
    own = softtrace.density_curve(model, ids, mask, THRESHOLDS, positions=[5, -2], composition=True)
    monkeypatch.setattr("softtrace.density.sweep.traces_at", held_traces_at)
    assert_same_curve(
        softtrace.density_curve(model, ids, mask, THRESHOLDS, positions=[5, -2], composition=True),
        own,
    )
