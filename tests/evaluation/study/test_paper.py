"""``study --paper``: every number against the oracle's graph, search and masked runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor

from softtrace.density.components import component_names
from softtrace.density.paper import COMMON_SIZES, NUCLEUS_CANDIDATES, NUCLEUS_TARGETS, PAPER_SIZES
from softtrace.evaluation.bootstrap import draw_counts
from softtrace.evaluation.study.paper import PaperReadings, read_paper
from softtrace.evaluation.study.paper_answers import (
    COMPONENT_SIZES,
    PAPER_ANSWERS,
    component_results,
    density_correlations,
    presence,
)
from softtrace.evaluation.study.results import results_of
from softtrace.graph import reach
from softtrace.graph.batch import Batch
from softtrace.graph.edges import Edge
from softtrace.graph.orders import NEVER, random_order
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument
from tests.density.test_paper import top_list
from tests.graph.test_orders import listed
from tests.support import oracle
from tests.support.tiny import VOCABULARY, tiny_model, tiny_prompt

BLOCKS = tiny_prompt(7, seed=3, batch=2)
COUNTS = torch.arange(VOCABULARY) % 7
LAYERS, HEADS = 3, 4
RESIDUAL = ("attention_residual", "mlp_residual")


def read(model: Any, attention: Any = "recomputed", blocks: Tensor = BLOCKS) -> PaperReadings:
    return read_paper(
        model, blocks, COUNTS, attention=attention, seed=11, progress=lambda count: None
    )


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of values without ties."""
    ranks = [each.flatten().argsort().argsort().double() for each in (x, y)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "recomputed"), ("llama", "recorded"), ("llama", "kept"), ("gpt2", "recomputed")],
)
def test_every_number_is_what_the_definitions_say(family: str, attention: Any) -> None:
    model = tiny_model(family, dtype=torch.float64)
    found = read(model, attention)
    for row in range(len(BLOCKS)):
        check_row(model, found, row, attention)


def check_row(model: Any, found: PaperReadings, row: int, attention: str) -> None:
    ids, target = BLOCKS[row, :-1], int(BLOCKS[row, -1])
    run = oracle.run_full(model, ids)
    graph = oracle.build_graph(run)
    order = [edge for edge, _ in oracle.best_first(graph, -1)]
    importance = attach(model).record(attach(model).batch(ids[None])).importance
    drawn = listed(random_order(importance, seed=11 + row))
    total = oracle.reachable_edges(graph, -1)
    assert int(found.edges[row]) == total == len(order)
    full = run.logits[-1].double().softmax(-1)
    residual = {edge for edge in run.vectors if edge.kind.endswith("residual")}

    def predict(kept: set[Edge]) -> Tensor:
        if attention == "kept":
            kept = kept | {edge for edge in run.vectors if edge.kind == "attention"}
        held = run.attention if attention == "recorded" else None
        return oracle.masked_distribution(model, ids, kept, -1, held)

    logs = []
    for at, size in enumerate(PAPER_SIZES):
        count = int(size * total)
        trace = set(order[:count])
        p = predict(trace)
        assert float(found.sizes[row, at]) == pytest.approx(count / total)
        for name, q in (
            ("trace", p),
            ("inverse", predict((set(run.vectors) - trace) | residual)),
            ("random", predict(set(drawn[:count]) | residual)),
        ):
            expected = oracle.total_variation(full, q)
            assert float(getattr(found, name)[row, at]) == pytest.approx(expected, abs=1e-5), name
        assert float(found.loss[row, at]) == pytest.approx(-math.log(p[target]), abs=1e-4)
        logs.append((math.log10(max(count / total, 1e-8)), float(found.trace[row, at])))
        if p.max() - p.min() > 1e-9:  # otherwise the order of tokens is nobody's
            check_likely(found, row, at, full, p, target)
        inside = trace or {order[0]}
        for number, kinds in enumerate(
            (["attention"], ["mlp"], ["attention_residual", "mlp_residual"])
        ):
            share = sum(edge.kind in kinds for edge in inside) / len(inside)
            assert float(found.kinds[row, at, number]) == pytest.approx(share)
        for number, group in enumerate(np.array_split(np.arange(LAYERS), 4)):
            share = sum(edge.layer in group for edge in inside) / len(inside)
            assert float(found.depths[row, at, number]) == pytest.approx(share)
        part = graph.edge_subgraph(
            [(oracle.source_node(e), oracle.target_node(e), e) for e in trace]
        )
        output = oracle.output_node(graph, -1)
        joined = output in part and any(node[0] == "embed" for node in nx.ancestors(part, output))
        assert bool(found.sizes[row, at] >= found.connection[row]) == joined
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(logs))
    assert float(found.auc[row]) == pytest.approx(area, abs=1e-5)
    entropy = -float((full * full.log()).sum())
    assert float(found.entropy[row]) == pytest.approx(entropy, abs=1e-5)
    check_entries(found, row, order)


