"""The attach-time proof: models that are the sum of their edges pass, all others are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    eager_attention_forward,
)

import softtrace
from softtrace.errors import NonFiniteError, UnsupportedModelError
from softtrace.families import fitting
from tests.test_instrument import state
from tests.tiny import COMMON, FAMILIES, GROUPED, tiny_model, tiny_prompt

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_sequential_pre_norm_models_pass_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    for seed, layers in enumerate((3, 3, 12)):
        model = tiny_model(family, seed=seed, num_hidden_layers=layers).to(dtype)
        instrument = softtrace.attach(model)
        assert instrument.anatomy.pattern == "sequential pre-norm"
        assert len(instrument.anatomy.layers) == layers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_surroundings_of_attach_play_no_part(family: str) -> None:
    """Autocast rounds and a default device moves what is made without one; gradients are on."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        softtrace.attach(tiny_model(family))
        with pytest.raises(UnsupportedModelError):
            softtrace.attach(odd_layer(1, 1, 1, 0.999))
    model, ids = tiny_model(family, seed=1), tiny_prompt(5)
    with torch.device("meta"):
        softtrace.attach(model)
        term = softtrace.DensityLoss(model)(ids, step=0)
    assert term.loss.device.type == "cpu"
    assert term == softtrace.DensityLoss(model)(ids, step=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("stem", ["Phi3", "Granite", "Starcoder2"])
def test_models_of_the_same_layout_pass_without_being_on_a_list(stem: str) -> None:
    config = getattr(transformers, f"{stem}Config")(**{**COMMON, **GROUPED, "num_hidden_layers": 2})
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    ids = tiny_prompt(6)
    with torch.no_grad():
        recording = softtrace.attach(model).record(ids)
        torch.testing.assert_close(recording.logits, model(ids).logits, atol=1e-5, rtol=1e-5)


class Odd(LlamaDecoderLayer):
    """A Llama layer with a factor on each of its four edges."""

    factors = (1.0, 1.0, 1.0, 1.0)
    calls = 1

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        stream, attention, middle, mlp = self.factors
        for _ in range(self.calls):
            normed = self.input_layernorm(hidden_states)
            mixed = self.self_attn(hidden_states=normed, **options)[0]
            hidden_states = stream * hidden_states + attention * mixed
            added = self.mlp(self.post_attention_layernorm(hidden_states))
            hidden_states = middle * hidden_states + mlp * added
        return hidden_states


class Mixing(nn.Module):
    """An MLP in which a token sees the one before it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor) -> Tensor:
        before = torch.cat((hidden_states[:, :1], hidden_states[:, :-1]), dim=1)
        return self.inner(hidden_states + 0.01 * before)  # type: ignore[no-any-return]


class TwoResults(nn.Module):
    """An MLP that returns its router's logits too, as mixtures of experts do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(hidden_states), hidden_states[..., :1]


class TakesFirst(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=normed, **options)[0]
        mlp: Any = self.mlp
        return hidden_states + mlp(self.post_attention_layernorm(hidden_states))[0]  # type: ignore[no-any-return]


def two_results(model: Any) -> None:
    layer = model.model.layers[1]
    layer.mlp = TwoResults(layer.mlp)
    layer.__class__ = TakesFirst


def mixing_mlp(model: Any) -> None:
    layer = model.model.layers[1]
    layer.mlp = Mixing(layer.mlp)


def odd_layer(*factors: float, calls: int = 1) -> nn.Module:
    model = tiny_model("llama")
    layer: Any = model.model.layers[1]  # type: ignore[union-attr, index]
    layer.__class__ = Odd
    layer.factors, layer.calls = factors, calls
    return model


def test_an_odd_layer_without_factors_passes() -> None:
    model = odd_layer(1, 1, 1, 1)
    softtrace.attach(model)


def test_projections_that_values_need_are_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong guess of what nobody reads costs time, never a wrong number."""
    usual = softtrace.attach(tiny_model("llama")).anatomy.layers[0].score_projections
    assert len(usual) == 2
    monkeypatch.setattr(fitting, "_SCORES", ("q_proj", "v_proj"))
    instrument = softtrace.attach(tiny_model("llama"))
    assert all(modules.score_projections == () for modules in instrument.anatomy.layers)


def test_an_mlp_that_also_returns_its_routing_passes() -> None:
    model, other, ids = changed(two_results)(), tiny_model("llama"), tiny_prompt(6)
    found, expected = (softtrace.density_curve(each, ids) for each in (model, other))
    torch.testing.assert_close(found.total_variation, expected.total_variation)


class Skips(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        return hidden_states


class NoMLP(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=normed, **options)[0]
        self.post_attention_layernorm(hidden_states)
        return hidden_states


class OwnAttention(nn.Module):
    """Does not look its function up in transformers' interface."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.v_proj, self.o_proj = inner.v_proj, inner.o_proj
        self.groups = inner.num_key_value_groups

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        value = self.v_proj(hidden_states).unflatten(-1, (2, -1))
        return self.o_proj(value.repeat_interleave(self.groups, 2).flatten(2)), None


class Adapter(nn.Module):
    """A projection in a wrapper, as adapters and quantisers put them."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.weight = base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)  # type: ignore[no-any-return]


class LinearWithDelta(nn.Linear):
    """A ``Linear`` by type whose ``weight`` is not what it multiplies with."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x


class Amplified(transformers.LlamaForCausalLM):
    """Does something to the logits after the head."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits.tanh()
        return output


class NormSquared(nn.Module):
    """No scale a token times a weight: not linearisable."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.abs()


def changed(change: Callable[[Any], None]) -> Callable[[], nn.Module]:
    """Builds a tiny Llama of which ``change`` alters something."""

    def build() -> nn.Module:
        model = tiny_model("llama")
        change(model)
        return model

    return build


def retype(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    return changed(lambda model: setattr(model.model.layers[1], "__class__", kind))


def replace_projection(make: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def change(model: Any) -> None:
        attention = model.model.layers[2].self_attn
        attention.o_proj = make(attention.o_proj)

    return changed(change)


def own_attention(model: Any) -> None:
    model.model.layers[1].self_attn = OwnAttention(model.model.layers[1].self_attn)


def with_delta(base: Any) -> nn.Module:
    projection = LinearWithDelta(32, 32, bias=False)
    projection.weight = base.weight
    return projection


def gated_heads(model: Any) -> None:
    """The heads are gated between the mix and the projection, as in AFMoE and Qwen3-Next."""
    attention = model.model.layers[2].self_attn
    attention.o_proj.register_forward_pre_hook(lambda module, args: args[0].sigmoid() * args[0])


def layer_twice(model: Any) -> None:
    model.model.layers[2] = model.model.layers[1]


def mlp_twice(model: Any) -> None:
    model.model.layers[2].mlp = model.model.layers[1].mlp


class Scattered(transformers.LlamaForCausalLM):
    """Says that its weights are on two devices, which this machine need not have."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        class Elsewhere:
            device, is_meta = torch.device("cuda:1"), False

        yield from super().parameters(recurse)
        yield Elsewhere()  # type: ignore[misc]


def other_norm(model: Any) -> None:
    model.model.norm = NormSquared()


def built(stem: str, kind: str = "ForCausalLM", **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = {**COMMON, "num_hidden_layers": 2, "intermediate_size": 48, **config}
        return getattr(transformers, stem + kind)(  # type: ignore[no-any-return]
            getattr(transformers, f"{stem}Config")(**settings)
        ).eval()

    return build


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return built("Llama")()


def not_finite(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")


SUM = r"layer 1 \((Odd|NoMLP)\): the node is not the sum of its edges: .* by [0-9.e-]+ at best"

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
    "two devices": (
        changed(lambda model: setattr(model, "__class__", Scattered)),
        r"Scattered: its layers are computed on 2 devices \(cpu, cuda:1\)",
    ),
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
    watched = name not in ("on meta", "no model", "two devices")
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


def test_multipliers_are_found_by_what_adds_up() -> None:
    """Granite scales embeddings, attention, residuals and logits."""
    scales = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 4.0}
    model = built("Granite", num_key_value_heads=2, residual_multiplier=0.3, **scales)()
    ids = tiny_prompt(5)
    with torch.no_grad():
        instrument = softtrace.attach(model)
        recording = instrument.record(ids)
        torch.testing.assert_close(recording.logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    found = instrument.anatomy.layers[0]
    assert (found.attention_scale, found.mlp_scale) == (0.3, 0.3)
    assert instrument.anatomy.readout.after.field == "logits_scaling"


def test_weights_that_are_not_finite_are_named_as_that() -> None:
    model = tiny_model("llama")
    not_finite(model)
    with pytest.raises(NonFiniteError, match="logits of the model on a tiny batch, run to attach"):
        softtrace.attach(model)
