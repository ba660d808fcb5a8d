"""A slow, literal reference for the graph, its importances, traces and masked runs.

Written from the definitions alone, for one unpadded prompt at a time: every edge's vector is
materialised, the search is a heap over a networkx graph, a masked run is a hand-written forward.
The fast implementation is tested against this file, so nothing of it is imported here but the
name of an edge. Source: Kervadec et al., arXiv 2605.27033, section 3.

Nodes are tuples: ``("embed", t)``, ``("attn", layer, t)`` and ``("mlp", layer, t)``.

Exactness: the RMSNorm modules of transformers compute in float32 even in a float64 model. Calling
them keeps the oracle equal to the model, but two float64 routes that differ in their last bit may,
rarely, differ by a float32 rounding after a norm. GPT-2's LayerNorm has no such step.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, nn

from softtrace.graph.edges import Edge
from tests.support.oracle_blocks import (
    Module,
    blocks,
    embed,
    final_norm,
    is_visible,
    probabilities_values,
)

Node = tuple[str, int] | tuple[str, int, int]
Ordered = list[tuple[Edge, float]]  # edges and their importance, in order of entry


@contextmanager
def evaluating(model: Module) -> Iterator[Module]:
    """Eval mode (no dropout) without gradients; every module's own flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, flag in flags:
            module.training = flag


def one_prompt(input_ids: Tensor) -> Tensor:
    """[T] from [T] or [1, T]."""
    if input_ids.dim() != 1 and input_ids.shape[:-1] != (1,):
        raise ValueError(f"one prompt at a time, not {tuple(input_ids.shape)}")
    return input_ids.flatten()


def target_node(edge: Edge) -> Node:
    """The node the edge adds into."""
    return ("attn" if edge.kind.startswith("attention") else "mlp", edge.layer, edge.target)


def source_node(edge: Edge) -> Node:
    """The node the edge reads."""
    if edge.kind.startswith("mlp"):
        return ("attn", edge.layer, edge.source)
    return ("mlp", edge.layer - 1, edge.source) if edge.layer else ("embed", edge.source)


@dataclass(frozen=True)
class FullRun:
    """What a full run of one prompt of T tokens left behind.

    Attributes:
        logits: ``[T, vocabulary]``, in the model's dtype.
        nodes: the residual stream at every node, a [d] vector each.
        vectors: what every existing edge carries, a [d] vector each. A layer's edges come in the
            order residual, then attention by (head, source), node by node.
        importance: the share of every existing edge in its node (float64).
        attention: the probabilities A ``[H, T, S]`` of every layer.
    """

    logits: Tensor
    nodes: dict[Node, Tensor]
    vectors: dict[Edge, Tensor]
    importance: dict[Edge, float]
    attention: list[Tensor]


def assert_same(parts: Tensor, whole: Tensor, dtype: torch.dtype) -> None:
    """Require equality up to the rounding of ``dtype``."""
    error = (parts.double() - whole.double()).abs().max().item()
    bound = 1000 * torch.finfo(dtype).eps * (1 + whole.abs().max().item())
    assert error <= bound, f"the parts of a node miss it by {error:.3g}"


def run_full(model: Module, input_ids: Tensor) -> FullRun:
    """Run one prompt layer by layer, materialising every edge's vector.

    An after-attention node is computed by the model's own projection, then required to be the sum
    of its edges' vectors and the projection's bias, which is a constant of the node and no edge.
    An after-MLP node is that sum by definition; the MLP's edge carries its biases too.
    """
    vectors: dict[Edge, Tensor] = {}
    attention: list[Tensor] = []
    with evaluating(model):
        x = embed(model, one_prompt(input_ids))
        nodes: dict[Node, Tensor] = {("embed", t): x[t] for t in range(len(x))}
        for layer, block in enumerate(blocks(model)):
            a, v = probabilities_values(model, block, x)
            attention.append(a)
            carried = torch.einsum("hsc,hcd->hsd", v, block.output_weight)
            after = x + block.output_projection((a @ v).transpose(0, 1).flatten(1)[None])[0]
            bias = block.output_projection.bias
            for t in range(len(x)):
                edges = {Edge("attention_residual", layer, t, -1, t): x[t]}
                for h in range(len(a)):
                    for s in range(t + 1):
                        if is_visible(t, s, block.window):
                            edges[Edge("attention", layer, t, h, s)] = a[h, t, s] * carried[h, s]
                total = torch.stack(list(edges.values())).sum(0)
                assert_same(total if bias is None else total + bias, after[t], x.dtype)
                vectors.update(edges)
                nodes["attn", layer, t] = after[t]
            added = block.mlp(block.mlp_norm(after)[None])[0]
            x = after + added
            for t in range(len(x)):
                vectors[Edge("mlp_residual", layer, t, -1, t)] = after[t]
                vectors[Edge("mlp", layer, t, -1, t)] = added[t]
                nodes["mlp", layer, t] = x[t]
        logits = model.lm_head(final_norm(model)(x))
        return FullRun(logits, nodes, vectors, node_shares(model, nodes, vectors), attention)


