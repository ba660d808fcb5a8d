"""Sequential pre-norm: ``a = x + attention(norm(x)); y = a + mlp(norm(a))``.

Llama, Mistral, Qwen 2 and 3, SmolLM 3 and their kin share one set of names; GPT-2 has its own.
"""

from softtrace.families.pattern import Pattern

SEQUENTIAL_PRE_NORM = Pattern(
    name="sequential pre-norm",
    layers=("layers", "h"),
    attention=("self_attn", "attn"),
    output_projection=("o_proj", "c_proj"),
    mlp_norm=("post_attention_layernorm", "ln_2"),
    mlp=("mlp",),
    final_norm=("norm", "ln_f"),
    score_projections=("q_proj", "k_proj"),
)
