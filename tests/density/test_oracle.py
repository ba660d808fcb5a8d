"""The oracle itself: equal to the model, true to the definitions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softtrace.graph.edges import Edge
from softtrace.graph.trace import trace_length
from tests.support import oracle
from tests.support.tiny import FAMILIES, tiny_model, tiny_prompt

pytestmark = pytest.mark.filterwarnings("error")

LENGTH = 7
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-multihead": ("llama", {"num_key_value_heads": 4}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "smollm3-sliding": ("smollm3", {"use_sliding_window": True, "sliding_window": 3}),
    "gpt2-scaling": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
}
Case = tuple[nn.Module, Tensor, oracle.FullRun]


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest) -> Case:
    family, overrides = VARIANTS[request.param]
    model = tiny_model(family, seed=1, dtype=torch.float64, **overrides)
    input_ids = tiny_prompt(LENGTH, seed=2)
    return model, input_ids, oracle.run_full(model, input_ids)


def model_distribution(model: nn.Module, input_ids: Tensor, position: int) -> Tensor:
    with torch.no_grad():
        return model(input_ids).logits[0, position].softmax(-1)


def test_logits_and_nodes_equal_the_models_own(case: Case) -> None:
    model, input_ids, run = case
    with torch.no_grad():
        own = model(input_ids, output_hidden_states=True)
    assert (run.logits - own.logits[0]).abs().max() < 1e-9
    for layer in range(len(run.attention) - 1):  # the last hidden state is final-normed
        nodes = torch.stack([run.nodes["mlp", layer, t] for t in range(LENGTH)])
        assert (nodes - own.hidden_states[layer + 1][0]).abs().max() < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_models_work(family: str) -> None:
    model, input_ids = tiny_model(family), tiny_prompt(LENGTH)
    run = oracle.run_full(model, input_ids)
    assert run.logits.dtype == torch.float32
    with torch.no_grad():
        assert (run.logits - model(input_ids).logits[0]).abs().max() < 1e-4
    exact = oracle.run_full(tiny_model(family, dtype=torch.float64), input_ids)
    assert run.importance == pytest.approx(exact.importance, abs=1e-4)


def test_importances_of_each_node_sum_to_one(case: Case) -> None:
    _, _, run = case
    sums: dict[oracle.Node, float] = defaultdict(float)
    for edge, importance in run.importance.items():
        assert 0 < importance < 1
        sums[oracle.target_node(edge)] += importance
    assert len(sums) == 2 * len(run.attention) * LENGTH
    assert list(sums.values()) == pytest.approx([1.0] * len(sums), abs=1e-12)


def test_attention_is_far_from_uniform(case: Case) -> None:
    _, _, run = case
    by_row: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for edge, vector in run.vectors.items():
        if edge.kind == "attention" and edge.target == LENGTH - 1:
            by_row[edge.layer, edge.target, edge.head].append(vector.norm().item())
    assert max(max(row) / min(row) for row in by_row.values()) > 5


def test_best_first_visits_all_reachable_edges(case: Case) -> None:
    _, _, run = case
    graph = oracle.build_graph(run)
    for position in (0, 3, LENGTH - 1):
        ordered = oracle.best_first(graph, position)
        assert len(ordered) == len(set(ordered)) == oracle.reachable_edges(graph, position)
        reached = {oracle.output_node(graph, position)}
        for edge, _ in ordered:
            assert oracle.target_node(edge) in reached
            reached.add(oracle.source_node(edge))
    last = oracle.best_first(graph, LENGTH - 1)
    assert oracle.best_first(graph, -1) == last
    with pytest.raises(IndexError):
        oracle.best_first(graph, LENGTH)


def test_edges_counted_by_hand() -> None:
    heads, layers = 4, 3
    run = oracle.run_full(tiny_model("llama"), tiny_prompt(LENGTH))
    graph = oracle.build_graph(run)
    for position in range(LENGTH):
        seen = position + 1
        lower = 3 * seen + heads * seen * (seen + 1) // 2
        last = 3 + heads * seen  # only the output token's own nodes
        assert oracle.reachable_edges(graph, position) == (layers - 1) * lower + last


def test_sliding_windows_remove_edges() -> None:
    run = oracle.run_full(tiny_model("mistral"), tiny_prompt(LENGTH))
    distances = {edge.target - edge.source for edge in run.vectors if edge.kind == "attention"}
    assert distances == {0, 1, 2, 3}
    family, overrides = VARIANTS["qwen2-sliding"]
    run = oracle.run_full(tiny_model(family, **overrides), tiny_prompt(LENGTH))
    farthest = [
        max(e.target - e.source for e in run.vectors if e.kind == "attention" and e.layer == layer)
        for layer in range(3)
    ]
    assert farthest == [LENGTH - 1, 2, 2]


def test_keeping_all_edges_changes_nothing_and_an_empty_trace_runs(case: Case) -> None:
    model, input_ids, run = case
    curve = oracle.full_curve(model, input_ids, -1, [0.0, 1.0])
    assert curve[1] < 1e-12
    assert 0.01 < curve[0] <= 1
    empty = oracle.masked_distribution(model, input_ids, set(), -1)
    assert empty.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert empty.isfinite().all()
    kept = oracle.masked_distribution(model, input_ids, set(run.vectors), -1)
    assert oracle.total_variation(kept, model_distribution(model, input_ids, -1)) < 1e-9


def trace_and_threshold_runs(
    case: Case, position: int, tau: float, attention: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The prediction with the position's trace at ``tau``, and with all edges above ``tau``."""
    model, input_ids, run = case
    ordered = oracle.best_first(oracle.build_graph(run), position)
    trace = oracle.trace_at_threshold(ordered, tau)
    assert all(importance >= tau for _, importance in trace)
    assert len(trace) == len(ordered) or ordered[len(trace)][1] < tau
    kept = {edge for edge, _ in trace}
    everywhere = {edge for edge, importance in run.importance.items() if importance >= tau}
    assert kept <= everywhere
    own = oracle.masked_distribution(model, input_ids, kept, position, attention)
    return own, oracle.masked_distribution(model, input_ids, everywhere, position, attention)