def check_likely(
    found: PaperReadings, row: int, at: int, full: Tensor, p: Tensor, target: int
) -> None:
    equal = [
        k for k in NUCLEUS_CANDIDATES if top_list(full.log(), k / 100) == top_list(p.log(), k / 100)
    ]
    assert int(found.nucleus[row, at]) == max(equal, default=0)
    tokens = [token for token in top_list(p.log(), 0.6)[:5] if COUNTS[token]]
    frequency = sum(int(COUNTS[token]) for token in tokens) / int(COUNTS.sum())
    expected = frequency / len(tokens) if tokens else math.nan
    assert float(found.frequency[row, at]) == pytest.approx(expected, nan_ok=True)
    assert float(found.rank[row, at]) == sum(p[each] > p[target] for each in range(len(p))) + 1


def check_entries(found: PaperReadings, row: int, order: list[Edge]) -> None:
    sizes = {}
    for count, edge in enumerate(order, start=1):
        name = {"attention": f"L{edge.layer}H{edge.head}", "mlp": f"L{edge.layer}MLP"}
        if edge.kind in name:
            sizes.setdefault(name[edge.kind], count / len(order))
    for name, entry in zip(
        component_names(LAYERS, HEADS), found.entries[row].tolist(), strict=True
    ):
        assert entry == pytest.approx(sizes[name])


def test_equally_likely_tokens_share_their_rank() -> None:
    """An empty trace predicts nothing: the true token is not the first of all."""
    found = read(tiny_model("llama"))
    assert float(found.sizes[0, 0]) == 0.0
    assert float(found.rank[0, 0]) == (VOCABULARY + 1) / 2
    assert float(found.loss[0, 0]) == pytest.approx(math.log(VOCABULARY))


