"""A literal reference for every family of the zoo: each edge's vector, by the model's own modules.

What each family's layer does is written down here by hand, from its modelling code: which modules
make the values, how they are split into heads, what is added where. Attention probabilities are the
model's own, from its eager code. Nothing of softtrace is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "youtu"), LATENT),
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
    "apertus": replace(
        LLAMA, before_attention="attention_layernorm", before_mlp="feedforward_layernorm"
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

#: norms that multiply with their weight plus one; those of a LayerNorm's kind by their name
PLUS_ONE = (
    *("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "VaultGemmaRMSNorm"),
    *("MiniMaxM3VLRMSNorm", "NemotronLayerNorm1P"),
)


def linear_part(norm: Module, part: Tensor) -> Tensor:
    """A norm without its scale and bias."""
    if "LayerNorm" in type(norm).__name__:
        part = part - part.mean(-1, keepdim=True)
    weight = getattr(norm, "weight", None)
    if weight is None:
        return part
    return part * (weight + 1 if type(norm).__name__ in PLUS_ONE else weight)


def scale_of(norm: Module, full: Tensor) -> Tensor:
    """``[..., 1]``: what the norm multiplies a vector's linear part with."""
    linear, normed = linear_part(norm, full), norm(full)
    if getattr(norm, "bias", None) is not None:
        normed = normed - norm.bias
    largest = linear.abs().argmax(-1, keepdim=True)
    return normed.gather(-1, largest) / linear.gather(-1, largest)


def at(module: Module, path: str | None) -> Module:
    """The attribute at a path; the identity for None."""
    if path is None:
        return torch.nn.Identity()
    for name in path.split("."):
        module = getattr(module, name)
    return module


@dataclass(frozen=True)
class Layer:
    """Importances or masks of one layer: ``[B, H, T, S]`` and three ``[B, T]``."""

    attention: Tensor
    attention_residual: Tensor
    mlp: Tensor
    mlp_residual: Tensor


