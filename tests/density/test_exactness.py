"""The central promise: traces, sizes and distortions are those of the literal definitions.

Random models of every family against the oracle, every size from one edge to |E|.
"""

from __future__ import annotations

import itertools
import random
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import softtrace
from softtrace.graph.edges import Edge, EdgeImportance
from softtrace.graph.sizes import total_edges
from softtrace.graph.trace import extract_trace
from softtrace.model.loading import load_model, load_tokenizer
from tests.support import oracle
from tests.support.literal import differing_sizes, entry_values, made_up_importance, row_graph
from tests.support.tiny import tiny_model, tiny_prompt

SHIPPED = Path(__file__).parents[2] / "recipes" / "models" / "pystdlib-4m"
ROUNDING = 1e-5  # relative: RMSNorm modules compute in float32 even in a float64 model


class Case(NamedTuple):
    family: str
    length: int
    overrides: dict[str, Any]


CASES = [
    Case("llama", 7, {}),
    Case("llama", 5, {"attention_bias": True, "mlp_bias": True}),
    Case("llama", 6, {"num_key_value_heads": 4}),
    Case("llama", 6, {"num_key_value_heads": 1, "num_hidden_layers": 5}),
    Case("llama", 9, {"num_hidden_layers": 1}),
    Case("llama", 1, {}),
    Case("mistral", 8, {}),
    Case("mistral", 9, {"sliding_window": 2, "num_hidden_layers": 4}),
    Case("mistral", 6, {"sliding_window": None}),
    Case("mistral", 7, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    Case("qwen2", 7, {}),
    Case("qwen2", 8, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    Case("qwen2", 4, {"num_hidden_layers": 6}),
    Case("qwen2", 2, {"num_key_value_heads": 4}),
    Case("qwen3", 7, {}),
    Case("qwen3", 5, {"num_hidden_layers": 2, "attention_bias": True}),
    Case("qwen3", 6, {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}),
    Case("smollm3", 7, {}),
    Case("smollm3", 8, {"use_sliding_window": True, "sliding_window": 3}),
    Case("smollm3", 5, {"num_hidden_layers": 4, "no_rope_layer_interval": 4}),
    Case("gpt2", 7, {}),
    Case("gpt2", 6, {"scale_attn_by_inverse_layer_idx": True, "num_hidden_layers": 4}),
    Case("gpt2", 8, {"num_attention_heads": 2}),
    Case("gpt2", 5, {"tie_word_embeddings": False, "num_hidden_layers": 2}),
]


class Ready(NamedTuple):
    model: nn.Module
    input_ids: Tensor
    run: oracle.FullRun
    graph: nx.MultiDiGraph


def ready(number: int, dtype: torch.dtype) -> Ready:
    family, length, overrides = CASES[number]
    model = tiny_model(family, seed=100 + number, dtype=dtype, **overrides)
    input_ids = tiny_prompt(length, seed=200 + number)
    run = oracle.run_full(model, input_ids)
    return Ready(model, input_ids, run, oracle.build_graph(run))


def importance_of(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> EdgeImportance:
    with torch.no_grad():
        return softtrace.edge_importance(model, ids, mask)


def shifted(edges: tuple[Edge, ...], by: int) -> list[Edge]:
    return [edge._replace(target=edge.target - by, source=edge.source - by) for edge in edges]


def safe_thresholds(run: oracle.FullRun, count: int = 8) -> list[float]:
    """Thresholds from 0.95 to 1e-4, moved into the widest gap nearby: rounding flips no edge."""
    scores = sorted(run.importance.values())
    found = []
    for wanted in torch.logspace(-0.02, -4, count, dtype=torch.float64).tolist():
        near = [wanted / 1.2, *(s for s in scores if wanted / 1.2 < s < wanted * 1.03)]
        near.append(min(wanted * 1.03, 0.99))
        low, high = max(itertools.pairwise(near), key=lambda pair: pair[1] / pair[0])
        assert high / low > 1.0005
        found.append((low * high) ** 0.5)
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n].family}")
def test_traces_of_every_size_equal_the_oracles(number: int) -> None:
    model, input_ids, _, graph = ready(number, torch.float64)
    importance = importance_of(model, input_ids)
    totals = total_edges(importance)[0].tolist()
    length = len(totals)
    sizes_seen = sizes_differing = 0
    for position in range(length):
        total = oracle.reachable_edges(graph, position)
        assert totals[position] == total
        ordered = oracle.best_first(graph, position)
        whole = extract_trace(importance, position=position, size=total)
        assert whole.total == total
        sizes_differing += differing_sizes(whole.edges, ordered, ROUNDING)
        sizes_seen += total
        theirs = dict(ordered)
        for edge, score in zip(whole.edges, whole.importances, strict=True):
            assert abs(score - theirs[edge]) <= ROUNDING * theirs[edge]
        ours = list(entry_values(list(zip(whole.edges, whole.importances, strict=True))).values())
        assert ours == sorted(ours, reverse=True)
        assert len(ours) == total
        for value, expected in zip(ours, entry_values(ordered).values(), strict=True):
            assert abs(value - expected) <= ROUNDING * expected
        if position in (length - 1, length // 2):  # a trace of n edges is the first n of the whole
            # every eighth size, of each case others: each takes a search of its own
            for size in {0, 1, *range(number % 8, total, 8), total - 1, total}:
                trace = extract_trace(importance, position=position, size=size)
                assert trace.edges == whole.edges[:size]
                assert trace.importances == whole.importances[:size]
                assert trace.total == total
    assert sizes_differing <= 0.01 * sizes_seen  # only rounding may decide, and rarely does


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n].family}")
def test_curves_equal_the_oracles(number: int) -> None:
    """One masked run a threshold (float32) against one oracle run a threshold and position."""
    model, input_ids, run, graph = ready(number, torch.float32)
    thresholds = safe_thresholds(run)
    curve = softtrace.density_curve(model, input_ids, thresholds=thresholds)
    assert curve.thresholds.tolist() == pytest.approx(sorted(thresholds, reverse=True))
    length = input_ids.shape[1]
    for position in {0, length // 2, length - 1}:
        ordered = oracle.best_first(graph, position)
        full = run.logits[position].double().softmax(-1)
        assert curve.edges[0, position] == len(ordered)
        assert curve.entropy[0, position].item() == pytest.approx(
            -(full * full.log()).sum().item(), abs=1e-4
        )
        taus = curve.thresholds.tolist()
        literal = oracle.threshold_curve(model, input_ids, run, ordered, position, taus)
        for index, (kept, expected) in enumerate(literal):
            assert curve.size[index, 0, position].item() * len(ordered) == pytest.approx(kept)
            assert curve.total_variation[index, 0, position].item() == pytest.approx(
                expected, abs=1e-5
            )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("number", [0, 3, 7, 11, 14, 18, 21], ids=lambda n: f"{n}")
def test_rows_of_a_padded_batch_equal_the_oracles(number: int, side: str) -> None:
    model, input_ids, run, graph = ready(number, torch.float64)
    length, pad = input_ids.shape[1], 3
    ids = tiny_prompt(length + pad, seed=1, batch=3)
    mask = torch.ones_like(ids)
    start = pad if side == "left" else 0
    ids[1, start : start + length] = input_ids[0]
    empty = slice(0, pad) if side == "left" else slice(length, None)
    ids[1, empty], mask[1, empty] = 0, 0
    mask[2, 0 if side == "left" else -1] = 0
    importance = importance_of(model, ids, mask)
    thresholds = safe_thresholds(run, 5)
    curve = softtrace.density_curve(model, ids, mask, thresholds=thresholds)
    alone = softtrace.density_curve(model, input_ids, thresholds=thresholds)
    assert torch.equal(curve.edges[1, start : start + length], alone.edges[0])
    assert (curve.edges[1, empty] == 0).all()
    assert curve.size[:, 1, empty].isnan().all()
    inside = slice(start, start + length)
    torch.testing.assert_close(curve.size[:, 1, inside], alone.size[:, 0])
    torch.testing.assert_close(
        curve.total_variation[:, 1, inside], alone.total_variation[:, 0], atol=1e-6, rtol=0
    )
    for position in range(length):
        ordered = oracle.best_first(graph, position)
        trace = extract_trace(importance, 1, start + position, size=len(ordered))
        differing = differing_sizes(shifted(trace.edges, start), ordered, ROUNDING)
        assert differing <= 0.01 * len(ordered)
        for index, tau in enumerate(curve.thresholds.tolist()):
            kept = len(oracle.trace_at_threshold(ordered, tau))
            size = curve.size[index, 1, start + position].item()
            assert size * len(ordered) == pytest.approx(kept)


@pytest.mark.parametrize("levels", [1, 2, 5, 12, None])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_ties_change_only_the_order_inside_a_tie(levels: int | None, seed: int) -> None:
    """Importances of few distinct values, zeros among them; the same numbers go to the oracle."""
    windows = ((None,), (2, None), (3,))[seed]
    importance = made_up_importance(seed, levels=levels, windows=windows)
    if levels is not None:  # existing edges of importance 0 count too
        importance.layers[1].attention[0, 0] = 0
    graph = row_graph(importance)
    for position in (2, 4):
        ordered = oracle.best_first(graph, position)
        whole = extract_trace(importance, position=position, size=len(ordered))
        differing = differing_sizes(whole.edges, ordered, 0.0)
        if levels is None:
            assert differing == 0
            assert list(whole.edges) == [edge for edge, _ in ordered]
            assert list(whole.importances) == [score for _, score in ordered]
        for size in range(len(ordered) + 1):
            trace = extract_trace(importance, position=position, size=size)
            assert trace.edges == whole.edges[:size]
            reached = {("mlp", importance.shape[0] - 1, position)}
            for edge in trace.edges:  # connected at every step
                assert oracle.target_node(edge) in reached
                reached.add(oracle.source_node(edge))


def test_ties_of_a_real_model() -> None:
    """Equal tokens without positions make equal edges: a NoPE model that reads one token thrice."""
    model = tiny_model("smollm3", seed=5, dtype=torch.float64, no_rope_layer_interval=1)
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.k_proj.weight.zero_()  # attention is uniform, so sources tie exactly
        model.model.layers[1].mlp.down_proj.weight.zero_()  # type: ignore[union-attr, index]
    input_ids = torch.tensor([[9, 9, 9, 9, 30]])
    importance = importance_of(model, input_ids)
    scores = importance.layers[0].attention[0, 0, 4, :4]
    assert torch.unique(scores).numel() < 4
    assert (importance.layers[1].mlp == 0).all()
    graph = row_graph(importance)
    tied = 0
    for position in range(5):
        ordered = oracle.best_first(graph, position)
        whole = extract_trace(importance, position=position, size=1.0)
        differing_sizes(whole.edges, ordered, 0.0)
        values = list(entry_values(ordered).values())
        tied += len(values) - len(set(values))
        by_oracle = oracle.best_first(
            oracle.build_graph(oracle.run_full(model, input_ids)), position
        )
        differing_sizes(whole.edges, by_oracle, ROUNDING)
    assert tied > 50


def test_the_shipped_model_on_real_text() -> None:
    model, tokenizer = load_model(SHIPPED), load_tokenizer(SHIPPED)
    text = Path(sysconfig.get_paths()["stdlib"], "bisect.py").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][:, :200]
    start = random.Random(0).randrange(100)
    input_ids = tokens[:, start : start + 13]
    run = oracle.run_full(model, input_ids)
    graph = oracle.build_graph(run)
    importance = importance_of(model, input_ids)
    thresholds = safe_thresholds(run, 5)
    curve = softtrace.density_curve(model, input_ids, thresholds=thresholds)
    assert (curve.total_variation[0] > curve.total_variation[-1]).all()
    for position in (5, 12):
        ordered = oracle.best_first(graph, position)
        total = len(ordered)
        assert curve.edges[0, position] == total
        values = entry_values(ordered)
        for size in (1, 2, 7, 31, 100, total // 2, total - 1, total):
            trace = extract_trace(importance, position=position, size=size)
            expected = {edge for edge, _ in ordered[:size]}
            cut = values[ordered[size - 1][0]]
            questionable = set(trace.edges) ^ expected
            assert all(abs(values[edge] - cut) <= 1e-4 * cut for edge in questionable)
            assert len(questionable) <= 2
        full = run.logits[position].double().softmax(-1)
        for index, tau in enumerate(curve.thresholds.tolist()):
            kept = {edge for edge, _ in oracle.trace_at_threshold(ordered, tau)}
            masked = oracle.masked_distribution(model, input_ids, kept, position, run.attention)
            assert curve.size[index, 0, position].item() * total == pytest.approx(len(kept))
            assert curve.total_variation[index, 0, position].item() == pytest.approx(
                oracle.total_variation(full, masked), abs=1e-5
            )