def linearised(norm: Module, part: Tensor, full: Tensor) -> Tensor:
    """The share of ``part`` in ``norm(full)``: the scale is that of ``full``, the bias no part."""
    part, full, weight = part.double(), full.double(), norm.weight.double()
    if isinstance(norm, nn.LayerNorm):
        return (part - part.mean()) * weight / (full.var(correction=0) + norm.eps).sqrt()
    return part * weight / (full.pow(2).mean() + norm.variance_epsilon).sqrt()


def node_shares(
    model: Module, nodes: dict[Node, Tensor], vectors: dict[Edge, Tensor]
) -> dict[Edge, float]:
    """Importance: L1 norm over the sum of L1 norms into the same node, in float64.

    Into the last after-MLP nodes the linearised final norm is applied first. A node all of whose
    edges carry zero gives each of them importance 0.
    """
    last, norm = max(edge.layer for edge in vectors), final_norm(model)
    into: dict[Node, dict[Edge, Tensor]] = {}
    for edge, vector in vectors.items():
        into.setdefault(target_node(edge), {})[edge] = vector
    importance: dict[Edge, float] = {}
    for node, parts in into.items():
        if node[:2] == ("mlp", last):
            full = nodes[node]
            parts = {edge: linearised(norm, part, full) for edge, part in parts.items()}
            whole = norm(full) if getattr(norm, "bias", None) is None else norm(full) - norm.bias
            assert_same(torch.stack(list(parts.values())).sum(0), whole, torch.float32)
        sizes = {edge: part.double().abs().sum().item() for edge, part in parts.items()}
        total = math.fsum(sizes.values())
        importance.update({e: size / total if total else 0.0 for e, size in sizes.items()})
    return importance


def build_graph(run: FullRun) -> nx.MultiDiGraph:
    """The graph: one multi-edge, keyed by its :class:`Edge`, for every edge that exists.

    Each has the attributes ``edge`` and ``importance``; the graph has ``layers`` and ``length``.
    """
    graph = nx.MultiDiGraph(layers=len(run.attention), length=len(run.logits))
    graph.add_nodes_from(run.nodes)
    for edge, importance in run.importance.items():
        ends = source_node(edge), target_node(edge)
        graph.add_edge(*ends, key=edge, edge=edge, importance=importance)
    return graph


def output_node(graph: nx.MultiDiGraph, position: int) -> Node:
    """The node whose prediction is explained; a negative position counts from the end."""
    length = graph.graph["length"]
    if not -length <= position < length:
        raise IndexError(f"position {position} of a prompt of {length} tokens")
    return ("mlp", graph.graph["layers"] - 1, position % length)


def reachable_edges(graph: nx.MultiDiGraph, position: int) -> int:
    """|E|: how many edges can reach the output node of ``position``."""
    output = output_node(graph, position)
    reaching = nx.ancestors(graph, output) | {output}
    return sum(1 for _, target in graph.edges() if target in reaching)


def best_first(graph: nx.MultiDiGraph, position: int) -> Ordered:
    """All |E| edges with their importance, in the order in which the search adds them.

    Backwards from the output node, the most important edge into the nodes reached so far comes
    next. Ties go to the edge that became available first.
    """
    heap: list[tuple[float, int, Edge, Node]] = []
    reached: set[Node] = set()
    clock = itertools.count()

    def reach(node: Node) -> None:
        reached.add(node)
        for source, _, data in graph.in_edges(node, data=True):
            heapq.heappush(heap, (-data["importance"], next(clock), data["edge"], source))

    ordered: Ordered = []
    reach(output_node(graph, position))
    while heap:
        negative, _, edge, source = heapq.heappop(heap)
        ordered.append((edge, -negative))
        if source not in reached:
            reach(source)
    return ordered


