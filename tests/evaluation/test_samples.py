"""The text of the report: real traces of each token, and text that reads as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import softtrace
from softtrace.density.curve import default_thresholds
from softtrace.density.exits import exit_agreement
from softtrace.evaluation import samples as module
from softtrace.evaluation.samples import (
    MOST_BLOCKS,
    SAMPLE_RUNS,
    SAMPLE_SIZES,
    nearest,
    text_samples,
)
from softtrace.evaluation.token_text import TokenText
from softtrace.graph.batch import Batch
from softtrace.tracing.recording import Recording
from softtrace.tracing.runner import Runner
from tests.support import oracle
from tests.support.corpus import END, byte_tokenizer
from tests.support.tiny import tiny_model

LENGTH, CONTEXT = 10, 4


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    text = "def f(x):\n    return 'é' + x  # </script>\n" * 8
    ids = torch.tensor(byte_tokenizer().encode(text))
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", seed=3, vocab_size=257)


@pytest.fixture(scope="module")
def found(model: Any, blocks: torch.Tensor) -> dict[str, Any]:
    return text_samples(
        model, byte_tokenizer(), blocks, min_context=CONTEXT, batch_size=4, attention="recorded"
    )


def test_predictions_are_those_of_the_tokens_own_trace_of_that_size(
    model: Any, blocks: torch.Tensor, found: dict[str, Any]
) -> None:
    """Against the literal oracle: best-first search up to that many edges, then a masked run."""
    looked_at = 0
    for text in found["texts"][:2]:
        ids = blocks[text["block"]][None]
        run = oracle.run_full(model, ids)
        graph = oracle.build_graph(run)
        for at in (0, 3, 4):
            token, position = text["tokens"][at], CONTEXT + at
            ordered = oracle.best_first(graph, position)
            assert token["edges"] == len(ordered)
            for trace in token["traces"][::2]:
                kept = round(trace["size"] * len(ordered))
                assert trace["size"] == pytest.approx(kept / len(ordered), rel=1e-5)
                own = {edge for edge, _ in ordered[:kept]}
                expected = oracle.masked_distribution(model, ids, own, position, run.attention)
                full = run.logits[position].double().softmax(-1)
                tv = oracle.total_variation(full, expected)
                assert trace["tv"] == pytest.approx(tv, abs=1e-4)
                best = expected.topk(5)
                assert [p for _, p in trace["top"]] == pytest.approx(best.values.tolist(), abs=2e-4)
                word = found["vocabulary"][trace["top"][0][0]]
                assert word == TokenText(byte_tokenizer()).alone(int(best.indices[0]))
                looked_at += 1
    assert looked_at == 2 * 3 * 5


def test_measures_are_those_that_evaluate_averages(
    model: Any, blocks: torch.Tensor, found: dict[str, Any]
) -> None:
    rows = [text["block"] for text in found["texts"]]
    assert rows == torch.linspace(0, len(blocks) - 1, MOST_BLOCKS).long().tolist()
    curve = softtrace.density_curve(model, blocks[rows])
    instrument = softtrace.attach(model)
    agreed = exit_agreement(
        instrument, instrument.record(instrument.batch(blocks[rows]), keep_hidden=True)
    )
    with torch.no_grad():
        logs = model(input_ids=blocks[rows]).logits.log_softmax(-1)
    sizes = curve.size_at(0.2)
    for row, text in enumerate(found["texts"]):
        assert len(text["tokens"]) == LENGTH - 1 - CONTEXT
        for at, token in enumerate(text["tokens"]):
            position = CONTEXT + at
            assert token["entropy"] == pytest.approx(float(curve.entropy[row, position]), rel=1e-4)
            assert token["area"] == pytest.approx(float(curve.area()[row, position]), rel=1e-4)
            assert token["size"] == pytest.approx(float(sizes[row, position]), rel=1e-3)
            target = blocks[text["block"], position + 1]
            assert token["loss"] == pytest.approx(-float(logs[row, position, target]), rel=1e-4)
            later = agreed[token["exit_layer"] - 1 :, row, position]
            assert later.all()
            assert token["exit_layer"] == 1 or not agreed[token["exit_layer"] - 2, row, position]


def test_text_is_put_together_again(blocks: torch.Tensor, found: dict[str, Any]) -> None:
    vocabulary = found["vocabulary"]
    assert len(set(vocabulary)) == len(vocabulary)
    for text in found["texts"]:
        indices = [
            *text["context"],
            *(token.get("text", token["token"]) for token in text["tokens"]),
        ]
        whole = "".join(vocabulary[index] for index in indices)
        assert whole == byte_tokenizer().decode(blocks[text["block"]])
        for token, own in zip(text["tokens"], blocks[text["block"], CONTEXT + 1 :], strict=True):
            names = {"Ã": "⟨C3⟩", "©": "⟨A9⟩", END: END}
            name = byte_tokenizer().convert_ids_to_tokens(int(own))
            assert vocabulary[token["token"]] == names.get(name, byte_tokenizer().decode([own]))
    assert {"é", ""} < set(vocabulary)


def test_a_token_is_in_the_vocabulary_once() -> None:
    pieces = module._Pieces(byte_tokenizer())
    assert pieces.texts[pieces.index(256)] == END
    assert [pieces.index(token) for token in (65, 256, 65)] == [1, 0, 1]
    assert len(pieces.texts) == 2


def test_of_a_block_that_ends_inside_of_a_character_nothing_is_lost() -> None:
    pieces = module._Pieces(byte_tokenizer())
    block = torch.tensor(byte_tokenizer().encode("aのの")[:-1])
    shown = pieces.of_block(block, slice(2, None))
    said = [pieces.texts[token.get("text", token["token"])] for token in shown]
    assert said == ["", "の", "", "\ufffd"]
    assert [pieces.texts[token["token"]] for token in shown] == ["⟨81⟩", "⟨AE⟩", "⟨E3⟩", "⟨81⟩"]


def assert_same_texts(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for mine, same in zip(ours["texts"], theirs["texts"], strict=True):
        for a, b in zip(mine["tokens"], same["tokens"], strict=True):
            assert ours["vocabulary"][a["token"]] == theirs["vocabulary"][b["token"]]
            assert [t["size"] for t in a["traces"]] == [t["size"] for t in b["traces"]]
            assert [t["tv"] for t in a["traces"]] == pytest.approx(
                [t["tv"] for t in b["traces"]], abs=1e-5
            )


def test_batches_change_nothing(model: Any, blocks: torch.Tensor, found: dict[str, Any]) -> None:
    other = text_samples(
        model, byte_tokenizer(), blocks, min_context=CONTEXT, batch_size=3, attention="recorded"
    )
    assert_same_texts(other, found)


def test_where_memory_runs_out_tokens_are_done_in_portions(
    model: Any, blocks: torch.Tensor, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, done = Runner.record, list[int]()

    def limited(runner: Runner, batch: Batch, **options: Any) -> Recording:
        if options["positions"].sum() > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return record(runner, batch, **options)

    monkeypatch.setattr(Runner, "record", limited)
    monkeypatch.setattr("gc.collect", lambda: 0)  # it takes longer than the rest
    other = text_samples(
        model, byte_tokenizer(), blocks, min_context=CONTEXT, batch_size=4, attention="recorded",
        progress=done.append,
    )  # fmt: skip
    assert_same_texts(other, found)
    assert sum(done) == MOST_BLOCKS * SAMPLE_RUNS


def test_a_page_has_room_for_so_many_tokens(
    model: Any, blocks: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_TOKENS", 3 * MOST_BLOCKS)
    found = text_samples(
        model, byte_tokenizer(), blocks, min_context=CONTEXT, batch_size=16, attention="recorded"
    )
    assert [len(text["tokens"]) for text in found["texts"]] == [3] * MOST_BLOCKS
    alone = text_samples(
        model,
        byte_tokenizer(),
        blocks[:1, :6],
        min_context=CONTEXT,
        batch_size=1,
        attention="recorded",
    )
    assert [len(text["tokens"]) for text in alone["texts"]] == [1]


def test_the_nearest_run_by_log_size() -> None:
    total = torch.tensor([1000.0, 1000.0])
    size = torch.tensor([[0.0, 0.001], [0.01, 0.001], [1.0, 0.5]])
    chosen = nearest(size, total)
    assert chosen.shape == (len(SAMPLE_SIZES), 2)
    # An empty trace stands at half an edge, 0.0005, and 0.0028 is nearer to 0.01.
    assert chosen[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert chosen[:, 1].tolist() == [0, 0, 0, 0, 0, 2, 2, 2, 2]  # equal traces: the first


def test_traces_of_long_blocks_are_as_large_as_those_of_short_ones() -> None:
    short, long = module._thresholds(64), module._thresholds(1024)
    assert len(short) == len(long) == SAMPLE_RUNS - len(default_thresholds())
    assert (short[0], long[0]) == (0.6, 0.6)
    assert short == pytest.approx([0.6 * 600 ** (-step / 23) for step in range(24)])
    assert module._thresholds(10) == short
    assert long[-1] == pytest.approx(short[-1] / 16)
    assert sorted(long, reverse=True) == long


def test_attention_is_recomputed_unless_told_otherwise(model: Any, blocks: torch.Tensor) -> None:
    found = text_samples(model, byte_tokenizer(), blocks, min_context=CONTEXT, batch_size=4)
    curve = softtrace.density_curve(model, blocks, attention="recomputed")
    for text in found["texts"]:
        areas = [token["area"] for token in text["tokens"]]
        row = curve.area()[text["block"], CONTEXT : CONTEXT + len(areas)]
        assert areas == pytest.approx(row.tolist(), rel=1e-4)
