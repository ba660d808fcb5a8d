"""What a generation config changes about greedy decoding, against ``model.generate``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from softtrace.decoding import (
    ProvenExit,
    check_cache,
    check_early_exit,
    generate,
    greedy,
    speculate,
)
from softtrace.decoding.greedy_choice import greedy_choice
from softtrace.errors import InvalidInputError, UnsupportedModelError
from tests.decoding.test_families import IGNORING, NO_BASE, OWN_CACHE
from tests.support.corpus import byte_tokenizer
from tests.support.tiny import VOCABULARY, tiny_model, tiny_prompt
from tests.support.zoo import VERIFIED, of_each_kind, tiny

NEW = 24

#: option -> a value under which a tiny model writes something else
CHANGING: dict[str, Any] = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 40)),
    "begin_suppress_tokens": list(range(3, 60)),
    "min_new_tokens": 20,
    "min_length": 22,
    "bad_words_ids": [*([token] for token in range(3, 30)), *([token, 40] for token in range(67))],
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 33,
    "sequence_bias": [[[token], 4.0] for token in range(5, 9)],
    "encoder_repetition_penalty": 2.0,
    "encoder_no_repeat_ngram_size": 1,
    "exponential_decay_length_penalty": (1, 1.8),
    "watermarking_config": WatermarkingConfig(bias=4.0),
}
#: the prompt, where the first is continued alike
SEEDS = dict.fromkeys(
    ("repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (2,)
)
#: and those that leave the largest score the largest
UNCHANGING = {"renormalize_logits": True, "remove_invalid_values": True}
SELF_HASHED = WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")


def drafting_model(family: str) -> Any:
    """A tiny model whose first layers guess right about half of the time."""
    model = tiny_model(family, seed=2, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
    return model


def plain(model: Any, ids: Tensor, count: int = NEW) -> list[int]:
    """What transformers' own greedy decoding writes."""
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count)
    new: list[int] = found[0, ids.shape[1] :].tolist()
    return new


@pytest.fixture(scope="module")
def proven() -> ProvenExit:
    """A model and its exits; what is asked of it is in its config, which each test makes anew."""
    return check_cache(check_early_exit(drafting_model("llama")))


@pytest.mark.thorough
@pytest.mark.parametrize("option", [*CHANGING, *UNCHANGING, "watermark of itself"])
def test_every_option_writes_what_generate_writes(proven: ProvenExit, option: str) -> None:
    """On one family: options look at tokens and scores alone. Below families have several."""
    model = proven.model
    changed = accepted = 0
    for seed in SEEDS.get(option, (1,)):
        # The first token is forced where a text begins, which is after one token.
        ids = tiny_prompt(1 if option == "forced_bos_token_id" else 6, seed=seed)
        model.generation_config = GenerationConfig(pad_token_id=0)
        # What is forced at the greatest length needs a text that gets there.
        end = None if option == "forced_eos_token_id" else plain(model, ids)[7]
        usual = GenerationConfig(pad_token_id=0, eos_token_id=end)
        model.generation_config = usual
        without = plain(model, ids)
        if option == "watermark of itself":
            usual.watermarking_config = SELF_HASHED
        else:
            setattr(usual, option, {**CHANGING, **UNCHANGING}[option])
        wanted = plain(model, ids)
        changed += wanted != without
        assert greedy(model, ids, NEW).tokens.tolist() == wanted
        for draft, confidence in ((4, 0.0), (6, 0.2)):
            found = speculate(
                model, ids, exit_layer=2, max_new_tokens=NEW, draft_tokens=draft,
                confidence=confidence, proven_exit=proven,
            )  # fmt: skip
            assert found.tokens.tolist() == wanted
            accepted += found.accepted
        stock = generate(model, ids, 2, max_new_tokens=NEW, proven_exit=proven)
        assert stock[0, ids.shape[1] :].tolist() == wanted
    assert bool(changed) == (option not in UNCHANGING)
    assert accepted


#: several at once, as shipped configs have them; sampling's do not matter
TOGETHER: dict[str, Any] = {
    "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [7, 8, 9],
    "min_new_tokens": 5, "renormalize_logits": True,
    "do_sample": True, "temperature": 0.3, "top_p": 0.5, "top_k": 3,
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("case", of_each_kind())
def test_every_kind_of_family_writes_what_generate_writes(case: str) -> None:
    kind, changes = VERIFIED[case]
    model: Any = tiny(kind, **changes).eval()
    ids = torch.tensor([[5, 9, 31, 7, 12, 40]])
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=2, **TOGETHER)
    wanted = plain(model, ids, 12)
    if kind not in OWN_CACHE:
        assert greedy(model, ids, 12).tokens.tolist() == wanted
    if kind in IGNORING | NO_BASE | OWN_CACHE:
        with pytest.raises(UnsupportedModelError):
            speculate(model, ids, exit_layer=1)
        return
    found = speculate(model, ids, exit_layer=1, max_new_tokens=12, draft_tokens=3, confidence=0)
    assert found.tokens.tolist() == wanted


