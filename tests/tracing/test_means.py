"""Means that stand in for absent edges, against a forward written out from the definition."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor

import softtrace
from softtrace.density.sweep import curve_of, read_masked
from softtrace.errors import InvalidInputError
from softtrace.graph.edges import Edge
from softtrace.graph.masks import hard_masks
from tests.density.test_exactness import safe_thresholds
from tests.support import oracle
from tests.support.oracle_blocks import blocks, embed, final_norm, probabilities_values
from tests.support.tiny import tiny_model, tiny_prompt

TEXTS = [tiny_prompt(6, seed=11), tiny_prompt(9, seed=12)]


def literal_means(model: Any) -> list[dict[str, Tensor]]:
    """Of every layer, over all tokens of :data:`TEXTS`."""
    seen: list[dict[str, list[Tensor]]] = [
        {"value": [], "entry": [], "middle": [], "mlp": []} for _ in blocks(model)
    ]
    with oracle.evaluating(model):
        for ids in TEXTS:
            x = embed(model, oracle.one_prompt(ids))
            for block, found in zip(blocks(model), seen, strict=True):
                a, v = probabilities_values(model, block, x)
                after = x + block.output_projection((a @ v).transpose(0, 1).flatten(1)[None])[0]
                added = block.mlp(block.mlp_norm(after)[None])[0]
                for name, values in (
                    ("value", v.transpose(0, 1)), ("entry", x), ("middle", after), ("mlp", added)
                ):  # fmt: skip
                    found[name].append(values)
                x = after + added
    return [{name: torch.cat(each).mean(0) for name, each in found.items()} for found in seen]


def literal_run(
    model: Any, ids: Tensor, kept: Collection[Edge], recorded: list[Tensor] | None
) -> Tensor:
    """``[T, V]`` logits with the mean of every edge that is not kept in its place."""
    means, x = literal_means(model), embed(model, oracle.one_prompt(ids))
    with oracle.evaluating(model):
        for layer, (block, mean) in enumerate(zip(blocks(model), means, strict=True)):

            def kept_rows(kind: str, rows: Tensor, mean: Tensor, layer: int = layer) -> Tensor:
                there = [Edge(kind, layer, t, -1, t) in kept for t in range(len(rows))]  # type: ignore[arg-type]
                return torch.stack(
                    [row if on else mean for row, on in zip(rows, there, strict=True)]
                )

            a, v = probabilities_values(model, block, x)
            a = a if recorded is None else recorded[layer]
            mixed = torch.zeros(len(a), len(x), v.shape[-1], dtype=x.dtype)
            for h in range(len(a)):
                for t in range(len(x)):
                    for s in range(t + 1):
                        on = Edge("attention", layer, t, h, s) in kept
                        mixed[h, t] += a[h, t, s] * (v[h, s] if on else mean["value"][h])
            out = block.output_projection(mixed.transpose(0, 1).flatten(1)[None])[0]
            x = kept_rows("attention_residual", x, mean["entry"]) + out
            added = kept_rows("mlp", block.mlp(block.mlp_norm(x)[None])[0], mean["mlp"])
            x = kept_rows("mlp_residual", x, mean["middle"]) + added
        logits: Tensor = model.lm_head(final_norm(model)(x))
    return logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_run_with_means_equals_the_literal_one(family: str, recomputed: bool) -> None:
    model = tiny_model(family, seed=6, dtype=torch.float64)
    ids = tiny_prompt(6, seed=7)
    run = oracle.run_full(model, ids)
    instrument = softtrace.attach(model)
    means = instrument.means_of(instrument.batch(text) for text in TEXTS)
    with torch.no_grad():
        recording = instrument.record(instrument.batch(ids))
        for tau in safe_thresholds(run, 4):
            kept = {edge for edge, importance in run.importance.items() if importance >= tau}
            expected = literal_run(model, ids, kept, None if recomputed else run.attention)
            read = read_masked(
                instrument,
                recording,
                hard_masks(recording.importance, tau),
                "recomputed" if recomputed else "recorded",
                means=means,
            )
            found = instrument.anatomy.readout.logits(read)[0]
            assert (found - expected).abs().max() < 1e-5


def test_exact_runs_with_means_are_those_of_the_trace() -> None:
    model, ids = tiny_model("llama", seed=6), tiny_prompt(6, seed=7)
    run = oracle.run_full(model, ids)
    graph = oracle.build_graph(run)
    instrument = softtrace.attach(model)
    means = instrument.means_of(instrument.batch(text) for text in TEXTS)
    with torch.no_grad():
        recording = instrument.record(instrument.batch(ids))
        tau = safe_thresholds(run, 4)[2]
        curve = curve_of(
            instrument, recording, recording.importance, [tau], attention="recomputed",
            exact=True, means=means,
        )  # fmt: skip
    for position in (2, 5):
        ordered = oracle.best_first(graph, position)
        kept = {edge for edge, _ in oracle.trace_at_threshold(ordered, tau)}
        masked = literal_run(model, ids, kept, None)[position].double().softmax(-1)
        full = run.logits[position].double().softmax(-1)
        expected = oracle.total_variation(full, masked)
        assert curve.total_variation[0, 0, position].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_means_are_over_real_tokens_alone(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    instrument = softtrace.attach(model)
    ids = torch.cat((TEXTS[0], tiny_prompt(3)), 1)
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded, alone = (
        instrument.means_of([batch])
        for batch in (instrument.batch(ids, mask), instrument.batch(TEXTS[0]))
    )
    for layer, own in zip(padded, alone, strict=True):
        torch.testing.assert_close(layer.value, own.value)
        torch.testing.assert_close(layer.mlp[0], own.mlp[0])
        torch.testing.assert_close(layer.middle, own.middle)
    with pytest.raises(InvalidInputError, match="means: found no real token"):
        instrument.means_of([])


def test_with_all_edges_the_model_is_itself() -> None:
    for family in ("llama", "gpt2"):
        model, ids = tiny_model(family, dtype=torch.float64), tiny_prompt(6)
        instrument = softtrace.attach(model)
        means = instrument.means_of([instrument.batch(TEXTS[1])])
        with torch.no_grad():
            recording = instrument.record(instrument.batch(ids))
            read = read_masked(
                instrument, recording, hard_masks(recording.importance, 0.0), "recomputed",
                means=means,
            )  # fmt: skip
            logits = instrument.anatomy.readout.logits(read)
        torch.testing.assert_close(logits, recording.logits, atol=1e-6, rtol=1e-6)


def test_means_of_a_model_in_half_precision_are_added_up_exactly() -> None:
    """A sum in bfloat16 stands still once it is 256 times what is added."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    instrument = softtrace.attach(model)
    batch = instrument.batch(TEXTS[0])
    often, once = instrument.means_of([batch] * 100), instrument.means_of([batch])
    for layer, own in zip(often, once, strict=True):
        torch.testing.assert_close(layer.value, own.value, rtol=2**-7, atol=0.0)
        torch.testing.assert_close(layer.entry, own.entry, rtol=2**-7, atol=0.0)
