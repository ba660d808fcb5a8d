"""Runs of ours equal the model's own, masked or not, and leave nothing behind."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import PreTrainedModel

import softtrace
from softtrace.errors import InvalidInputError, UnsupportedModelError
from softtrace.graph.edges import EDGE_KINDS, Edge, LayerEdges
from softtrace.tracing.attach import attach
from tests.support import oracle
from tests.support.state import HOOKS, state
from tests.support.tiny import FAMILIES, checkpointed, tiny_model, tiny_prompt


def padded(side: str) -> tuple[Tensor, Tensor]:
    ids = tiny_prompt(8, seed=1, batch=3)
    mask = torch.ones_like(ids)
    if side != "none":
        mask[1, slice(0, 3) if side == "left" else slice(5, None)] = 0
        mask[2, slice(0, 7) if side == "left" else slice(1, None)] = 0
    return ids, mask


def all_masks(model: nn.Module, batch: int, length: int, fill: float) -> list[LayerEdges]:
    """Float64 masks, all alike."""
    config: Any = model.config
    shapes = [(batch, config.num_attention_heads, length, length), *[(batch, length)] * 3]
    dtype = torch.float64
    return [
        LayerEdges(*(torch.full(shape, fill, dtype=dtype) for shape in shapes))
        for _ in range(config.num_hidden_layers)
    ]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unmasked_run_equals_the_models_own(family: str, attention: str, side: str) -> None:
    model = tiny_model(family, seed=1)
    model.set_attn_implementation(attention)
    ids, mask = padded(side)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        recording = attach(model).record(attach(model).batch(ids, mask))
        again = attach(model).masked_logits(
            attach(model).batch(ids, mask), all_masks(model, 3, 8, 1.0)
        )
        after = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    valid = mask.bool()
    torch.testing.assert_close(recording.logits[valid], own[valid], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(again[valid], own[valid], atol=2e-5, rtol=1e-5)
    assert torch.equal(after, own)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recording_holds_what_the_full_run_computed(family: str) -> None:
    model, ids = tiny_model(family, dtype=torch.float64), tiny_prompt(6)
    run = oracle.run_full(model, ids)
    with torch.no_grad():
        recording = attach(model).record(attach(model).batch(ids), keep_hidden=True)
        assert attach(model).record(attach(model).batch(ids)).hidden is None
    torch.testing.assert_close(recording.logits[0], run.logits, atol=1e-5, rtol=1e-5)
    assert recording.hidden is not None
    assert len(recording.hidden) == len(recording.attention) + 1 == 4
    for layer, found in enumerate(recording.attention):
        torch.testing.assert_close(found[0], run.attention[layer], atol=1e-6, rtol=1e-5)
    for layer, found in enumerate(recording.hidden):
        nodes = [
            run.nodes["mlp", layer - 1, t] if layer else run.nodes["embed", t] for t in range(6)
        ]
        torch.testing.assert_close(found[0], torch.stack(nodes), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("dropped", ["residuals", "all", "all but residuals", "half"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masking_through_hooks_equals_a_literal_forward(
    family: str, dropped: str, recorded: bool
) -> None:
    """Identity 5, residual edges among them."""
    model, ids = tiny_model(family, seed=4, dtype=torch.float64), tiny_prompt(5, seed=4)
    run = oracle.run_full(model, ids)
    masks = all_masks(model, 1, 5, 0.0)
    generator = torch.Generator().manual_seed(1)
    kept = set()
    for edge in run.vectors:
        residual = edge.kind.endswith("residual")
        coin = torch.rand((), generator=generator).item() < 0.5
        keep = {"residuals": not residual, "all": False, "half": coin}.get(dropped, residual)
        if keep:
            kept.add(edge)
            mask = getattr(masks[edge.layer], edge.kind)[0]
            where = (edge.head, edge.target, edge.source)
            mask[where if edge.kind == "attention" else edge.target] = 1
    with torch.no_grad():
        attention = attach(model).record(attach(model).batch(ids)).attention if recorded else None
        logits = attach(model).masked_logits(attach(model).batch(ids), masks, attention)
    for position in (1, 4):
        expected = oracle.masked_distribution(
            model, ids, kept, position, run.attention if recorded else None
        )
        found = logits[0, position].softmax(-1)
        assert oracle.total_variation(found, expected) < 2e-6
        full = run.logits[position].softmax(-1)
        assert oracle.total_variation(found, full) > 1e-3


@pytest.mark.parametrize(
    ("family", "overrides"), [("gpt2", {}), ("llama", {"attention_bias": True, "mlp_bias": True})]
)
def test_fractions_weigh_the_vectors_of_the_edges(family: str, overrides: Any) -> None:
    """Masks in (0, 1) at the last node, by hand from the vectors of its edges."""
    model, ids = tiny_model(family, dtype=torch.float64, **overrides), tiny_prompt(5)
    run, block = oracle.run_full(model, ids), oracle.blocks(model)[-1]
    masks = all_masks(model, 1, 5, 1.0)
    weights = {kind: 0.15 + 0.2 * index for index, kind in enumerate(EDGE_KINDS)}
    for kind in EDGE_KINDS:
        getattr(masks[-1], kind).fill_(weights[kind])
    masks[-1].attention[0, 2, 4, 1] = 0.05
    node = torch.zeros_like(run.nodes["embed", 0])
    for edge, vector in run.vectors.items():
        if edge.layer == 2 and edge.target == 4 and edge.kind.startswith("attention"):
            special = edge == Edge("attention", 2, 4, 2, 1)
            node = node + (0.05 if special else weights[edge.kind]) * vector
    with torch.no_grad():
        node = node + block.output_projection.bias
        added = block.mlp(block.mlp_norm(node)[None, None])[0, 0]
        node = weights["mlp_residual"] * node + weights["mlp"] * added
        expected = model.lm_head(oracle.final_norm(model)(node))  # type: ignore[operator]
        found = attach(model).masked_logits(attach(model).batch(ids), masks)[0, 4]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_attaching_twice_gives_the_same_instrument() -> None:
    model = tiny_model("llama")
    handle = softtrace.attach(model)
    assert softtrace.attach(model) is handle
    assert handle.model is model
    handle.detach()
    handle.detach()
    assert softtrace.attach(model) is not handle
    assert softtrace.attach(tiny_model("llama")) is not softtrace.attach(model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_proven_anew(tied: bool) -> None:
    """Tied embeddings change in place: the modules are the same, and the vocabulary is not."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    before = softtrace.attach(model)
    model.resize_token_embeddings(75, mean_resizing=False)
    after = softtrace.attach(model)
    assert after is not before
    assert (before.anatomy.vocabulary, after.anatomy.vocabulary) == (67, 75)
    ids = tiny_prompt(6)
    ids[0, 3] = 74
    assert softtrace.edge_importance(model, ids).shape[-1] == 6


