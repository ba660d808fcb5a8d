"""Importances by other norms, against every edge's vector written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import softtrace
from softtrace.errors import InvalidInputError
from softtrace.graph.importance import Norm
from tests.support import oracle
from tests.support.oracle_blocks import final_norm
from tests.support.tiny import tiny_model, tiny_prompt

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": 2}),
    ("qwen3", {"num_hidden_layers": 2}),
    ("gpt2", {}),
]


def literal(model: Any, run: oracle.FullRun, norm: Norm) -> dict[Any, float]:
    """Shares of each node by a norm of the edges' vectors, or by their proximity to the node."""
    last = max(edge.layer for edge in run.vectors)
    size: dict[Any, float] = {}
    totals: dict[Any, float] = {}
    for edge, vector in run.vectors.items():
        node = oracle.target_node(edge)
        whole, part = run.nodes[node].double(), vector.double()
        if node[:2] == ("mlp", last):
            read = final_norm(model)
            whole, part = (oracle.linearised(read, each, whole) for each in (whole, part))
        size[edge] = (
            max(0.0, (whole.norm(p=1) - (whole - part).norm(p=1)).item())
            if norm == "ifr"
            else part.norm(p={"l1": 1, "l2": 2}[norm]).item()
        )
        totals[node] = totals.get(node, 0.0) + size[edge]
    return {edge: size[edge] / totals[oracle.target_node(edge)] for edge in size}


@pytest.mark.parametrize(("family", "overrides"), CASES, ids=[family for family, _ in CASES])
@pytest.mark.parametrize("norm", ["l1", "l2", "ifr"])
def test_importances_equal_those_of_the_vectors(
    family: str, overrides: dict[str, Any], norm: Norm
) -> None:
    model = tiny_model(family, seed=4, dtype=torch.float64, **overrides)
    ids = tiny_prompt(6, seed=5)
    run = oracle.run_full(model, ids)
    with torch.no_grad():
        found = softtrace.edge_importance(model, ids, norm=norm)
    expected = literal(model, run, norm)
    assert sum(value == 0 for value in expected.values()) < len(expected)
    for edge, value in expected.items():
        part = getattr(found.layers[edge.layer], edge.kind)[0]
        place = (edge.head, edge.target, edge.source) if edge.kind == "attention" else edge.target
        assert part[place].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_of_a_padded_batch_are_those_of_each_alone(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model, ids = tiny_model(family, dtype=torch.float64), tiny_prompt(7, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        alone = softtrace.edge_importance(model, ids[1:, 3:], norm="ifr")
        monkeypatch.setattr("softtrace.graph.attention_maps.CHUNK_ELEMENTS", 1)
        both = softtrace.edge_importance(model, ids, mask, norm="ifr")
    for layer, own in zip(both.layers, alone.layers, strict=True):
        torch.testing.assert_close(layer.attention[1, :, 3:, 3:], own.attention[0])
        torch.testing.assert_close(layer.mlp[1, 3:], own.mlp[0])
        assert not layer.attention[1, :, :3].any()


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"norm: found 'l3', allowed are 'l1', 'l2'"):
        softtrace.edge_importance(tiny_model("llama"), tiny_prompt(4), norm="l3")  # type: ignore[arg-type]
