"""Decoding that is lossless: the same tokens as without a draft, and without a cache."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, MaxTimeCriteria, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from softtrace import UnsupportedModelError
from softtrace.decoding import (
    ProvenExit,
    check_cache,
    check_early_exit,
    exit_early,
    generate,
    greedy,
    recommend_exit,
    speculate,
)
from softtrace.decoding.exit_checks import EXIT_FIELD, exit_layer_of
from softtrace.errors import InvalidInputError
from tests.support.corpus import byte_tokenizer
from tests.support.tiny import tiny_model, tiny_prompt

EXITING = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
NEW = 24


def no_cache(model: nn.Module, ids: Tensor, count: int, ends: tuple[int, ...] = (2,)) -> list[int]:
    """Greedy decoding without any cache, one whole forward a token."""
    tokens: list[int] = []
    while len(tokens) < count and (not tokens or tokens[-1] not in ends):
        seen = torch.cat((ids, ids.new_tensor([tokens])), dim=1) if tokens else ids
        tokens.append(int(model(input_ids=seen).logits[0, -1].argmax()))
    return tokens


@pytest.mark.thorough
@pytest.mark.parametrize("family", EXITING)
def test_speculation_writes_what_plain_decoding_writes(family: str) -> None:
    model = tiny_model(family, seed=2, dtype=torch.float64)
    proven_exit = check_cache(check_early_exit(model))
    for seed in range(2):
        ids = tiny_prompt(5, seed=seed)
        wanted = no_cache(model, ids, NEW)
        assert greedy(model, ids, NEW).tokens.tolist() == wanted
        for depth, (draft, confidence) in itertools.product((1, 2), ((1, 0.0), (3, 0.0), (6, 0.1))):
            found = speculate(
                model, ids, exit_layer=depth, max_new_tokens=NEW, draft_tokens=draft,
                confidence=confidence, proven_exit=proven_exit,
            )  # fmt: skip
            where = seed, depth, draft
            assert found.tokens.tolist() == wanted, where
            assert 0 <= found.accepted <= found.reached <= found.drafted, where
            assert found.drafted <= (draft - 1) * found.checks, where
            assert len(wanted) == 1 + found.accepted + found.checks, where


def test_a_model_whose_upper_layers_do_nothing_accepts_every_guess() -> None:
    model = tiny_model("llama", seed=3, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    ids, heads = tiny_prompt(5, seed=1), []
    proven_exit = check_cache(check_early_exit(model))
    with model.lm_head.register_forward_hook(lambda *_: heads.append(1)):
        found = speculate(
            model, ids, exit_layer=1, max_new_tokens=21, draft_tokens=4, confidence=0.0,
            eos_token_id=-1, proven_exit=proven_exit,
        )  # fmt: skip
    assert len(heads) == 1 + 5 * 4  # the prompt; three guesses and a check, and nothing in vain
    assert found.tokens.tolist() == no_cache(model, ids, 21, ())
    assert (found.drafted, found.accepted, found.checks) == (15, 15, 5)
    assert found.acceptance == 1
    assert found.accepted_per_draft == 3
    assert math.isnan(greedy(model, ids, 3).acceptance)


def test_low_confidence_ends_a_draft() -> None:
    model, ids = tiny_model("llama", seed=2), tiny_prompt(5)
    bold = speculate(model, ids, exit_layer=1, max_new_tokens=NEW, draft_tokens=5, confidence=0.0)
    timid = speculate(model, ids, exit_layer=1, max_new_tokens=NEW, draft_tokens=5, confidence=1.0)
    assert timid.drafted == 0  # every draft ended at its first guess
    assert bold.drafted > bold.checks
    assert torch.equal(bold.tokens, timid.tokens)


def test_how_sure_an_exit_is_does_not_depend_on_what_the_config_leaves_it() -> None:
    """Of two tokens that are left one has half of the probability at least; the exit has not."""
    model, ids = tiny_model("llama", seed=2), tiny_prompt(5)
    model.generation_config.suppress_tokens = list(range(2, model.config.vocab_size))
    options: dict[str, Any] = {"exit_layer": 1, "max_new_tokens": NEW, "confidence": 0.4}
    found = speculate(model, ids, draft_tokens=5, **options)
    assert found.drafted == 0
    assert not exit_early(model, ids, **options).early.any()
    assert set(found.tokens.tolist()) <= {0, 1}


@pytest.mark.thorough
def test_text_ends_where_plain_decoding_ends() -> None:
    model, ids = tiny_model("llama", seed=2, dtype=torch.float64), tiny_prompt(5)
    plain = no_cache(model, ids, NEW, ())
    proven_exit = check_cache(check_early_exit(model))
    for end in set(plain):
        wanted = plain[: plain.index(end) + 1]
        for depth, draft in itertools.product((1, 2), (1, 7)):
            found = speculate(
                model, ids, exit_layer=depth, max_new_tokens=NEW, draft_tokens=draft,
                confidence=0, eos_token_id=end, proven_exit=proven_exit,
            )  # fmt: skip
            assert found.tokens.tolist() == wanted
    for none in ("</s>", ["</s>"], 2.0):
        with pytest.raises(InvalidInputError, match=r"eos_token_id: found .*allowed are ids"):
            speculate(model, ids, exit_layer=1, eos_token_id=none)  # type: ignore[arg-type]
    several = speculate(model, ids, exit_layer=1, eos_token_id=plain[1:3])
    assert several.tokens.tolist() == plain[:2]
    model.generation_config.eos_token_id = [plain[1], plain[2]]
    assert speculate(model, ids, exit_layer=1).tokens.tolist() == plain[:2]


def test_transformers_own_loop_writes_the_same() -> None:
    model, ids = tiny_model("llama", seed=4, dtype=torch.float64), tiny_prompt(6)
    wanted = no_cache(model, ids, 12)
    found = generate(model, ids, 2, max_new_tokens=12)
    assert found[0].tolist() == [*ids[0].tolist(), *wanted]
    assert model.config.num_hidden_layers == 3


def test_bad_input_is_named() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(5)
    for wrong in (0, 3, -1, True, 1.0):
        with pytest.raises(InvalidInputError, match=r"exit_layer: found .*, allowed 1 to 2"):
            speculate(model, ids, exit_layer=wrong)  # type: ignore[arg-type]
    for proven_exit in (check_cache(check_early_exit(model)), None):
        with pytest.raises(InvalidInputError, match=r"found \(2, 5\), allowed is \[1, T\]"):
            speculate(model, tiny_prompt(5, batch=2), exit_layer=1, proven_exit=proven_exit)
        with pytest.raises(InvalidInputError, match="exit_layer: found 7, allowed 1 to 2"):
            speculate(model, ids, exit_layer=7, proven_exit=proven_exit)
    with pytest.raises(InvalidInputError, match="draft_tokens: found 0"):
        speculate(model, ids, exit_layer=1, draft_tokens=0)
    with pytest.raises(InvalidInputError, match=r"confidence: found 1\.5"):
        speculate(model, ids, exit_layer=1, confidence=1.5)
    with pytest.raises(InvalidInputError, match="max_new_tokens: found 0"):
        speculate(model, ids, exit_layer=1, max_new_tokens=0)
    with pytest.raises(InvalidInputError, match="max_new_tokens: found 0"):
        greedy(model, ids, 0)
    for many in (tiny_prompt(5, batch=2), ids[0], ids[:, :0]):
        for proven_exit in (None, check_early_exit(model)):
            with pytest.raises(InvalidInputError, match=r"input_ids: found .* allowed is \[1, T\]"):
                generate(model, many, 1, proven_exit=proven_exit, max_new_tokens=1)
        with pytest.raises(InvalidInputError, match=r"input_ids: found .* allowed is \[1, T\]"):
            greedy(model, many, 1)
    prompt: Any = BatchEncoding({"input_ids": ids})  # as a tokenizer or a chat template gives it
    for write in (
        lambda: greedy(model, prompt, 1),
        lambda: speculate(model, prompt, exit_layer=1),
        lambda: generate(model, prompt, 1),
    ):
        with pytest.raises(InvalidInputError, match=r'found BatchEncoding.* under "input_ids"'):
            write()
    model.train()
    for write in (lambda: speculate(model, ids, exit_layer=1), lambda: greedy(model, ids, 3)):
        with pytest.raises(InvalidInputError, match="found one in train mode"):
            write()
    assert model.training


def test_the_config_can_recommend_an_exit(tmp_path: Any) -> None:
    model, ids = tiny_model("llama", seed=2, dtype=torch.float64), tiny_prompt(5)
    with pytest.raises(InvalidInputError, match=f"config has no {EXIT_FIELD}"):
        speculate(model, ids)
    setattr(model.config, EXIT_FIELD, 2)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert exit_layer_of(again) == 2
    assert torch.equal(speculate(again, ids).tokens, greedy(model, ids, 64).tokens)


def test_a_model_of_any_trainer_can_be_given_a_recommended_exit(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", num_hidden_layers=4, attention_dropout=0.5, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.model.layers[2:]:  # all is said after two layers
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
    text = tiny_prompt(12, batch=6)
    model.train()
    assert recommend_exit(model, text) == 2 == model.config.softtrace_exit_layer
    assert all(module.training for module in model.modules())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert speculate(again, text[:1], eos_token_id=-1).acceptance == 1
    assert torch.equal(
        generate(again, text[:1], max_new_tokens=9),
        generate(again, text[:1], exit_layer=2, max_new_tokens=9),
    )
    found = []
    monkeypatch.setattr(
        "softtrace.decoding.recommend.recommended_exit",
        lambda model, _: found.append(model.training) or 3,
    )
    assert recommend_exit(model, text) == 3
    assert found == [False]  # without dropout
    for wrong in (text[0], text[:0], text[:, :7]):
        with pytest.raises(InvalidInputError, match=r"input_ids: found .* allowed is \[N, T\]"):
            recommend_exit(model, wrong)


def test_no_exit_is_recommended_where_there_is_none() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers"):
        recommend_exit(model, tiny_prompt(8, batch=2))
    assert not hasattr(model.config, EXIT_FIELD)


@pytest.mark.parametrize("new", [1, 2, 3])
def test_short_texts(new: int) -> None:
    model, ids = tiny_model("llama", seed=2, dtype=torch.float64), tiny_prompt(5)
    found = speculate(model, ids, exit_layer=1, max_new_tokens=new, confidence=0, eos_token_id=-1)
    assert found.tokens.tolist() == no_cache(model, ids, new, ())
    assert found.accepted + found.checks == new - 1 <= found.drafted + found.checks
    assert math.isnan(found.accepted_per_draft) == (new < 3)  # a check writes one token itself


@pytest.mark.parametrize(
    ("kind", "changes", "prompt", "refused"),
    [
        ("dynamic", {"factor": 2.0}, 8, True),
        ("dynamic", {"factor": 2.0}, 40, True),
        ("longrope", {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}, 8, True),
        ("longrope", {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}, 17, False),
    ],
)
def test_rotations_that_change_with_the_length_are_refused(
    kind: str, changes: dict[str, Any], prompt: int, refused: bool
) -> None:
    """A check over the boundary would rotate its first tokens otherwise than one-token steps do."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 16, **changes}
    model = tiny_model("llama", seed=2, rope_parameters=rope, max_position_embeddings=64)
    ids, options = tiny_prompt(prompt), {"exit_layer": 1, "confidence": 0, "eos_token_id": -1}
    assert len(speculate(model, tiny_prompt(4), max_new_tokens=12, **options).tokens) == 12
    if not refused:
        found = speculate(model, ids, max_new_tokens=NEW, **options)
        assert torch.equal(found.tokens, greedy(model, ids, NEW, -1).tokens)
        return
    with pytest.raises(UnsupportedModelError, match=f"rotary frequencies .{kind}. beyond 16"):
        speculate(model, ids, max_new_tokens=NEW, **options)
    with pytest.raises(UnsupportedModelError, match="decode plainly"):
        generate(model, ids, 1, max_new_tokens=NEW)
    with pytest.raises(UnsupportedModelError, match="decode plainly"):
        generate(model, ids, 1, max_length=prompt + NEW)
    model.generation_config.max_new_tokens = NEW
    with pytest.raises(UnsupportedModelError, match="decode plainly"):
        generate(model, ids, 1)


