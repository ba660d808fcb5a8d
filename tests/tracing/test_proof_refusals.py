"""Models that are not the sum of their edges are refused by the proof, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    eager_attention_forward,
)

import softtrace
from softtrace.decoding import speculate
from softtrace.errors import NonFiniteError, UnsupportedModelError
from tests.support.altered import (
    Amplified,
    NoMLP,
    Skips,
    built,
    changed,
    gated_heads,
    layer_twice,
    mixing_mlp,
    mlp_twice,
    not_finite,
    odd_layer,
    on_meta,
    other_norm,
    own_attention,
    replace_projection,
    retype,
)
from tests.support.state import state
from tests.support.tiny import tiny_model, tiny_prompt

SUM = r"layer 1 \((Odd|NoMLP)\): the node is not the sum of its edges: .* by [0-9.e-]+ at best"


@pytest.mark.parametrize(
    "ask",
    [
        softtrace.attach,
        softtrace.DensityLoss,
        lambda model: softtrace.edge_importance(model, tiny_prompt(4)),
        lambda model: speculate(model, tiny_prompt(4), exit_layer=1),
    ],
)
def test_the_name_of_a_model_is_no_model(ask: Callable[[Any], Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model: found str, .* AutoModelForCausalLM"):
        ask("owner/model")


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "doubled residual": (lambda: odd_layer(2, 1, 1, 1), SUM + r" \(allowed 1e-04\)"),
    "scaled attention": (lambda: odd_layer(1, 0.5, 1, 1), SUM),
    "doubled middle": (lambda: odd_layer(1, 1, 2, 1), SUM),
    "scaled MLP": (lambda: odd_layer(1, 1, 1, 0.9), SUM),
    "slightly scaled MLP": (lambda: odd_layer(1, 1, 1, 0.999), SUM),
    "repeated layer": (
        lambda: odd_layer(1, 1, 1, 1, calls=2), r"layer 1 \(Odd\): attention was asked for 2 times"
    ),
    "skipped layer": (retype(Skips), r"layer 1 \(Skips\): no softmax attention was seen"),
    "no MLP": (retype(NoMLP), SUM),
    "mixing MLP": (changed(mixing_mlp), "layer 1: its MLP on some tokens against .* they differ"),
    "own attention": (
        changed(own_attention),
        r"layer 1 \(LlamaDecoderLayer\): no softmax attention was seen in it \(its parts: "
        "LlamaMLP, LlamaRMSNorm, OwnAttention",
    ),
    "gated heads": (changed(gated_heads), "layer 2 .*: no output projection was found for the mix"),
    "bent projection": (
        replace_projection(lambda base: nn.Sequential(base, nn.Tanh())),
        "layer 2 .*: self_attn gives what attention adds, but does not read what the output proj",
    ),
    "odd logits": (
        changed(lambda model: setattr(model, "__class__", Amplified)),
        "the logits are not the head's output, nor that scaled or capped as the config says",
    ),
    "odd final norm": (
        changed(other_norm), "the final norm: NormSquared is not a scale a token times weight"
    ),
    "on meta": (on_meta, r"weights of model\.embed_tokens and \d+ other modules are on the meta"),
    "one layer twice": (changed(layer_twice), "runs the same layer twice"),
    "one MLP in two layers": (changed(mlp_twice), "module that is tied into two places"),
    "no head": (built("Llama", "Model"), "LlamaModel|no language-model head"),
    "classifier": (built("Llama", "ForSequenceClassification"), "no language-model head"),
    "encoder": (built("Bert", "Model"), "BertModel gives logits of shape NoneType"),
    "not causal": (built("RobertaPreLayerNorm"), "a token sees later ones"),
    "norm of the sum": (
        built("Bert", "LMHeadModel", is_decoder=True), "what it gives is the output of a norm"
    ),
    "no model": (lambda: nn.Linear(2, 2), "Linear is not a transformers causal language model"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_not_the_sum_of_its_edges_is_refused_by_name(name: str) -> None:
    build, message = REFUSED[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
    for parameter in nn.Module.parameters(
        model
    ):  # weights like a trained model's, not zeros and ones
        if parameter.dim() == 1 and not parameter.is_meta:
            parameter.data += 0.2 * torch.linspace(-1, 1, len(parameter))
    watched = name not in ("on meta", "no model")
    before = state(model) if watched else None
    for _ in range(2):  # a refusal is not remembered as a success
        with pytest.raises(UnsupportedModelError, match=message):
            softtrace.attach(model)
    assert (state(model) if watched else None) == before
    with pytest.raises(UnsupportedModelError):
        softtrace.edge_importance(model, tiny_prompt(3))
    with pytest.raises(UnsupportedModelError):
        softtrace.DensityLoss(model)


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 67}


SMALL_VIT = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48}


DEEP = {"num_hidden_layers": 2, "num_attention_heads": 4}


SPOKEN = {"num_codebooks": 2, "ffn_dim": 48, "hidden_size": 32, "vocab_size": 67}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
            "T5ForConditionalGeneration is an encoder-decoder model",
        ),
        (
            lambda: transformers.MusicgenForCausalLM(
                transformers.MusicgenDecoderConfig(**SPOKEN, **DEEP)
            ),
            "MusicgenForCausalLM does not run",
        ),
        (
            lambda: transformers.ViTForImageClassification(
                transformers.ViTConfig(**SMALL_VIT, **DEEP)
            ),
            "ViTForImageClassification",
        ),
    ],
    ids=["encoder-decoder", "sound", "images"],
)
def test_models_of_more_or_other_than_tokens(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        softtrace.attach(build())


class LatentValues(LlamaAttention):
    """Heads mix one latent and are told apart after that: no values of a head of its own."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **options: Any) -> Any:
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj)
        )
        latent = self.v_proj(hidden_states).view(shape).transpose(1, 2)[:, :1]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, _ = attend(self, q, k, latent.expand_as(k), attention_mask, scaling=self.scaling)
        up = torch.linspace(0.5, 1.5, mixed.shape[2])[:, None]
        mixed = mixed * up + mixed.roll(1, -1)
        return self.o_proj(mixed.reshape(*hidden_states.shape[:2], -1)), None


def test_latent_attention_whose_heads_share_their_values_is_refused() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].self_attn.__class__ = LatentValues
    with pytest.raises(UnsupportedModelError, match="values shared in a latent between heads"):
        softtrace.attach(model)


def test_a_model_that_is_causal_beside_padding_alone_is_refused() -> None:
    model: Any = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.set_attn_implementation("sdpa")  # makes no mask where nothing is padded
    with pytest.raises(UnsupportedModelError, match=r"is padded .*='eager'"):
        softtrace.attach(model)
    model.set_attn_implementation("eager")
    softtrace.attach(model)


def test_weights_that_are_not_finite_are_named_as_that() -> None:
    model = tiny_model("llama")
    not_finite(model)
    with pytest.raises(NonFiniteError, match="logits of the model on a tiny batch, run to attach"):
        softtrace.attach(model)