def test_masks_are_run_in_parts_where_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(tiny_model("llama"))
    sizes, run = set(), Instrument.masked_hidden

    def noted(instrument: Instrument, batch: Batch, *args: Any, **options: Any) -> torch.Tensor:
        sizes.add(len(batch.valid))
        return run(instrument, batch, *args, **options)

    monkeypatch.setattr(Instrument, "masked_hidden", noted)
    monkeypatch.setattr(reach, "_MASK_ELEMENTS", 3 * 4 * 36 * 5)
    parts = read(tiny_model("llama"))
    assert max(sizes) == 5
    for each in fields(whole):
        one, two = getattr(whole, each.name), getattr(parts, each.name)
        torch.testing.assert_close(one, two, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def several() -> PaperReadings:
    return read(tiny_model("llama"), blocks=tiny_prompt(7, seed=5, batch=9))


def test_answers_are_the_statistics_of_the_figures(several: PaperReadings) -> None:
    results = results_of(PAPER_ANSWERS, [several], resamples=20, seed=0)
    assert list(results) == [answer.key for answer in PAPER_ANSWERS]
    values = {key: np.asarray(each["models"][0]["value"]) for key, each in results.items()}
    for key, result in results.items():
        low, high = (np.asarray(result["models"][0][end]) for end in ("low", "high"))
        assert (low <= high)[~np.isnan(low)].all(), key
        assert result["difference"] is None

    sizes = several.sizes.numpy()
    for name in ("trace", "inverse", "random"):
        rows = [
            np.interp(COMMON_SIZES, own, each)
            for own, each in zip(sizes, getattr(several, name).numpy(), strict=True)
        ]
        np.testing.assert_allclose(values[f"tv/{name}"], np.mean(rows, axis=0), atol=1e-6)
    for at, k in enumerate(NUCLEUS_TARGETS):
        first = sorted(
            next(s for s, nu in zip(own, each, strict=True) if nu >= k)
            for own, each in zip(sizes, several.nucleus.tolist(), strict=True)
        )
        assert values["nucleus"][at].tolist() == [first[2], first[4], first[6]]
    rho = spearman(several.entropy, several.auc)
    assert float(values["entropy_auc"]) == pytest.approx(rho)
    assert values["auc"] == pytest.approx(float(several.auc.mean()))
    np.testing.assert_allclose(
        values["connected"],
        [(several.connection <= size).double().mean() for size in COMMON_SIZES],
    )


def test_components_are_counted_over_the_inputs(several: PaperReadings) -> None:
    results = results_of(PAPER_ANSWERS, [several], resamples=20, seed=0)
    names = component_names(LAYERS, HEADS)
    found = component_results(several, names)
    assert found["names"] == names
    for at, size in enumerate(COMPONENT_SIZES):
        expected = [float((column <= size).double().mean()) for column in several.entries.T]
        assert found["frequency"][at] == pytest.approx(expected)
        share = results["components/share"]["models"][0]["value"][at]
        assert share == pytest.approx(np.mean(expected))
        if not sum(expected):
            assert found["lorenz"][at] is None
            continue
        running = np.cumsum([0, *sorted(expected, reverse=True)]) / sum(expected)
        assert found["lorenz"][at] == pytest.approx(running.tolist())
        mean_difference = np.mean([abs(a - b) for a in expected for b in expected])
        gini = mean_difference / 2 / np.mean(expected)
        assert results["components/gini"]["models"][0]["value"][at] == pytest.approx(gini)


def test_a_resample_of_the_gini_is_that_of_the_inputs_written_out(several: PaperReadings) -> None:
    counts = draw_counts(9, 4, seed=1)
    statistic = next(a for a in PAPER_ANSWERS if a.key == "components/gini").of(several)
    drawn = statistic(counts)
    for row, own in enumerate(counts.long().tolist()):
        chosen = torch.tensor([at for at, times in enumerate(own) for _ in range(times)])
        written = PaperReadings(**{k: v[chosen] for k, v in vars(several).items()})
        again = next(a for a in PAPER_ANSWERS if a.key == "components/gini").of(written)
        torch.testing.assert_close(drawn[row], again(torch.ones(1, 9, dtype=torch.float64))[0],
                                   equal_nan=True)  # fmt: skip
    assert presence(several).shape == (9, 8, LAYERS * (HEADS + 1))


def test_two_models_have_a_paired_difference(several: PaperReadings) -> None:
    results = results_of(PAPER_ANSWERS, [several, several], resamples=10, seed=0)
    assert results["auc"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_densities_of_any_number_of_models_are_correlated_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(6, 5, generator=generator)
    densities = [first, -first, torch.rand(6, 5, generator=generator)]
    found = density_correlations(densities, resamples=30, seed=0)
    assert [pair["models"] for pair in found] == [[0, 1], [0, 2], [1, 2]]
    assert found[0]["value"] == pytest.approx(-1)
    expected = spearman(densities[0], densities[2])
    assert found[1]["value"] == pytest.approx(expected)
    assert density_correlations([first], resamples=30, seed=0) == []


def test_what_comes_with_the_last_edge_is_there_at_size_1(
    several: PaperReadings, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = replace(several, connection=torch.ones_like(several.connection))
    result = results_of(PAPER_ANSWERS, [late], resamples=2, seed=0)["connected"]
    assert result["models"][0]["value"][-2:] == [0.0, 1.0]
    total = int(several.edges[0])
    monkeypatch.setattr(
        "softtrace.evaluation.study.paper.component_entries",
        lambda ranks: torch.tensor([total // 2, total, NEVER]),
    )
    entries = read(tiny_model("llama"), blocks=tiny_prompt(7, seed=5, batch=1)).entries
    assert entries.tolist() == [[total // 2 / total, 1.0, math.inf]]
