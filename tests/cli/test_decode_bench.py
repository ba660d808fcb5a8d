"""``softtrace decode-bench``: what it measures, where it writes, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from softtrace.cli.decode_bench import decode_bench
from softtrace.cli.evaluate import evaluate
from softtrace.data import pack, read_documents
from softtrace.data.text_source import TextSource
from softtrace.decoding import greedy
from softtrace.decoding.replay import Guesses, best_drafting, check_costs
from softtrace.errors import (
    DataError,
    InvalidInputError,
    OutputExistsError,
    UnsupportedModelError,
)
from softtrace.model.loading import load_model, load_tokenizer
from tests.support.calls import CPU
from tests.support.corpus import write_model, write_tree
from tests.support.tiny import tiny_model

SMALL: dict[str, Any] = {
    "prompts": 3, "prompt_tokens": 8, "new_tokens": 6, "rounds": 1, "run": CPU
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TextSource]:
    root = tmp_path_factory.mktemp("sources")
    return str(write_model(root / "model")), TextSource(str(write_tree(root / "text")))


@pytest.mark.thorough
def test_equals_what_is_computed_by_hand(
    sources: tuple[str, TextSource], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = decode_bench(*sources, str(tmp_path / "out"), **SMALL)
    assert json.loads((tmp_path / "out" / "decoding.json").read_text()) == found
    model = load_model(sources[0]).eval()
    blocks = pack(read_documents(sources[1].data), load_tokenizer(sources[0]), 8)
    prompts = blocks[torch.linspace(0, len(blocks) - 1, 6).long()[1::2]]  # those it chooses on
    layers = model.config.num_hidden_layers
    right = torch.zeros(layers - 1, dtype=torch.float64)
    texts = []
    for prompt in prompts:
        tokens = greedy(model, prompt[None], 6, -1).tokens
        whole = torch.cat((prompt, tokens))[None]
        with torch.no_grad():
            hidden = model(input_ids=whole, output_hidden_states=True).hidden_states
            early = [model.lm_head(model.model.norm(each))[0, 7:-1] for each in hidden[1:-1]]
        agreed = [each.argmax(-1) == tokens for each in early]
        right += torch.stack(agreed).sum(1)
        sure = [each.softmax(-1).amax(-1).tolist() for each in early]
        texts.append(Guesses([each.tolist() for each in agreed], sure))
    exits = found["exits"]
    assert exits["layers"] == list(range(1, layers))
    assert exits["agreement"] == pytest.approx((right / 18).tolist())
    assert all(cost > 0 for cost in exits["draft_cost"])
    assert len(found["whole_cost"]) == 5  # the first of six comes with the prompt
    assert found["head_cost"] >= 0
    assert found["whole_cost"][0] == 1
    assert all(cost >= 1 for cost in found["whole_cost"])
    costs = dict(zip(exits["layers"], exits["draft_cost"], strict=True))
    checks = check_costs(costs, found["whole_cost"])
    assert found["check_cost"] == checks[found["exit_layer"]]
    head = found["head_cost"]
    ways = [best_drafting(texts, (each,), costs, checks, head_cost=head) for each in costs]
    assert exits["expected_speedup"] == [way.speedup for way in ways]
    best = max(ways, key=lambda way: way.speedup)
    chosen = (found["exit_layer"], found["draft_tokens"], found["confidence"])
    assert chosen == (best.exit_layer, best.draft_tokens, best.confidence)
    assert found["expected"] == {
        name: getattr(best, name) for name in ("speedup", "drafted", "accepted", "checks")
    }
    assert (found["prompts"], found["prompts_chosen_on"]) == (3, 3)
    for loop in found["loops"].values():
        assert loop["identical"] == 1
        assert 0 < loop["speedup"]["q25"] <= loop["speedup"]["median"] <= loop["speedup"]["q75"]
    direct = found["loops"]["direct"]
    assert 0 <= direct["accepted"] <= direct["drafted"]
    # The first token comes with the prompt.
    assert direct["accepted"] <= 3 * 5 <= direct["accepted"] + direct["checks"]
    said = capsys.readouterr().out
    assert (
        f"drafting with {best.exit_layer} layers, {best.draft_tokens} tokens at most, confidence "
        f"{best.confidence:g}, timed on 3 prompts"
    ) in said
    assert "at least 30 of 18 tokens" in found["early"]["left_out"]
    race = found["race"]
    drafts = ["exit drafts", "lookup drafts", "lookup or exit drafts"]
    drafts += ["exit drafts to the first unsure"] * (best.confidence > 0)
    fixed = {f"{name}, fixed shapes" for name in ("plain", *drafts)}
    assert {name for name in race["ways"] if name.endswith("fixed shapes")} == fixed
    assert "prompt lookup, transformers" in race["ways"]
    assert all(each["identical"] == 1 for each in race["ways"].values())
    assert race["use"] in (race["best_plain"], race["best_draft"])
    assert (race["use"] == race["best_draft"]) == (race["drafts_over_plain"]["median"] > 1)
    assert f"use: {race['use']}." in said
    assert "direct loop:" in said
    assert "transformers loop:" in said
    assert "stopping where the exit is sure (not lossless)" in said


def test_an_exit_and_a_length_can_be_chosen(
    sources: tuple[str, TextSource], tmp_path: Path
) -> None:
    options = {**SMALL, "run": replace(CPU, dtype="auto")}
    found = decode_bench(
        *sources, str(tmp_path), exit_layer=1, draft_tokens=4, confidence=0.25, **options
    )
    assert found["dtype"] == "float32"
    assert (found["exit_layer"], found["draft_tokens"], found["confidence"]) == (1, 4, 0.25)
    assert found["expected"]["speedup"] == found["exits"]["expected_speedup"][0]
    assert len(found["check_cost"]) == 4 == len(found["whole_cost"])


def test_a_text_of_one_block_serves_for_both(
    sources: tuple[str, TextSource], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x = 1 + 22")
    (_,) = pack(read_documents(str(text)), load_tokenizer(sources[0]), 8)
    found = decode_bench(
        sources[0],
        TextSource(str(text)),
        str(tmp_path / "out"),
        draft_tokens=9,
        **{**SMALL, "new_tokens": 2},
    )
    assert (found["prompts"], found["prompts_chosen_on"]) == (1, 1)
    assert len(found["check_cost"]) == 1  # no more than such a text has guesses
    assert found["loops"]["direct"]["identical"] == 1


@pytest.mark.thorough
def test_prompts_may_be_the_users_own(sources: tuple[str, TextSource], tmp_path: Path) -> None:
    text = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a" * length, "completion": "bcd"} for length in (3, 30, 5, 9)]
    text.write_text("\n".join(map(json.dumps, rows)))
    found = decode_bench(
        sources[0], TextSource(str(text)), str(tmp_path / "out"), whole_prompts=True,
        **{**SMALL, "prompts": 2},
    )  # fmt: skip
    assert (found["prompts"], found["prompts_chosen_on"], found["whole_prompts"]) == (2, 2, True)
    assert found["race"]["left_out"] is None
    assert all(each["identical"] == 1 for each in found["race"]["ways"].values())


@pytest.mark.thorough
@pytest.mark.parametrize("refused", [False, True])
def test_what_the_generation_config_changes_is_measured(
    sources: tuple[str, TextSource],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    refused: bool,
) -> None:
    """Replay and race agree on one block, and no end cuts a text short."""
    model: Any = tiny_model("llama", seed=2, vocab_size=300, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
    model.generation_config = GenerationConfig(
        pad_token_id=0, eos_token_id=list(range(3, 200)), stop_strings=["a"],
        exponential_decay_length_penalty=(1, 2.0), return_dict_in_generate=True,
        use_cache=False, cache_implementation="static",
        repetition_penalty=1.5, no_repeat_ngram_size=1,
        encoder_repetition_penalty=1.2 if refused else None,
    )  # fmt: skip
    monkeypatch.setattr("softtrace.cli.decode_bench.load_model", lambda *_, **__: model)
    text = tmp_path / "text.txt"
    text.write_text("x = 1 + 22")
    found = decode_bench(
        sources[0], TextSource(str(text)), str(tmp_path / "out"), exit_layer=2, draft_tokens=4,
        confidence=0.0, **{**SMALL, "new_tokens": 24},
    )  # fmt: skip
    direct = found["loops"]["direct"]
    assert [found["expected"][name] for name in ("drafted", "accepted", "checks")] == [
        direct[name] for name in ("drafted", "accepted", "checks")
    ]
    assert 0 < direct["accepted"] < direct["drafted"]
    assert [loop["identical"] for loop in found["loops"].values()] == [1, 1]
    left_out = found["race"]["left_out"]
    assert "EncoderRepetitionPenalty" in left_out if refused else left_out is None
    assert ("plain, fixed shapes" in found["race"]["ways"]) != refused
    assert ("by fixed shapes" in capsys.readouterr().out) != refused
    assert all(each["identical"] == 1 for each in found["race"]["ways"].values())


@pytest.mark.thorough
def test_becomes_a_section_of_the_density_of_the_same_model(
    sources: tuple[str, TextSource], tmp_path: Path
) -> None:
    out, small = tmp_path / "out", {**SMALL, "prompts": 1, "new_tokens": 2}
    evaluate(*sources, str(out), block_size=16, blocks=2, extra_blocks=0, run=CPU)
    before = json.loads((out / "density.json").read_text())
    found = decode_bench(*sources, str(out), **small)
    after = json.loads((out / "density.json").read_text())
    assert after == {**before, "decoding": found}
    with pytest.raises(OutputExistsError, match=r"found a decoding\.json; pass overwrite=True"):
        decode_bench(*sources, str(out), **small)
    other = write_model(tmp_path / "other")
    with pytest.raises(OutputExistsError, match="expected a new or empty folder"):
        decode_bench(str(other), sources[1], str(out), **small)
    over = {**small, "run": replace(CPU, overwrite=True)}
    again = decode_bench(*sources, str(out), **over)
    assert json.loads((out / "density.json").read_text())["decoding"] == json.loads(
        json.dumps(again)
    )
    decode_bench(str(other), sources[1], str(out), **over)
    kept = json.loads((out / "density.json").read_text())
    assert kept["decoding"] == again  # of another model: left alone


@pytest.mark.thorough
def test_tokens_go_out_early_for_an_agreement(
    sources: tuple[str, TextSource], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**SMALL, "prompts": 2, "new_tokens": 16, "exit_layer": 1, "draft_tokens": 2}
    everything = decode_bench(*sources, str(tmp_path / "all"), agreement=0.0, **options)["early"]
    assert everything["early"] == 1
    layers = load_model(sources[0]).config.num_hidden_layers
    assert everything["layers_saved"] == pytest.approx(1 - 1 / layers)
    agreed = everything["agreement_chosen_on"]
    assert 0 <= everything["agreement"] <= 1
    assert (
        f"{100 * everything['agreement']:.1f} % of tokens are the whole" in capsys.readouterr().out
    )
    some = decode_bench(*sources, str(tmp_path / "some"), agreement=agreed, **options)["early"]
    assert some["agreement_chosen_on"] >= agreed


def test_a_backend_that_is_none_is_named(sources: tuple[str, TextSource], tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInputError, match=r"backend: found 'fast', allowed are 'auto', 'none'"
    ):
        decode_bench(*sources, str(tmp_path), backend="fast", **SMALL)


def test_refuses_what_it_cannot_do(
    sources: tuple[str, TextSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError):
        decode_bench(*sources, str(tmp_path), **SMALL)
    for name, value in (("prompts", 0), ("new_tokens", 1), ("rounds", 0)):
        with pytest.raises(InvalidInputError, match=f"{name}: found {value}"):
            decode_bench(*sources, str(tmp_path / "new"), **{**SMALL, name: value})
    for name, value, allowed in (
        ("draft_tokens", 0, "are integers from 1, None"),
        ("confidence", 1.5, r"\[0, 1\]"),
    ):
        with pytest.raises(InvalidInputError, match=f"{name}: found {value}, allowed {allowed}"):
            decode_bench(*sources, str(tmp_path / "new"), **{**SMALL, name: value})
    with pytest.raises(InvalidInputError, match="exit_layer: found 9, allowed 1 to"):
        decode_bench(*sources, str(tmp_path / "new"), **SMALL, exit_layer=9)
    (tmp_path / "short.txt").write_text("abcde")
    with pytest.raises(
        DataError, match=r"less than one block of 8.* or a prompt_tokens of at most"
    ):
        decode_bench(
            sources[0], TextSource(str(tmp_path / "short.txt")), str(tmp_path / "new"), **SMALL
        )
    module = "softtrace.cli.decode_bench.load_model"
    monkeypatch.setattr(module, lambda *_, **__: tiny_model("gpt2", vocab_size=300))
    with pytest.raises(UnsupportedModelError, match="would be ignored"):
        decode_bench(*sources, str(tmp_path / "new"), **SMALL)
    assert not (tmp_path / "new").exists()
