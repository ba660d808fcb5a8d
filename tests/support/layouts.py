"""How the layers of every family of the zoo are laid out, written down by hand.

From each family's modelling code: which modules make the values, how they are split into heads,
what is added where. Nothing of softtrace is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

Module = Any  # nn.Module hides the attributes of its kinds from a checker
Split = Callable[[Module, Tensor, int], Tensor]  # attention, what it reads, heads -> [B, T, K, d]


def separate(name: str) -> Split:
    """A projection for values alone."""

    def split(attention: Module, x: Tensor, heads: int) -> Tensor:
        width = getattr(attention, "head_dim", None)
        values = getattr(attention, name)(x)
        width = getattr(attention, "v_head_dim", width) or values.shape[-1] // heads
        return values.unflatten(-1, (-1, width))

    return split


def scaled(attention: Module, x: Tensor, heads: int) -> Tensor:
    """MiMo: values times a constant."""
    return separate("v_proj")(attention, x, heads) * attention.v_scale


def normed(attention: Module, x: Tensor, heads: int) -> Tensor:
    """Gemma 4: values are normed, and are the keys where there is no projection for them."""
    projection = attention.v_proj if attention.v_proj is not None else attention.k_proj
    values: Tensor = attention.v_norm(projection(x).unflatten(-1, (-1, attention.head_dim)))
    return values


def latent(attention: Module, x: Tensor, heads: int) -> Tensor:
    """DeepSeek: values come out of a latent, beside the keys' parts without positions."""
    compressed = attention.kv_a_proj_with_mqa(x)[..., : attention.kv_lora_rank]
    both = attention.kv_b_proj(attention.kv_a_layernorm(compressed)).unflatten(-1, (heads, -1))
    return both[..., attention.qk_nope_head_dim :]


def thirds(name: str) -> Split:
    """Queries, keys and values one after another, for all heads (GPT-2, MPT)."""
    return lambda attention, x, heads: (
        getattr(attention, name)(x).chunk(3, dim=-1)[2].unflatten(-1, (heads, -1))
    )


def by_head(attention: Module, x: Tensor, heads: int) -> Tensor:
    """Queries, keys and values one after another within each head (GPT-NeoX, Bloom, Persimmon)."""
    return attention.query_key_value(x).unflatten(-1, (heads, 3, -1))[..., 2, :]


def last_head(name: str) -> Split:
    """All query heads, one key head, one value head (Falcon 7B)."""
    return lambda attention, x, heads: getattr(attention, name)(x).unflatten(-1, (heads + 2, -1))[
        ..., -1:, :
    ]


