"""Early exits that are exits, and which one to take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from softtrace import UnsupportedModelError
from softtrace.decoding import check_early_exit, exit_checks, generate, speculate
from softtrace.decoding.split_model import first_layers
from softtrace.tracing.attach import attach
from tests.support.tiny import tiny_model, tiny_prompt

EXITING = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def exit_by_hand(model: nn.Module, ids: Tensor, depth: int) -> Tensor:
    """Logits after ``depth`` layers, from the hidden states that transformers gives out."""
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[depth]
    logits: Tensor = model.lm_head(model.model.norm(hidden))
    return logits


@pytest.mark.parametrize("family", EXITING)
def test_an_early_exit_is_the_residual_stream_read_by_norm_and_head(family: str) -> None:
    model, ids = tiny_model(family, seed=1), tiny_prompt(9)
    assert check_early_exit(model).layers == 3
    for depth in (1, 2):
        with torch.no_grad(), first_layers(model, depth):
            found = model(input_ids=ids).logits
        torch.testing.assert_close(found, exit_by_hand(model, ids, depth), atol=1e-5, rtol=1e-4)
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GPT2", {"n_layer": 3, "n_embd": 32, "n_head": 4}),
        ("GPTNeoX", {"intermediate_size": 48}),
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("Falcon", {}),
    ],
)
def test_families_that_ignore_an_early_exit_are_refused(name: str, changes: dict[str, Any]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=67, eos_token_id=2, bos_token_id=1, pad_token_id=0,
        **(changes if name == "GPT2" else {**sizes, **changes}),
    )  # fmt: skip
    stem = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, stem)(config).eval()
    with pytest.raises(UnsupportedModelError, match="would be ignored without a word"):
        check_early_exit(model)
    with pytest.raises(UnsupportedModelError, match="ignored"):
        speculate(model, tiny_prompt(4), exit_layer=1)
    with pytest.raises(UnsupportedModelError, match="ignored"):
        generate(model, tiny_prompt(4), 1)


def test_an_exit_that_is_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    attach(model)
    forward = type(model).forward

    def other(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.config.num_hidden_layers < 3:
            output.logits = output.logits * 2
        return output

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "forward", other)
        with pytest.raises(UnsupportedModelError, match="is not the residual stream there"):
            check_early_exit(model)
    assert model.config.num_hidden_layers == 3
    single = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match="has 1 layer; an early exit needs two"):
        check_early_exit(single)


@pytest.mark.parametrize("family", EXITING)
def test_rounding_of_a_recording_is_no_part_of_the_proof(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Of SmolLM2 in bfloat16 it is a tenth of the logits; what is compared here has none."""
    monkeypatch.setattr(exit_checks, "tolerance", lambda dtype: 0.0)
    model = tiny_model(family, dtype=torch.bfloat16)
    assert check_early_exit(model).layers == 3
    assert not any(module._forward_hooks for module in model.modules())


def test_train_flags_are_put_back_by_the_proof() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    check_early_exit(model)
    assert [module.training for module in model.modules()] == flags