@pytest.mark.parametrize("tau", [0.5, 0.2, 0.05, 0.01])
def test_recorded_attention_makes_one_masked_run_serve_every_position(
    case: Case, tau: float
) -> None:
    for position in (3, LENGTH - 1):
        own, shared = trace_and_threshold_runs(case, position, tau, case[2].attention)
        assert oracle.total_variation(own, shared) < 1e-7


def test_recomputed_attention_reads_nodes_outside_the_trace() -> None:
    """Why a threshold run differs from the trace's own: the softmax sees every visible key."""
    model, input_ids = tiny_model("gpt2", seed=1, dtype=torch.float64), tiny_prompt(10, seed=2)
    case = model, input_ids, oracle.run_full(model, input_ids)
    own, shared = trace_and_threshold_runs(case, 9, 0.02, None)
    assert oracle.total_variation(own, shared) > 0.1


@pytest.mark.parametrize("kind", ["mlp", "attention", "attention_residual"])
def test_masked_runs_equal_the_model_under_hooks(case: Case, kind: str) -> None:
    """One edge (attention: one head's edges of a target) taken out of the unmodified model."""
    model, input_ids, run = case
    layer, target, head = 1, 4, 2
    block = oracle.blocks(model)[layer]

    def drop_row(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, target] = 0
        return output

    def drop_head(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        width = block.attention.head_dim
        changed = inputs[0].clone()
        changed[0, target, head * width : (head + 1) * width] = 0
        return (changed,)

    def drop_residual(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, target] -= run.nodes["mlp", layer - 1, target]
        return output

    attach: dict[str, Callable[[], Any]] = {
        "mlp": lambda: block.mlp.register_forward_hook(drop_row),
        "attention": lambda: block.output_projection.register_forward_pre_hook(drop_head),
        "attention_residual": lambda: block.output_projection.register_forward_hook(drop_residual),
    }
    dropped = {
        edge
        for edge in run.vectors
        if (edge.kind, edge.layer, edge.target) == (kind, layer, target)
        and (kind != "attention" or edge.head == head)
    }
    assert dropped
    handle = attach[kind]()
    try:
        hooked = model_distribution(model, input_ids, -1)
    finally:
        handle.remove()
    masked = oracle.masked_distribution(model, input_ids, run.vectors.keys() - dropped, -1)
    assert oracle.total_variation(hooked, masked) < 1e-7
    assert oracle.total_variation(hooked, model_distribution(model, input_ids, -1)) > 1e-4


def test_a_dropped_attention_edge_takes_its_vector_out(case: Case) -> None:
    """In the last layer nothing else changes, so the rest can be computed by hand."""
    model, input_ids, run = case
    block, last = oracle.blocks(model)[-1], len(run.attention) - 1
    edge = Edge("attention", last, LENGTH - 1, 1, LENGTH - 2)
    with torch.no_grad():
        node = run.nodes["attn", last, LENGTH - 1] - run.vectors[edge]
        node = node + block.mlp(block.mlp_norm(node)[None, None])[0, 0]
        by_hand = model.lm_head(oracle.final_norm(model)(node)).softmax(-1)
    masked = oracle.masked_distribution(model, input_ids, run.vectors.keys() - {edge}, -1)
    assert oracle.total_variation(masked, by_hand) < 1e-7


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flags_and_random_state_are_left_alone(family: str) -> None:
    state = torch.get_rng_state()
    model = tiny_model(family)
    model.train()
    oracle.blocks(model)[1].attention.eval()
    flags = [module.training for module in model.modules()]
    first = oracle.run_full(model, tiny_prompt(4)).logits
    assert torch.equal(first, oracle.run_full(model, tiny_prompt(4)[0]).logits)
    assert not first.requires_grad
    assert flags == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_tiny_models_are_reproducible_and_equal_across_dtypes() -> None:
    for family in FAMILIES:
        exact, rounded = tiny_model(family, dtype=torch.float64), tiny_model(family)
        for wide, narrow in zip(exact.parameters(), rounded.parameters(), strict=True):
            assert wide.dtype == torch.float64
            assert torch.equal(wide.float(), narrow)
        other = tiny_model(family, seed=1)
        assert not torch.equal(other.lm_head.weight, rounded.lm_head.weight)


def test_edge_count_rounds_up_as_traces_do() -> None:
    counts = {0.0: 0, 0.001: 1, 0.07: 7, 0.29: 29, 0.999: 100, 1.0: 100}
    assert {share: oracle.edge_count(share, 100) for share in counts} == counts
    assert {share: trace_length(share, 100) for share in counts} == counts
    assert math.ceil(0.07 * 100) == 8


def test_trace_at_threshold_is_a_prefix_of_the_running_minimum() -> None:
    edges = [Edge("mlp", 0, t, -1, t) for t in range(4)]
    ordered = list(zip(edges, (0.5, 0.3, 0.9, 0.1), strict=True))
    assert oracle.trace_at_threshold(ordered, 0.3) == ordered[:3]
    assert oracle.trace_at_threshold(ordered, 0.4) == ordered[:1]
    assert oracle.trace_at_threshold(ordered, 0.6) == []
    assert oracle.trace_at_threshold(ordered, 0.0) == ordered


def test_unknown_models_and_batches_are_refused() -> None:
    with pytest.raises(NotImplementedError):
        oracle.run_full(nn.Linear(1, 1), tiny_prompt(2))
    with pytest.raises(ValueError, match="one prompt"):
        oracle.run_full(tiny_model("llama"), tiny_prompt(2, batch=2))