def test_an_interrupted_draft_leaves_the_model_whole() -> None:
    """transformers cuts the model off for a draft and does not put it back after an exception."""
    model, ids = tiny_model("llama", seed=4), tiny_prompt(6)

    def stop(*_: Any) -> None:
        if model.config.num_hidden_layers == 1 and stopping:
            raise KeyboardInterrupt

    stopping: list[bool] = []
    model.lm_head.register_forward_hook(stop)
    proven_exit = check_early_exit(model)
    stopping.append(True)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, 1, max_new_tokens=12, proven_exit=proven_exit)
    assert model.config.num_hidden_layers == 3


@pytest.fixture
def model_and_exit() -> tuple[nn.Module, ProvenExit]:
    model = tiny_model("llama", seed=2, dtype=torch.float64)
    return model, check_early_exit(model)


def test_a_proof_is_not_run_again(
    model_and_exit: tuple[nn.Module, ProvenExit], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, proven_exit = model_and_exit
    proven_exit, ids = check_cache(proven_exit), tiny_prompt(5)
    wanted = [write(model, ids, exit_layer=2, max_new_tokens=9) for write in (generate, speculate)]
    for proof in ("attach_whatever_hooks", "check_early_exit", "check_cache"):
        monkeypatch.delattr(f"softtrace.decoding.speculative.{proof}")
    options: dict[str, Any] = {"exit_layer": 2, "proven_exit": proven_exit}
    assert torch.equal(generate(model, ids, max_new_tokens=9, **options), wanted[0])
    assert torch.equal(speculate(model, ids, max_new_tokens=9, **options).tokens, wanted[1].tokens)
    for write in (generate, speculate):  # what depends on the text is checked all the same
        with pytest.raises(InvalidInputError, match="input_ids"):
            write(model, ids + 1000, exit_layer=2, proven_exit=proven_exit)


def test_a_proof_of_another_model_is_refused(
    model_and_exit: tuple[nn.Module, ProvenExit],
) -> None:
    model, proven_exit = model_and_exit
    proven_exit, ids = check_cache(proven_exit), tiny_prompt(5)
    refused = pytest.raises(InvalidInputError, match="proven_exit: found one of another model")
    for write in (generate, speculate):
        for other in (copy.deepcopy(model), copy.copy(model)):  # which shares all modules
            with refused:
                write(other, ids, exit_layer=1, proven_exit=proven_exit)
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)
    for write in (generate, speculate):
        with refused:
            write(model, ids, exit_layer=1, proven_exit=proven_exit)
    with refused:
        check_cache(proven_exit)


