"""Orders of edges: prefixes are the searches' subgraphs, grown from the output, of exact size."""

from __future__ import annotations

import random
from collections.abc import Callable

import networkx as nx
import pytest
import torch

from softtrace.errors import InvalidInputError
from softtrace.graph.edges import EDGE_KINDS, Edge, EdgeImportance, LayerEdges
from softtrace.graph.orders import (
    NEVER,
    Ranks,
    complement,
    connected_from,
    edges_entered,
    first_edges,
    random_order,
    search_order,
    with_residuals,
)
from tests.support import oracle
from tests.support.literal import (
    edges_of,
    ends_of,
    every_edge,
    made_up_importance,
    parallel_layers,
    row_graph,
    value_of,
)

VALID = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
LAYOUTS = [(), (0,), (1,), (0, 1, 2)]


def made(parallel: tuple[int, ...] = ()) -> EdgeImportance:
    return made_up_importance(3, valid=VALID, windows=(None, 3), parallel=parallel)


def listed(ranks: Ranks) -> list[Edge]:
    """Edges in order of entry, read off one by one."""
    heads, length, _ = ranks[0].attention.shape
    whole = [layer.map(lambda part: part[None]) for layer in ranks]
    found = {
        int(value_of(whole, 0, edge)): edge for edge in every_edge(len(ranks), heads, length)
        if value_of(whole, 0, edge) != float(NEVER)
    }  # fmt: skip
    assert sorted(found) == list(range(len(found)))
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize("parallel", LAYOUTS)
@pytest.mark.parametrize(("row", "position"), [(0, -1), (0, 2), (1, -1)])
def test_the_search_order_is_the_oracles(
    parallel: tuple[int, ...], row: int, position: int
) -> None:
    importance = made(parallel)
    expected = oracle.best_first(row_graph(importance, row), position)
    assert listed(search_order(importance, row, position)) == [edge for edge, _ in expected]


@pytest.mark.parametrize("order", [search_order, random_order])
@pytest.mark.parametrize(("row", "position"), [(0, 5), (0, -6), (1, 0), (1, -4), (2, -1)])
def test_only_real_tokens_have_an_order(
    order: Callable[..., Ranks], row: int, position: int
) -> None:
    """The last three of five tokens are all that the second row has."""
    with pytest.raises(InvalidInputError):
        order(made(), row, position)


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_a_random_order_grows_from_the_output(parallel: tuple[int, ...]) -> None:
    """Every edge enters a node reached before; a node's attention edges come after its others."""
    importance = made(parallel)
    graph = row_graph(importance)
    order = listed(random_order(importance, 0, -1, seed=4))
    assert len(order) == oracle.reachable_edges(graph, -1)
    reached = {oracle.output_node(graph, -1)}
    seen_attention = set()
    for edge in order:
        source, target = ends_of(edge, parallel_layers(importance))
        assert target in reached
        reached.add(source)
        if edge.kind == "attention":
            seen_attention.add(target)
        else:
            assert target not in seen_attention


def test_a_random_order_follows_its_seed_and_draws_nodes_alike() -> None:
    """The authors' rule written out with a graph: a node, then its next edge."""
    importance = made()
    orders = [listed(random_order(importance, 0, -1, seed=seed)) for seed in range(300)]
    assert orders[5] == listed(random_order(importance, 0, -1, seed=5))
    assert orders[5] != orders[6]
    graph, draw = row_graph(importance), random.Random(0)
    expected = [literal_growth(graph, draw) for _ in range(300)]
    for step in (1, 4, 12):  # how often attention has entered by then, within chance
        ours, theirs = (
            sum(e.kind == "attention" for order in each for e in order[:step]) / (300 * step)
            for each in (orders, expected)
        )
        assert abs(ours - theirs) < 0.06


def literal_growth(graph: nx.MultiDiGraph, draw: random.Random) -> list[Edge]:
    output = oracle.output_node(graph, -1)
    taken: list[Edge] = []
    reached = [output]
    while True:
        open_nodes = [
            node for node in reached
            if any(edge not in taken for _, _, edge in graph.in_edges(node, keys=True))
        ]  # fmt: skip
        if not open_nodes:
            return taken
        node = draw.choice(open_nodes)
        left = [e for _, _, e in graph.in_edges(node, keys=True) if e not in taken]
        edge = draw.choice([e for e in left if e.kind != "attention"] or left)
        taken.append(edge)
        if (source := oracle.source_node(edge)) not in reached:
            reached.append(source)


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_masks_counts_and_the_path_to_the_input_are_those_of_the_prefix(
    parallel: tuple[int, ...],
) -> None:
    importance = made(parallel)
    ranks = search_order(importance, 0, -1)
    order, existing = listed(ranks), edges_of(importance, 0)
    counts = [0, 0, 1, 7, 30, len(order)]
    masks = first_edges(ranks, torch.tensor(counts))
    there = tuple(layer.map(lambda part: part[:1]) for layer in importance.existing())
    others, kept = complement(masks, there), with_residuals(masks, there)
    numbers = edges_entered(ranks, torch.tensor(counts))
    for at, count in enumerate(counts):
        inside = set(order[:count])
        residual = {e for e in existing if e.kind.endswith("residual")}
        assert edges_in(masks, at) == inside
        assert edges_in(others, at) == (set(existing) - inside) | residual
        assert edges_in(kept, at) == inside | residual
        for layer in range(3):
            for number, kind in enumerate(EDGE_KINDS):
                expected = sum(e.kind == kind and e.layer == layer for e in inside)
                assert numbers[at, layer, number] == expected
    graph = row_graph(importance)
    parents = parallel_layers(importance)
    for count in range(1, len(order) + 1):
        part = graph.edge_subgraph([(*ends_of(e, parents), e) for e in order[:count]])
        connected = any(
            ("embed", token) in part and nx.has_path(part, ("embed", token), ("mlp", 2, 4))
            for token in range(5)
        )
        assert connected == (count >= connected_from(ranks))


def edges_in(masks: tuple[LayerEdges, ...], row: int) -> set[Edge]:
    heads, length, _ = masks[0].attention.shape[1:]
    return {e for e in every_edge(len(masks), heads, length) if value_of(masks, row, e)}


def test_padding_has_no_order() -> None:
    with pytest.raises(InvalidInputError, match="padding"):
        search_order(made(), 1, 0)
