"""A model in two parts says what it says in one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from softtrace import UnsupportedModelError
from softtrace.decoding import check_cache, check_early_exit, exit_early, greedy, speculate
from softtrace.decoding.exit_checks import decoder_layers
from softtrace.decoding.split_model import TwoParts
from softtrace.tracing.attach import attach
from tests.support.tiny import tiny_model, tiny_prompt
from tests.support.zoo import tiny

#: dense, sliding attention beside full, a mixture of experts, parallel sub-blocks
FAMILIES = ("llama", "gemma3_text", "mixtral", "phi")
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}


def split(model: nn.Module, depth: int) -> TwoParts:
    return TwoParts(model, decoder_layers(attach(model)), depth)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_parts_say_what_the_whole_says(family: str, depth: int) -> None:
    model = tiny(family, num_hidden_layers=3)
    ids = torch.tensor([[5, 9, 31, 7, 12, 40, 3, 22, 17, 9, 6, 11]])
    wanted = logits_of(model, ids)
    parts = split(model, depth)
    with torch.no_grad():
        torch.testing.assert_close(parts.whole(ids[:, :4]), wanted[3], **CLOSE)
        for begin, end in ((4, 7), (7, 8), (8, 12)):
            for place in range(begin, end):
                parts.first(ids[:, place : place + 1])
            torch.testing.assert_close(parts.rest(), wanted[begin:end], **CLOSE)


@pytest.mark.thorough
@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), max_size=5), st.integers(1, 2))
def test_what_is_forgotten_was_never_read(runs: list[tuple[int, int]], depth: int) -> None:
    model = tiny_model("llama", seed=3, dtype=torch.float64).eval()
    text = tiny_prompt(3, seed=5)
    draws = torch.Generator().manual_seed(len(runs))
    parts = split(model, depth)
    with torch.no_grad():
        parts.whole(text)
        for count, forgotten in runs:
            new = torch.randint(3, 60, (1, count), generator=draws)
            for place in range(count):
                parts.first(new[:, place : place + 1])
            whole = torch.cat((text, new), dim=1)
            torch.testing.assert_close(parts.rest(), logits_of(model, whole)[text.shape[1] :])
            parts.forget(min(forgotten, count))
            text = whole[:, : whole.shape[1] - min(forgotten, count)]
        assert {layer.get_seq_length() for layer in parts.cache.layers} == {text.shape[1]}


@pytest.mark.parametrize("wrapped", [False, True])
def test_of_a_prompt_the_head_reads_one_token(wrapped: bool) -> None:
    model: Any = tiny_model("llama", seed=1).eval()
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()
    proof = check_cache(check_early_exit(model), (2,))
    ids, wanted = tiny_prompt(9), logits_of(model, tiny_prompt(9))[-1].argmax()
    for decoded in (
        lambda: greedy(model, ids, 1).tokens,
        lambda: speculate(model, ids, exit_layer=2, max_new_tokens=1, proven_exit=proof).tokens,
        lambda: (
            exit_early(
                model, ids, confidence=1, exit_layer=2, max_new_tokens=1, proven_exit=proof
            ).tokens
        ),
    ):
        widths.clear()
        assert decoded().tolist() == [wanted]
        assert widths == [1]


def test_the_first_part_is_the_early_exit_and_the_rest_runs_no_layer_of_it() -> None:
    model, ids = tiny_model("llama", seed=1).eval(), tiny_prompt(6)
    ran: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    parts = split(model, 2)
    with torch.no_grad():
        ran.clear()  # of the proof
        parts.whole(ids[:, :5])
        found = parts.first(ids[:, 5:])
        assert ran == [0, 1, 2, 0, 1]
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(found, model.lm_head(model.model.norm(hidden))[0, -1])
        ran.clear()
        parts.rest()
        assert ran == [2]


def test_an_interrupted_run_leaves_the_model_as_it_was() -> None:
    model, ids = tiny_model("llama").eval(), tiny_prompt(5)
    layers = decoder_layers(attach(model))
    own = layers[0].forward

    def others(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    layers[0].forward = others  # as hooks of accelerate do
    proven_exit = check_cache(check_early_exit(model))
    runs: list[int] = []
    stop_at: list[int] = []

    def stop(*_: Any) -> None:
        runs.append(model.config.num_hidden_layers)
        if len(runs) == stop_at[-1]:
            raise KeyboardInterrupt

    model.lm_head.register_forward_hook(stop)
    before = [dict(vars(module)) for module in model.modules()]
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    for count, layers_run in ((2, 1), (4, 3)):  # in a draft, and in a check
        runs.clear()
        stop_at.append(count)
        with pytest.raises(KeyboardInterrupt):
            speculate(
                model, ids, exit_layer=1, draft_tokens=3, confidence=0, proven_exit=proven_exit
            )
        assert runs[-1] == layers_run
        assert [dict(vars(module)) for module in model.modules()] == before
        assert [dict(module._forward_hooks) for module in model.modules()] == hooks
        assert model.config.num_hidden_layers == 3
    assert layers[0].forward is others


@pytest.mark.thorough
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("before", [False, True])
def test_hooks_of_others_count_once(at: int, before: bool) -> None:
    model, ids = tiny_model("llama", seed=2, dtype=torch.float64).eval(), tiny_prompt(5)
    proven_exit = check_cache(check_early_exit(model)) if before else None
    plain = greedy(model, ids, 24, -1).tokens
    steering = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    layers = decoder_layers(attach(model))
    layers[at].register_forward_hook(lambda _, args, output: output + 0.3 * steering)
    wanted = greedy(model, ids, 24, -1).tokens
    assert not torch.equal(wanted, plain)
    for depth in (1, 2):
        found = speculate(
            model, ids, exit_layer=depth, max_new_tokens=24, draft_tokens=3, confidence=0,
            eos_token_id=-1, proven_exit=proven_exit,
        )  # fmt: skip
        assert torch.equal(found.tokens, wanted)


def test_a_model_that_cannot_continue_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    proven_exit = check_early_exit(tiny_model("llama"))
    assert not proven_exit.resumable
    assert check_cache(proven_exit).resumable == {1, 2}
    rest = TwoParts.rest

    def other(self: TwoParts) -> Tensor:
        return rest(self) * 1.01

    with monkeypatch.context() as patched:
        patched.setattr(TwoParts, "rest", other)
        with pytest.raises(UnsupportedModelError, match=r"from its first 1 layers .mismatch"):
            check_cache(proven_exit)

    def not_cut(self: Any, max_length: int) -> None:
        pass

    monkeypatch.setattr(DynamicCache().layer_class_to_replicate, "crop", not_cut)
    with pytest.raises(UnsupportedModelError, match="when it continues from a cache"):
        check_cache(proven_exit)


@pytest.mark.parametrize(("dtype", "rows", "refused"), [
    (torch.bfloat16, 1, False), (torch.bfloat16, 3, True), (torch.float32, 1, True),
])  # fmt: skip
def test_one_token_that_half_precision_rounds_is_no_reason_to_refuse(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, refused: bool
) -> None:
    """SmolLM2 after a short training differs by a tenth at one token of plain cached decoding."""
    proven_exit = check_early_exit(tiny_model("llama").to(dtype))
    rest = TwoParts.rest

    def rounded(self: TwoParts) -> Tensor:
        found = rest(self)
        found[-rows:] += 0.2 * found.abs().max()
        return found

    monkeypatch.setattr(TwoParts, "rest", rounded)
    with pytest.raises(UnsupportedModelError) if refused else nullcontext():
        check_cache(proven_exit)