def test_an_exit_that_was_not_proven_to_be_gone_on_from_is_refused(
    model_and_exit: tuple[nn.Module, ProvenExit],
) -> None:
    model, proven_exit = model_and_exit
    ids = tiny_prompt(5)
    with pytest.raises(InvalidInputError, match=r"after 1 layers .*: none.; .*check_cache"):
        speculate(model, ids, exit_layer=1, proven_exit=proven_exit)
    of_one = check_cache(proven_exit, (1,))
    assert speculate(model, ids, exit_layer=1, proven_exit=of_one).checks
    with pytest.raises(InvalidInputError, match=r"after 2 layers .proven exit layers: 1."):
        speculate(model, ids, exit_layer=2, proven_exit=of_one)
    for depth in (0, 3):
        with pytest.raises(InvalidInputError, match=f"exit_layer: found {depth}, allowed 1 to 2"):
            check_cache(of_one, (depth,))
    both = check_cache(of_one, (2,))
    assert both.resumable == {1, 2} == check_cache(proven_exit).resumable
    assert speculate(model, ids, exit_layer=2, proven_exit=both).checks


class _StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_nothing_is_written_past_a_stop() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # upper layers that change little: drafts are accepted
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight *= 0.01
            layer.mlp.down_proj.weight *= 0.01
    ids, past = tiny_prompt(6), 0
    for length in range(8, 16):
        options = {
            "max_new_tokens": NEW,
            "stopping_criteria": [_StopAt(length), MaxTimeCriteria(600)],
        }
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
        own = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, assistant_early_exit=2,
            **options,
        )  # fmt: skip
        past += own.shape[1] > length
        assert generate(model, ids, 2, **options).tolist() == plain.tolist()
        assert plain.shape[1] == length
    assert past  # transformers' own loop does