def trace_at_threshold(ordered: Ordered, tau: float) -> Ordered:
    """The prefix of a best-first order whose running minimum of importances is at least ``tau``."""
    lowest = math.inf
    for count, (_, importance) in enumerate(ordered):
        lowest = min(lowest, importance)
        if lowest < tau:
            return ordered[:count]
    return ordered


def edge_count(share: float, total: int) -> int:
    """How many of ``total`` edges a trace of size ``share`` holds: added until that share is in.

    The 1e-9 forgives rounding: 0.07 * 100 is 7.000000000000001 but means 7.
    """
    return math.ceil(share * total - 1e-9)


def masked_distribution(
    model: Module,
    input_ids: Tensor,
    kept: Collection[Edge],
    position: int,
    attention: Sequence[Tensor] | None = None,
    depth: int | None = None,
) -> Tensor:
    """[vocabulary], float64: the prediction at ``position`` when only ``kept`` edges carry.

    With ``depth`` the prediction is read after so many layers, and the others do not run.

    Attention probabilities of absent edges are zeroed after the softmax and not renormalised;
    absent MLP outputs and residuals are zeroed. The output projection's bias always stays.

    The probabilities are the masked run's own: a softmax over all visible sources, so they read the
    target's query and every visible key, also of nodes that no kept edge leaves. Edges that cannot
    reach ``position`` through kept edges can therefore still change the result. With ``attention``
    (those of :class:`FullRun`) they are held at recorded values instead, and such edges cannot.
    """
    input_ids, kept = one_prompt(input_ids), frozenset(kept)
    with evaluating(model):
        x = embed(model, input_ids)
        for layer, block in enumerate(blocks(model)[:depth]):
            a, v = probabilities_values(model, block, x)
            a = a if attention is None else attention[layer]
            mask = torch.zeros_like(a)
            for edge in kept:
                if edge[:2] == ("attention", layer):
                    mask[edge.head, edge.target, edge.source] = 1
            added = block.output_projection(((a * mask) @ v).transpose(0, 1).flatten(1)[None])[0]
            x = kept_rows(x, "attention_residual", layer, kept) + added
            added = kept_rows(block.mlp(block.mlp_norm(x)[None])[0], "mlp", layer, kept)
            x = kept_rows(x, "mlp_residual", layer, kept) + added
        return model.lm_head(final_norm(model)(x))[position].double().softmax(-1)


def kept_rows(x: Tensor, kind: str, layer: int, kept: Collection[Edge]) -> Tensor:
    """``x`` [T, d] with the rows zeroed whose edge of this kind and layer is absent."""
    present = [Edge(kind, layer, t, -1, t) in kept for t in range(len(x))]  # type: ignore[arg-type]
    return x * torch.tensor(present, device=x.device, dtype=x.dtype)[:, None]


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the L1 distance of two distributions."""
    return 0.5 * (p.double() - q.double()).abs().sum().item()


def full_curve(
    model: Module, input_ids: Tensor, position: int, sizes: Sequence[float]
) -> list[float]:
    """TV of the s-Trace of every size in ``sizes`` (shares of |E|), by one masked run each."""
    run = run_full(model, input_ids)
    edges = [edge for edge, _ in best_first(build_graph(run), position)]
    full = run.logits[position].double().softmax(-1)
    traces = (edges[: edge_count(size, len(edges))] for size in sizes)
    runs = (
        masked_distribution(model, input_ids, trace, position, run.attention) for trace in traces
    )
    return [total_variation(full, masked) for masked in runs]


def threshold_curve(
    model: Module,
    input_ids: Tensor,
    run: FullRun,
    ordered: Ordered,
    position: int,
    thresholds: Sequence[float],
) -> list[tuple[int, float]]:
    """Edges and TV of the trace at every threshold, by one masked run each.

    Args:
        model: that runs, whose own full run is ``run``.
        input_ids: ``[T]`` or ``[1, T]``.
        run: of the full model.
        ordered: what :func:`best_first` gives for the position.
        position: of the prediction.
        thresholds: of importance.
    """
    full, found = run.logits[position].double().softmax(-1), []
    for tau in thresholds:
        kept = {edge for edge, _ in trace_at_threshold(ordered, tau)}
        masked = masked_distribution(model, input_ids, kept, position, run.attention)
        found.append((len(kept), total_variation(full, masked)))
    return found
