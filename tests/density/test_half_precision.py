"""Models in bfloat16 against the literal oracle on the same weights in float32."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch

import softtrace
from softtrace.graph import attention_maps
from tests.support import oracle
from tests.support.literal import edges_of
from tests.support.tiny import tiny_model, tiny_prompt

LENGTH = 12
POSITIONS = (LENGTH - 4, LENGTH - 2)
THRESHOLDS = (0.3, 0.08, 0.02, 0.004)
# A number of 8 bits is off by 0.4 %, and three layers add up; measured are 0.010 and 0.013.
LARGEST, MEAN = 0.03, 0.002


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
def test_bfloat16_differs_from_the_oracle_by_its_rounding(
    monkeypatch: pytest.MonkeyPatch, family: str, long: bool
) -> None:
    model, ids = tiny_model(family, seed=1, dtype=torch.bfloat16), tiny_prompt(LENGTH, seed=2)
    if long:
        monkeypatch.setattr(attention_maps, "HELD_ELEMENTS", 0)
        monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", 4 * LENGTH * 5)
    exact = copy.deepcopy(model).float()
    run = oracle.run_full(exact, ids)
    with torch.no_grad():
        ours = edges_of(softtrace.edge_importance(model, ids))
    assert ours.keys() == run.importance.keys()
    apart = [abs(ours[edge] - importance) for edge, importance in run.importance.items()]
    assert max(apart) < LARGEST
    assert statistics.mean(apart) < MEAN
    curve = softtrace.density_curve(model, ids, thresholds=THRESHOLDS, positions=POSITIONS)
    graph = oracle.build_graph(run)
    for position in POSITIONS:
        ordered = oracle.best_first(graph, position)
        assert curve.edges[0, position] == len(ordered)
        literal = oracle.threshold_curve(exact, ids, run, ordered, position, THRESHOLDS)
        for index, (_, expected) in enumerate(literal):
            assert abs(curve.total_variation[index, 0, position] - expected) < LARGEST