class _Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ends += 1


def test_nothing_is_streamed_past_a_stop() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(6)
    model.generation_config.eos_token_id = None
    for criteria in ([], [_StopAt(9)], [MaxTimeCriteria(600), _StopAt(12)]):
        heard = _Heard()
        found = generate(
            model, ids, 2, max_new_tokens=NEW, stopping_criteria=criteria, streamer=heard
        )
        assert (heard.tokens, heard.ends) == (found[0].tolist(), 1)


def test_tokens_are_returned_whatever_the_config_asks_for() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(6)
    wanted = generate(model, ids, 2, max_new_tokens=5)
    model.generation_config.return_dict_in_generate = True
    assert torch.equal(generate(model, ids, 2, max_new_tokens=5), wanted)
    with pytest.raises(InvalidInputError, match="return_dict_in_generate: found True"):
        generate(model, ids, 2, max_new_tokens=5, return_dict_in_generate=True)
    with pytest.raises(InvalidInputError, match=r"assistant_early_exit: found 2, .* exit_layer"):
        generate(model, ids, max_new_tokens=5, assistant_early_exit=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_cache", False), ("cache_implementation", "static"), ("cache_implementation", "dynamic")],
)
def test_a_cache_that_can_be_cut_is_taken_whatever_the_config_says(name: str, value: Any) -> None:
    model, ids = tiny_model("llama"), tiny_prompt(6)
    wanted = generate(model, ids, 2, max_new_tokens=5)
    setattr(model.generation_config, name, value)
    assert torch.equal(generate(model, ids, 2, max_new_tokens=5), wanted)
    assert getattr(model.generation_config, name) == value