def falcon_groups(attention: Module, x: Tensor, heads: int) -> Tensor:
    """For each key head its query heads, the key, the value (Falcon 40B)."""
    groups = attention.num_kv_heads
    return attention.query_key_value(x).unflatten(-1, (groups, heads // groups + 2, -1))[..., -1, :]


def codegen(attention: Module, x: Tensor, heads: int) -> Tensor:
    """Four shards, each queries, values, keys in this order."""
    shards = attention.qkv_proj(x).unflatten(-1, (4, 3, heads // 4, -1))
    return shards[..., 1, :, :].flatten(-3, -2)


def phi3(attention: Module, x: Tensor, heads: int) -> Tensor:
    """Queries, then keys, then values, for fewer key-value heads than query heads."""
    width = attention.head_dim * attention.config.num_key_value_heads
    return attention.qkv_proj(x)[..., -width:].unflatten(-1, (-1, attention.head_dim))


def bigcode(attention: Module, x: Tensor, heads: int) -> Tensor:
    """Queries, then one key, then one value."""
    return attention.c_attn(x)[..., -attention.head_dim :].unsqueeze(-2)


def mlp_of(*names: str) -> Callable[[Module, Tensor], Tensor]:
    """The sum of the outputs of these children of a layer."""

    def run(layer: Module, x: Tensor) -> Tensor:
        found = [getattr(layer, name)(x) for name in names]
        parts = [each[0] if isinstance(each, tuple) else each for each in found]
        return sum(parts[1:], parts[0]).reshape(x.shape)

    return run


def bare(layer: Module, x: Tensor) -> Tensor:
    """No MLP module."""
    return layer.fc2(layer.activation_fn(layer.fc1(x)))  # type: ignore[no-any-return]


def bloom_mlp(layer: Module, x: Tensor) -> Tensor:
    """Without the residual that its own forward adds."""
    return layer.mlp.dense_4h_to_h(layer.mlp.gelu_impl(layer.mlp.dense_h_to_4h(x)))  # type: ignore[no-any-return]


def mpt_mlp(layer: Module, x: Tensor) -> Tensor:
    """Without the residual that its own forward adds."""
    return layer.ffn.down_proj(layer.ffn.act(layer.ffn.up_proj(x)))  # type: ignore[no-any-return]


_V_PROJ = separate("v_proj")
_MLP = mlp_of("mlp")


def gemma4_experts(layer: Module, x: Tensor) -> Tensor:
    """A dense MLP and experts, each with norms of its own; the router reads the node itself."""
    dense = layer.post_feedforward_layernorm_1(layer.mlp(layer.pre_feedforward_layernorm(x)))
    flat = x.reshape(-1, x.shape[-1])
    _, weights, chosen = layer.router(flat)
    routed = layer.experts(layer.pre_feedforward_layernorm_2(flat), chosen, weights)
    return dense + layer.post_feedforward_layernorm_2(routed.reshape(x.shape))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Layout:
    """What a layer does; the defaults are Llama's. Names are paths of attributes."""

    layers: str = "model.layers"
    attention: str = "self_attn"
    projection: str = "o_proj"
    values: Split = _V_PROJ
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    mlp: Callable[[Module, Tensor], Tensor] = _MLP
    after_mlp: str | None = None
    multiplier: str | None = None
    parallel: bool = False
    final_norm: str = "model.norm"
    head: str = "lm_head"
    logits: Callable[[Module, Tensor], Tensor] = lambda model, logits: logits
    shrunk: bool = False
    #: eager code gives probabilities before the share of an attention sink is taken off
    sink_after: bool = False


LLAMA = Layout()
LATENT = replace(LLAMA, values=latent)
POST = replace(
    LLAMA,
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
GEMMA = replace(
    LLAMA,
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
GLM4 = replace(LLAMA, after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
COHERE = replace(
    LLAMA,
    parallel=True,
    before_mlp="input_layernorm",
    logits=lambda model, logits: logits * model.logit_scale,
)
BART = Layout(
    layers="model.decoder.layers",
    projection="out_proj",
    before_attention="self_attn_layer_norm",
    before_mlp="final_layer_norm",
    mlp=bare,
    final_norm="model.decoder.layer_norm",
)
GPT2 = Layout(
    layers="transformer.h",
    attention="attn",
    projection="c_proj",
    values=thirds("c_attn"),
    before_attention="ln_1",
    before_mlp="ln_2",
    final_norm="transformer.ln_f",
)
GPTJ = replace(
    GPT2, projection="out_proj", values=separate("v_proj"), before_mlp="ln_1", parallel=True
)
NEOX = Layout(
    layers="gpt_neox.layers",
    attention="attention",
    projection="dense",
    values=by_head,
    parallel=True,
    final_norm="gpt_neox.final_layer_norm",
)
FALCON = Layout(
    layers="transformer.h",
    attention="self_attention",
    projection="dense",
    values=last_head("query_key_value"),
    before_mlp="input_layernorm",
    parallel=True,
    final_norm="transformer.ln_f",
)
GRANITE = replace(
    LLAMA,
    multiplier="residual_multiplier",
    logits=lambda model, logits: logits / model.config.logits_scaling,
)
CAPPED: Callable[[Module, Tensor], Tensor] = lambda model, logits: (  # noqa: E731
    model.config.final_logit_softcapping * (logits / model.config.final_logit_softcapping).tanh()
)

#: case of the zoo -> layout; all others are Llama's
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "sarvam_mla", "youtu"), LATENT),
    "minicpm3": replace(LATENT, multiplier="residual_scale", shrunk=True),
    **dict.fromkeys(("exaone4", "flex_olmo", "olmo2", "olmo3"), POST),
    **dict.fromkeys(("gemma2", "gemma2, window"), replace(GEMMA, logits=CAPPED)),
    "gemma3_text": GEMMA,
    "gemma4_text": replace(GEMMA, values=normed),
    "gemma4_text, experts": replace(GEMMA, values=normed, before_mlp=None, mlp=gemma4_experts),
    **dict.fromkeys(("glm4", "kolibri1"), GLM4),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "cohere, query norms"), COHERE),
    **dict.fromkeys(("blenderbot", "mbart", "pegasus"), BART),
    "bigbird_pegasus": replace(BART, final_norm="model.decoder.layernorm_embedding"),
    "whisper": replace(BART, head="proj_out"),
    "opt": replace(BART, final_norm="model.decoder.final_layer_norm"),
    "xglm": replace(BART, layers="model.layers", final_norm="model.layer_norm"),
    "biogpt": replace(
        BART, layers="biogpt.layers", final_norm="biogpt.layer_norm", head="output_projection"
    ),
    **dict.fromkeys(("gpt2", "gpt-sw3"), GPT2),
    "gpt_bigcode": replace(GPT2, values=bigcode),
    "gpt_neo": replace(
        GPT2, attention="attn.attention", projection="out_proj", values=separate("v_proj")
    ),
    "gptj": GPTJ,
    "codegen": replace(GPTJ, values=codegen),
    "gpt_neox": NEOX,
    "gpt_neox, sequential": replace(NEOX, parallel=False),
    "falcon, one key head": FALCON,
    "falcon, new layout": replace(
        FALCON, values=falcon_groups, before_attention="ln_attn", before_mlp="ln_mlp"
    ),
    "falcon, sequential, alibi": replace(
        FALCON, parallel=False, before_mlp="post_attention_layernorm"
    ),
    "bloom": replace(
        FALCON,
        values=by_head,
        parallel=False,
        before_mlp="post_attention_layernorm",
        mlp=bloom_mlp,
    ),
    "mpt": Layout(
        layers="transformer.blocks",
        attention="attn",
        projection="out_proj",
        values=thirds("Wqkv"),
        before_attention="norm_1",
        before_mlp="norm_2",
        mlp=mpt_mlp,
        final_norm="transformer.norm_f",
    ),
    "ctrl": Layout(
        layers="transformer.h",
        attention="multi_head_attention",
        projection="dense",
        values=separate("Wv"),
        before_attention="layernorm1",
        before_mlp="layernorm2",
        mlp=mlp_of("ffn"),
        final_norm="transformer.layernorm",
    ),
    "persimmon": replace(
        LLAMA, projection="dense", values=by_head, final_norm="model.final_layernorm"
    ),
    "phi": replace(
        LLAMA,
        projection="dense",
        parallel=True,
        before_mlp="input_layernorm",
        final_norm="model.final_layernorm",
    ),
    "phi3": replace(LLAMA, values=phi3),
    "stablelm, parallel": replace(LLAMA, parallel=True, before_mlp="input_layernorm"),
    **dict.fromkeys(
        ("apertus", "apertus1p5_text"),
        replace(LLAMA, before_attention="attention_layernorm", before_mlp="feedforward_layernorm"),
    ),
    "vaultgemma": replace(LLAMA, before_mlp="pre_feedforward_layernorm", logits=CAPPED),
    "nanochat": replace(LLAMA, logits=CAPPED),
    "moshi": replace(LLAMA, projection="o_proj.linear"),
    **dict.fromkeys(
        ("llama4_text", "llama4_text, chunks"), replace(LLAMA, mlp=mlp_of("feed_forward"))
    ),
    "lfm2, attention alone": replace(
        LLAMA,
        projection="out_proj",
        before_attention="operator_norm",
        before_mlp="ffn_norm",
        mlp=mlp_of("feed_forward"),
        final_norm="model.embedding_norm",
    ),
    "granite": GRANITE,
    "granite_swa": replace(GRANITE, sink_after=True),
    "granitemoe": replace(GRANITE, mlp=mlp_of("block_sparse_moe")),
    "granitemoe_swa": replace(GRANITE, mlp=mlp_of("block_sparse_moe"), sink_after=True),
    "mimo_v2_flash": replace(LLAMA, values=scaled),
    "granitemoeshared": replace(GRANITE, mlp=mlp_of("block_sparse_moe", "shared_mlp")),
    "hyperclovax": replace(GRANITE, after_attention="post_norm1", after_mlp="post_norm2"),
}
