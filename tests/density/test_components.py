"""Components that traces go through, and how unevenly: against loops."""

from __future__ import annotations

import pytest
import torch

from softtrace.density.components import component_entries, component_names, gini, lorenz
from softtrace.errors import InvalidInputError
from softtrace.graph.orders import search_order
from tests.support import oracle
from tests.support.literal import made_up_importance, row_graph


@pytest.mark.parametrize("parallel", [(), (1,)])
def test_a_component_enters_with_the_first_of_its_edges(parallel: tuple[int, ...]) -> None:
    importance = made_up_importance(5, parallel=parallel)
    edges = [edge for edge, _ in oracle.best_first(row_graph(importance), -1)]
    expected = {}
    for count, edge in enumerate(edges, start=1):
        if edge.kind == "attention":
            expected.setdefault(f"L{edge.layer}H{edge.head}", count)
        if edge.kind == "mlp":
            expected.setdefault(f"L{edge.layer}MLP", count)
    names = component_names(layers=3, heads=2)
    found = component_entries(search_order(importance)).tolist()
    assert dict(zip(names, found, strict=True)) == expected


def test_lorenz_and_gini_of_known_distributions() -> None:
    shares = torch.tensor([[1.0, 1, 1, 1], [0, 0, 5, 0], [1, 3, 0, 0]])
    assert lorenz(shares)[2].tolist() == [0, 0.75, 1, 1, 1]
    assert gini(shares).tolist() == pytest.approx([0.0, 0.75, 0.625])
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    differences = sum(abs(a - b) for a in values.tolist() for b in values.tolist())
    assert float(gini(values)) == pytest.approx(differences / (2 * 30 * float(values.sum())))
    assert gini(torch.zeros(3)).isnan()


def test_what_is_no_share_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="none below 0"):
        gini(torch.tensor([1.0, -1.0]))
    with pytest.raises(InvalidInputError, match="at least one number"):
        lorenz(torch.zeros(2, 0))