def test_ends_may_be_a_tensor() -> None:
    model, ids = tiny_model("llama", seed=2, dtype=torch.float64), tiny_prompt(5)
    plain = greedy(model, ids, NEW, -1).tokens
    for end in (plain[2:4], plain[2]):
        assert torch.equal(greedy(model, ids, NEW, end).tokens, greedy(model, ids, 3, -1).tokens)


@pytest.mark.parametrize("ends", [True, [2, False], torch.tensor([True]), [torch.tensor(2.5)]])
def test_what_is_no_id_is_no_end(ends: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"eos_token_id: found .*, allowed are ids"):
        greedy(tiny_model("llama"), tiny_prompt(5), NEW, ends)


def test_a_stop_string_ends_a_text_where_plain_decoding_ends_it() -> None:
    model, tokenizer, ids = tiny_model("llama"), byte_tokenizer(), tiny_prompt(6)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NEW, "attention_mask": torch.ones_like(ids), "do_sample": False}
    whole = model.generate(ids, **options)
    stop = tokenizer.decode(whole[0, 12:14])
    options |= {"stop_strings": [stop], "tokenizer": tokenizer}
    plain = model.generate(ids, **options)
    assert plain.shape[1] < whole.shape[1]
    assert generate(model, ids, 2, **options).tolist() == plain.tolist()
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        generate(model, ids, 2, stop_strings=[stop])
