"""tokens.jsonl: each line against what the curve of its own block says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import softtrace
from softtrace.cli.evaluate import evaluate
from softtrace.data import pack, read_documents
from softtrace.data.blocks import evenly
from softtrace.data.text_source import TextSource
from softtrace.density.exits import exit_agreement, exit_layers
from softtrace.model.loading import load_model, load_tokenizer
from tests.support.calls import CPU
from tests.support.corpus import word_tokenizer, write_model, write_tree


def test_the_exit_layer_is_where_the_prediction_has_come_to_stay() -> None:
    agreement = torch.tensor(
        [
            [True, False, True, False, False],
            [True, True, False, False, True],
            [True, True, True, False, False],
            [True, True, True, True, True],
        ]
    )
    assert exit_layers(agreement).tolist() == [1, 2, 3, 4, 4]


@pytest.mark.thorough
def test_every_line_is_the_tokens_own(tmp_path: Path) -> None:
    model, text = write_model(tmp_path / "model"), write_tree(tmp_path / "text")
    density = evaluate(
        str(model), TextSource(str(text)), str(tmp_path / "out"), block_size=12, blocks=5,
        batch_size=2, extra_blocks=0, run=CPU, per_token=True,
    )  # fmt: skip
    lines = [
        json.loads(line)
        for line in (tmp_path / "out" / "tokens.jsonl").read_text("utf-8").splitlines()
    ]
    tokenizer, network = load_tokenizer(model), load_model(model).eval()
    blocks = evenly(pack(read_documents(text), tokenizer, 12), 5)
    places = [(line["sequence"], line["position"]) for line in lines]
    assert places == [(row, at) for row in range(5) for at in range(6, 11)]
    assert len(lines) == density["tokens"]
    instrument = softtrace.attach(network)
    for row in range(5):
        ids = blocks[row : row + 1]
        curve = softtrace.density_curve(network, ids)
        recording = instrument.record(instrument.batch(ids), keep_hidden=True)
        logs = recording.logits.log_softmax(-1)[0].detach()
        agreed = exit_agreement(instrument, recording)[:, 0]
        for line in (line for line in lines if line["sequence"] == row):
            at, own = line["position"], int(ids[0, line["position"]])
            after = int(ids[0, at + 1])
            assert (line["token_id"], line["token"]) == (own, tokenizer.decode([own]))
            assert (line["next_id"], line["next"]) == (after, tokenizer.decode([after]))
            assert line["loss"] == pytest.approx(-float(logs[at, after]), abs=1e-5)
            assert line["entropy"] == pytest.approx(float(curve.entropy[0, at]), abs=1e-5)
            assert line["area"] == pytest.approx(float(curve.area()[0, at]), abs=1e-5)
            assert line["size_at_tv_0.2"] == pytest.approx(float(curve.size_at(0.2)[0, at]), 1e-4)
            layer = line["exit_layer"]
            assert bool(agreed[layer - 1 :, at].all())
            assert layer == 1 or not agreed[layer - 2, at]
    assert len({line["exit_layer"] for line in lines}) > 1


def test_text_is_that_of_the_report_with_the_spaces_that_decoding_alone_drops(
    tmp_path: Path,
) -> None:
    model, text = write_model(tmp_path / "model"), tmp_path / "text.txt"
    word_tokenizer().save_pretrained(model)
    text.write_text("the cats at a cat " * 6, encoding="utf-8")
    density = evaluate(
        str(model), TextSource(str(text)), str(tmp_path / "out"), block_size=12, blocks=2,
        batch_size=2, extra_blocks=0, run=CPU, per_token=True,
    )  # fmt: skip
    written = (tmp_path / "out" / "tokens.jsonl").read_text("utf-8").splitlines()
    lines = [json.loads(line) for line in written]
    samples = density["samples"]
    shown = [
        samples["vocabulary"][t.get("text", t["token"])]
        for x in samples["texts"]
        for t in x["tokens"]
    ]
    assert [line["next"] for line in lines] == shown
    assert {" the", " cat", "s"} <= set(shown)


@pytest.mark.thorough
def test_texts_of_a_block_add_up_where_characters_are_split(tmp_path: Path) -> None:
    model, text = write_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("日本語の🎉\r\n" * 9, encoding="utf-8")
    evaluate(
        str(model), TextSource(str(text)), str(tmp_path / "out"), block_size=13, blocks=4,
        batch_size=2, extra_blocks=0, run=CPU, per_token=True,
    )  # fmt: skip
    written = (tmp_path / "out" / "tokens.jsonl").read_text("utf-8").splitlines()
    lines = [json.loads(line) for line in written]
    tokenizer = load_tokenizer(model)
    blocks = evenly(pack(read_documents(text), tokenizer, 13), 4)
    split = 0
    for sequence, block in enumerate(blocks):
        own = [line for line in lines if line["sequence"] == sequence]
        said = "".join(line["next"] for line in own)
        whole = tokenizer.decode(block)
        assert said
        assert whole.endswith(said)
        assert [line["token"] for line in own[1:]] == [line["next"] for line in own[:-1]]
        split += sum(line["next"] == "" for line in own)
    assert split > len(blocks)