@dataclass(frozen=True)
class Reference:
    """A model's own attention, its layout, and its embedding of a padded batch."""

    model: Module
    layout: Layout
    probabilities: tuple[Tensor, ...]
    embedding: Tensor
    logits: Tensor

    @property
    def layers(self) -> list[Module]:
        """First to last."""
        return list(at(self.model, self.layout.layers))

    def values(self, layer: Module, node: Tensor, heads: int) -> Tensor:
        """``[B, H, S, d]``: values of every query head."""
        layout = self.layout
        attention = at(layer, layout.attention)
        found = layout.values(attention, at(layer, layout.before_attention)(node), heads)
        return found.transpose(1, 2).repeat_interleave(heads // found.shape[2], dim=1)

    def output_weight(self, layer: Module, heads: int) -> Tensor:
        """``[H, d, d_model]``."""
        projection = at(at(layer, self.layout.attention), self.layout.projection)
        weight = projection.weight
        if type(projection).__name__ != "Conv1D":
            weight = weight.T
        return weight.reshape(heads, -1, weight.shape[-1])  # type: ignore[no-any-return]

    def run(self, masks: list[Layer] | None) -> tuple[Tensor, list[Layer]]:
        """Logits with every edge times its mask, and the importances of the edges as they are.

        Importances mean something only without masks. Edges into padding are not looked at.
        """
        layout, x = self.layout, self.embedding
        importances = []
        for index, layer in enumerate(self.layers):
            a = self.probabilities[index]
            heads, last = a.shape[1], index == len(self.layers) - 1
            mask = masks[index] if masks else Layer(*(torch.ones(1) for _ in range(4)))
            seen = a * mask.attention
            v, weight = self.values(layer, x, heads), self.output_weight(layer, heads)
            # [B, H, T, S, d_model]: the vector of every attention edge
            vectors = seen[..., None] * (v @ weight)[:, :, None]
            projection = at(at(layer, layout.attention), layout.projection)
            raw = vectors.sum((1, 3))
            if getattr(projection, "bias", None) is not None:
                raw = raw + projection.bias
            norm = at(layer, layout.after_attention)
            times = getattr(layer, layout.multiplier) if layout.multiplier else 1.0
            added = norm(raw) * times
            if layout.after_attention is not None:
                vectors = linear_part(norm, vectors) * scale_of(norm, raw)[:, None, :, None]
            vectors = vectors * times
            residual = mask.attention_residual[..., None] * x
            if layout.parallel:
                mlp = self.mlp(layer, x) * times
                kept = mask.mlp[..., None] * mlp
                parts = [vectors, residual[:, None, :, None], kept[:, None, :, None]]
                x = residual + added + kept
                sizes = self.sizes(parts, last)
                total = sizes[0].sum((1, 3)) + sizes[1][:, 0, :, 0] + sizes[2][:, 0, :, 0]
                attention = sizes[0] / total[:, None, :, None]
                shares = [each[:, 0, :, 0] / total for each in sizes[1:]]
                importances.append(Layer(attention, *shares, torch.zeros_like(total)))
                continue
            sizes = self.sizes([vectors, residual[:, None, :, None]], False)
            total = sizes[0].sum((1, 3)) + sizes[1][:, 0, :, 0]
            shares = [sizes[0] / total[:, None, :, None], sizes[1][:, 0, :, 0] / total]
            x = residual + added
            kept = mask.mlp[..., None] * self.mlp(layer, x) * times
            residual = mask.mlp_residual[..., None] * x
            sizes = self.sizes([kept, residual], last)
            shares += [each / (sizes[0] + sizes[1]) for each in sizes]
            x = residual + kept
            importances.append(Layer(*shares))
        return self.read_out(x), importances

    def sizes(self, parts: list[Tensor], last: bool) -> list[Tensor]:
        """L1 norms; into the last node as the final norm reads them (its scale cancels)."""
        norm = at(self.model, self.layout.final_norm)
        return [(linear_part(norm, part) if last else part).abs().sum(-1) for part in parts]

    def mlp(self, layer: Module, node: Tensor) -> Tensor:
        """``[B, T, d_model]``: what the MLP sub-block gives, before a multiplier."""
        layout = self.layout
        normed = at(layer, layout.before_mlp)(node)
        return at(layer, layout.after_mlp)(layout.mlp(layer, normed))  # type: ignore[no-any-return]

    def read_out(self, node: Tensor) -> Tensor:
        """Logits of last nodes."""
        normed, config = at(self.model, self.layout.final_norm)(node), self.model.config
        if self.layout.shrunk:
            normed = normed / (config.hidden_size / config.dim_model_base)
        return self.layout.logits(self.model, at(self.model, self.layout.head)(normed))


def reference(case: str, model: Module, inputs: dict[str, Tensor]) -> Reference:
    """Run the model's own eager code on a batch and keep what the reference needs of it."""
    layout = LAYOUTS.get(case, LLAMA)
    kept = model.config._attn_implementation
    mixed: list[Tensor] = []
    handles = [
        at(at(layer, layout.attention), layout.projection).register_forward_pre_hook(
            lambda module, args: mixed.append(args[0])
        )
        for layer in at(model, layout.layers)
    ]
    fused = case.startswith("falcon")  # its eager code adds alibi twice
    try:
        with recorded_sdpa() as found:
            if not fused:
                model.set_attn_implementation("eager")
            own = model(
                **inputs, use_cache=False, output_attentions=not fused, output_hidden_states=True
            )
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(kept)
    visible = inputs["attention_mask"].bool()[:, None, None, :]
    probabilities = [each.masked_fill(~visible, 0.0) for each in (found or own.attentions)]
    result = Reference(model, layout, tuple(probabilities), own.hidden_states[0], own.logits)
    if not layout.sink_after:
        return result
    for index, layer in enumerate(result.layers):
        a = probabilities[index]
        heads = a.shape[1]
        without = (a @ result.values(layer, own.hidden_states[index], heads)).transpose(1, 2)
        with_sink = mixed[index].reshape(without.shape)
        share = (with_sink * without).sum(-1) / (without * without).sum(-1)
        probabilities[index] = a * share.transpose(1, 2)[..., None]
    return replace(result, probabilities=tuple(probabilities))


@contextmanager
def recorded_sdpa() -> Iterator[list[Tensor]]:
    """PyTorch's fused attention, written out; what its softmax gives is noted."""
    noted: list[Tensor] = []
    fused = functional.scaled_dot_product_attention

    def literal(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any
    ) -> Tensor:
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -1e30)
        else:
            scores = scores + attn_mask
        noted.append(scores.softmax(-1))
        return noted[-1] @ value

    functional.scaled_dot_product_attention = literal  # type: ignore[assignment]
    try:
        yield noted
    finally:
        functional.scaled_dot_product_attention = fused