def test_guesses_know_the_options_too() -> None:
    """Upper layers that do nothing: what they accept is what was guessed under the same options."""
    model: Any = tiny_model("llama", seed=3, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.generation_config = GenerationConfig(pad_token_id=0, **TOGETHER)
    ids = tiny_prompt(5, seed=1)
    found = speculate(model, ids, exit_layer=1, max_new_tokens=21, draft_tokens=4, confidence=0.0)
    assert (found.drafted, found.accepted, found.checks) == (15, 15, 5)


def test_an_end_that_is_passed_is_the_end_that_options_mean() -> None:
    model, ids = drafting_model("llama"), tiny_prompt(6)
    model.generation_config = GenerationConfig(pad_token_id=0)
    end = plain(model, ids)[3]
    model.generation_config.min_new_tokens = 20
    for write in (
        lambda ends: greedy(model, ids, NEW, ends),
        lambda ends: speculate(model, ids, exit_layer=1, max_new_tokens=NEW, eos_token_id=ends),
    ):
        found = write(end).tokens.tolist()
        mask = torch.ones_like(ids)
        wanted = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=end
        )
        assert found == wanted[0, 6:].tolist()
        assert end not in found[:20]
    # without an end there is nothing to put off, or to bring about
    model.generation_config.exponential_decay_length_penalty = (1, 2.0)
    for none in ((), -1):
        assert end in greedy(model, ids, NEW, none).tokens[:20]


def test_token_0_can_be_an_end_too() -> None:
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(pad_token_id=1, min_new_tokens=3)
    choice = greedy_choice(model, torch.tensor([[3, 4]]), NEW, {0})
    scores = choice.scores(torch.zeros(1, VOCABULARY), [5])
    assert scores[0].isinf().nonzero().flatten().tolist() == [0]


def test_nothing_is_done_where_nothing_is_asked_for() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(5)
    logits = torch.randn(3, VOCABULARY)
    choice = greedy_choice(model, ids, NEW, {2})
    assert not choice.processors
    assert choice.scores(logits, [1, 2]) is logits
    model.generation_config = None
    assert not greedy_choice(model, ids, NEW, {2}).processors
    assert len(greedy(model, ids, NEW, ()).tokens) == NEW
    bare = nn.Module()
    assert not greedy_choice(bare, ids, NEW, {2}).processors


def test_each_position_has_its_own_prefix() -> None:
    """A token may be written once only: each row knows what was written before it, and no more."""
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(pad_token_id=0, no_repeat_ngram_size=1)
    choice = greedy_choice(model, torch.tensor([[3, 4]]), NEW, ())
    logits = torch.zeros(3, VOCABULARY)
    scores = choice.scores(logits, [5, 6, 7])
    assert not logits.any()
    assert [row.isinf().nonzero().flatten().tolist() for row in scores] == [
        [3, 4, 5], [3, 4, 5, 6], [3, 4, 5, 6, 7]
    ]  # fmt: skip


REFUSED: dict[str, Any] = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "force_words_ids": [[4]],
    "guidance_scale": 1.5,
    "token_healing": True,
    "assistant_ensemble_weight": 0.5,
    "cache_implementation": "quantized",
    "watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=5, keys=[1, 2, 3]),
}


@pytest.mark.parametrize("option", [*REFUSED, "stop_strings", "max_time"])
def test_what_a_draft_cannot_honour_is_refused_by_name(option: str) -> None:
    model, ids = tiny_model("llama"), tiny_prompt(5)
    value = {**REFUSED, "stop_strings": ["a"], "max_time": 1.0}[option]
    refused = pytest.raises(InvalidInputError, match=rf"generation_config\.{option}: found ")
    setattr(model.generation_config, option, value)
    for write in (lambda: greedy(model, ids, NEW), lambda: speculate(model, ids, exit_layer=1)):
        with refused:
            write()
    if option in REFUSED:
        with refused:
            generate(model, ids, 1, max_new_tokens=NEW)
        model.generation_config = GenerationConfig(pad_token_id=0)
        with refused:
            generate(model, ids, 1, max_new_tokens=NEW, **{option: value})
        given = GenerationConfig()
        setattr(given, option, value)
        with refused:
            generate(model, ids, 1, max_new_tokens=NEW, generation_config=given)


class _Counting(LogitsProcessor):
    """Nobody can know what it does with a guess that is taken back."""


def test_processors_that_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), tiny_prompt(5)
    own = LogitsProcessorList([_Counting()])
    monkeypatch.setattr(type(model), "_get_logits_processor", lambda *_, **__: own)
    for write in (lambda: greedy(model, ids, NEW), lambda: speculate(model, ids, exit_layer=1)):
        with pytest.raises(InvalidInputError, match="found one that asks for _Counting"):
            write()


def test_what_transformers_refuses_is_refused() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(5)
    model.generation_config.repetition_penalty = -1.0
    with pytest.raises(InvalidInputError, match=r"model\.generation_config: .*strictly positive"):
        greedy(model, ids, NEW)


def test_the_configs_stop_strings_and_length_reach_transformers_loop() -> None:
    model, tokenizer, ids = tiny_model("llama"), byte_tokenizer(), tiny_prompt(6)
    model.generation_config = GenerationConfig(pad_token_id=0, max_new_tokens=NEW)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    whole = model.generate(ids, **options)
    assert generate(model, ids, 2).tolist() == whole.tolist()
    model.generation_config.stop_strings = [tokenizer.decode(whole[0, 12:14])]
    wanted = model.generate(ids, tokenizer=tokenizer, **options)
    assert wanted.shape[1] < whole.shape[1]
    assert generate(model, ids, 2, tokenizer=tokenizer).tolist() == wanted.tolist()
    assert model.generation_config.stop_strings
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        generate(model, ids, 2)