class Doubled(nn.Module):
    """A layer whose output is no sum of its edges."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "layer" else getattr(self.layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs) * 2


def test_an_instrument_is_finished_and_frozen() -> None:
    instrument = softtrace.attach(tiny_model("llama"))
    assert instrument.verification.errors
    for name in ("anatomy", "verification", "configs", "parts"):
        with pytest.raises(FrozenInstanceError):
            setattr(instrument, name, getattr(instrument, name))
    with pytest.raises(TypeError):
        instrument.verification.errors["more"] = 0.0  # type: ignore[index]


def test_a_replaced_module_is_proven_anew() -> None:
    model, ids = tiny_model("llama"), tiny_prompt(4)
    handle = softtrace.attach(model)
    layers = model.model.layers  # type: ignore[union-attr]
    layers[0].mlp = copy.deepcopy(layers[0].mlp)
    with torch.no_grad():
        layers[0].mlp.down_proj.weight.mul_(3)
        found, expected = (
            softtrace.edge_importance(m, ids).layers[0].mlp for m in (model, copy.deepcopy(model))
        )
    assert softtrace.attach(model) is not handle
    assert softtrace.attach(model) is softtrace.attach(model)
    torch.testing.assert_close(found, expected)
    layers[1] = Doubled(layers[1])
    with pytest.raises(UnsupportedModelError, match="layer 1"):
        softtrace.edge_importance(model, ids)


def test_weights_that_pruning_makes_are_those_of_now() -> None:
    """They are made anew before each forward of their module, and are read before it."""
    pruned, ids = tiny_model("llama"), tiny_prompt(6)
    plain = copy.deepcopy(pruned)
    for model in (pruned, plain):
        for layer in model.model.layers:
            prune.l1_unstructured(layer.self_attn.o_proj, "weight", 0.5)
    for layer in plain.model.layers:
        prune.remove(layer.self_attn.o_proj, "weight")
    softtrace.attach(pruned)
    with torch.no_grad():
        for layer, other in zip(pruned.model.layers, plain.model.layers, strict=True):
            layer.self_attn.o_proj.weight_orig *= 3
            other.self_attn.o_proj.weight *= 3
        found, wanted = (softtrace.edge_importance(each, ids) for each in (pruned, plain))
    for ours, theirs in zip(found.layers, wanted.layers, strict=True):
        torch.testing.assert_close(ours.attention, theirs.attention)


def test_compiled_models_share_the_instrument_of_what_they_wrap() -> None:
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="eager")
    assert softtrace.attach(compiled) is softtrace.attach(model)


def test_a_copy_of_an_attached_model_is_a_model_of_its_own() -> None:
    model, ids = tiny_model("gpt2"), tiny_prompt(4)
    handle = softtrace.attach(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(-1)
        assert softtrace.attach(twin) is not handle
        found, expected = attach(twin).record(attach(twin).batch(ids)).logits, twin(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_instruments_do_not_keep_a_model_alive() -> None:
    model = tiny_model("llama")
    handle, watched = softtrace.attach(model), weakref.ref(model)
    with torch.no_grad():
        softtrace.edge_importance(model, tiny_prompt(4))
    del model
    gc.collect()
    assert watched() is None
    with pytest.raises(UnsupportedModelError, match="no longer exists"):
        _ = handle.model
    handle.detach()


def mixed_flags(family: str) -> PreTrainedModel:
    """In train mode with dropout on, some modules in eval mode, some weights frozen."""
    rates = {"attention_dropout": 0.5}
    if family == "gpt2":
        rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.5)
    model = tiny_model(family, seed=2, **rates)
    model.train()
    oracle.blocks(model)[1].mlp.eval()
    oracle.blocks(model)[0].attention.training = False
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_leave_everything_as_it_was(family: str) -> None:
    model, (ids, mask) = mixed_flags(family), padded("left")
    ours: list[Tensor] = []
    handle = oracle.blocks(model)[1].mlp.register_forward_hook(lambda m, i, o: ours.append(o))
    before = state(model)
    assert len(HOOKS) >= 8
    instrument = softtrace.attach(model)
    assert state(model) == before
    importance = softtrace.edge_importance(model, ids, mask)
    assert importance.layers[0].mlp.requires_grad
    assert state(model) == before
    softtrace.density_curve(model, ids, mask, thresholds=[0.1])
    softtrace.DensityLoss(model)(ids, mask)
    assert state(model) == before
    instrument.detach()
    assert state(model) == before
    assert ours  # the user's own hook saw our runs too, and is still there
    handle.remove()


class Planned(Exception):
    pass


def fail(*args: Any, **kwargs: Any) -> None:
    raise Planned


@pytest.mark.parametrize("where", ["hook", "forward", "mask", "head"])
@pytest.mark.parametrize("during", ["attach", "record", "masked", "curve", "loss"])
def test_an_exception_in_a_run_leaves_everything_as_it_was(
    where: str, during: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, mask) = mixed_flags("llama"), padded("right")
    calls = {
        "attach": lambda: softtrace.attach(model),
        "record": lambda: softtrace.edge_importance(model, ids, mask),
        "masked": lambda: attach(model).masked_logits(
            attach(model).batch(ids, mask), all_masks(model, 3, 8, 1.0)
        ),
        "curve": lambda: softtrace.density_curve(model, ids, mask),
        "loss": lambda: softtrace.DensityLoss(model)(ids, mask),
    }
    if during != "attach":
        softtrace.attach(model)
    layer: Any = oracle.blocks(model)[1]
    if where == "hook":
        layer.attention.register_forward_hook(fail)
    elif where == "forward":
        monkeypatch.setattr(layer.mlp, "forward", fail)
    elif where == "mask":
        monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", fail)
    else:
        model.lm_head.register_forward_pre_hook(fail)
    before = state(model)
    with pytest.raises(Planned):
        calls[during]()
    assert state(model) == before


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        MemoryError(),
        torch.OutOfMemoryError(),
        InvalidInputError("theirs"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_failures_of_the_machine_are_no_refusals(error: BaseException) -> None:
    model = tiny_model("llama")

    def fail_so(*_: Any) -> None:
        raise error

    handle = model.model.layers[1].register_forward_hook(fail_so)  # type: ignore[union-attr, index]
    with pytest.raises(type(error)) as caught:
        softtrace.attach(model)
    assert caught.value is error
    handle.remove()
    softtrace.attach(model)


def test_bad_ids_are_refused_before_anything_runs() -> None:
    model = mixed_flags("gpt2")
    instrument, before = softtrace.attach(model), state(model)
    with pytest.raises(InvalidInputError, match="found ids from 3 to 67"):
        instrument.record(instrument.batch(torch.tensor([[3, 67]])))
    with pytest.raises(InvalidInputError, match="values other than 0 and 1"):
        instrument.masked_logits(
            instrument.batch(torch.tensor([[3, 5]]), torch.tensor([[1, 2]])),
            all_masks(model, 1, 2, 1.0),
        )
    assert state(model) == before


def test_learned_positions_bound_the_real_tokens() -> None:
    model, ids = tiny_model("gpt2"), tiny_prompt(65)
    with pytest.raises(InvalidInputError, match=r"found sequences of 65 tokens, .* at most 64"):
        softtrace.edge_importance(model, ids)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0  # padding takes no position
    assert softtrace.edge_importance(model, ids, mask).shape[-1] == 65
    assert softtrace.edge_importance(tiny_model("llama"), ids).shape[-1] == 65  # rotary: no table


@pytest.mark.parametrize("family", FAMILIES)
def test_train_mode_and_checkpointing_change_no_importance(family: str) -> None:
    model, ids = mixed_flags(family), tiny_prompt(6)
    checkpointed(model)
    twin = tiny_model(family, seed=2)
    noisy = softtrace.edge_importance(model, ids)
    with torch.no_grad():
        quiet = softtrace.edge_importance(twin, ids)
        assert not torch.equal(model.train()(ids).logits, twin(ids).logits)  # dropout is on
    for one, other in zip(noisy.layers, quiet.layers, strict=True):
        for left, right in zip(one, other, strict=True):
            assert torch.equal(left.detach(), right)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_importances_are_near_those_of_float32(family: str) -> None:
    """Of the same rounded weights: within 0.02 of a node's share, a thousandth in the mean."""
    ids = tiny_prompt(8, seed=3)
    exact = tiny_model(family, seed=3).bfloat16().float()
    rounded = copy.deepcopy(exact).bfloat16()
    with torch.no_grad():
        first = softtrace.edge_importance(exact, ids)
        second = softtrace.edge_importance(rounded, ids)
    errors = []
    for one, other in zip(first.layers, second.layers, strict=True):
        for left, right in zip(one, other, strict=True):
            assert right.dtype == torch.float32
            errors.append((left - right).abs().flatten())
    error = torch.cat(errors)
    assert 0 < error.max() < 0.02
    assert error.mean() < 1e-3


def test_two_models_of_one_config_object_do_not_disturb_each_other() -> None:
    first, second = tiny_model("llama"), tiny_model("llama", seed=1)
    shared = type(first)(first.config).eval()
    shared.load_state_dict(second.state_dict())
    ids = tiny_prompt(5)
    with torch.no_grad():
        expected = second(ids).logits
        attach(first).record(attach(first).batch(ids))
        torch.testing.assert_close(
            attach(shared).record(attach(shared).batch(ids)).logits, expected
        )
        assert torch.equal(shared(ids).logits, expected)
