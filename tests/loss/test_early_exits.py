"""Exits read in the training forward: literal values, an unchanged forward, nothing left behind."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import softtrace
from softtrace import DensityLoss
from softtrace.errors import NonFiniteError
from softtrace.loss.draws import ExitDraw, draw_exits
from softtrace.loss.early_exits import Watched, easiest, watching
from tests.support.tiny import checkpointed, tiny_model, tiny_prompt, training_without_dropout

OPTIONS: dict[str, Any] = {
    "strength": 0.7, "exits": 0.4, "exit_tokens": 0.5, "seed": 2,
    "exit_quantile": 1.0, "exit_depths": (0.25, 1.0), "exit_map": False,
}  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    """Three rows: whole, left-padded, right-padded."""
    ids, mask = tiny_prompt(7, seed=5, batch=3), torch.ones(3, 7, dtype=torch.long)
    mask[1, :2], mask[2, 4:] = 0, 0
    return ids, mask


def final_norm(model: Any) -> nn.Module:
    return model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm


def literal(model: Any, ids: Tensor, mask: Tensor, counted: Tensor, step: int, share: float):
    """Mean KL over the chosen tokens, from the hidden states that transformers returns."""
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    layers = len(output.hidden_states) - 1
    drawn = draw_exits(
        seed=2, step=(step, 0), rank=0, counted=counted, share=share, bounds=(1, layers - 1)
    )
    total, number = 0.0, 0
    for place, depth, used in zip(
        drawn.places.tolist(), drawn.depths.tolist(), drawn.used.tolist(), strict=True
    ):
        if used:
            row, position = divmod(place, ids.shape[1])
            p = output.logits[row, position].detach().double().softmax(-1)
            read = model.lm_head(final_norm(model)(output.hidden_states[depth][row, position]))
            total = total + (p * (p.log() - read.double().log_softmax(-1))).sum()
            number += 1
    return total / number


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_exits_equal_a_literal_recomputation(family: str) -> None:
    model = tiny_model(family, seed=4, dtype=torch.float64, num_hidden_layers=4)  # no dropout
    ids, mask = batch()
    density = DensityLoss(model, **OPTIONS)
    without = DensityLoss(model, **{**OPTIONS, "exits": 0.0})
    for step in (0, 3):
        with density.watching():
            model(input_ids=ids, attention_mask=mask)
        term = density(ids, mask, step=step)
        wanted = literal(model, ids, mask, mask.bool(), step, 0.5)
        torch.testing.assert_close(term.exit_distance, wanted.detach().to(term.loss.dtype))
        own = without(ids, mask, step=step)
        torch.testing.assert_close(term.loss - own.loss, 0.7 * 0.4 * wanted.detach())
        assert own.exit_distance is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_forward_without_logits_gives_the_same(family: str) -> None:
    model = training_without_dropout(
        tiny_model(family, seed=4, dtype=torch.float64, num_hidden_layers=4)
    )
    ids, mask = batch()
    density, found = DensityLoss(model, **OPTIONS), []
    fused = model.register_forward_hook(lambda m, args, output: {"loss": output.logits.mean()})
    for _ in range(2):
        with density.watching():
            model(input_ids=ids, attention_mask=mask)
        fused.remove()
        term = density(ids, mask, step=1)
        places = list(model.parameters())
        gradients = torch.autograd.grad(term.loss, places, materialize_grads=True)
        found.append([term.exit_distance, *gradients])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_forward_that_passes_the_model_by_gives_the_same(family: str) -> None:
    """``model.forward``, as PEFT's AdaLoRA calls it, and the decoder with a head of one's own."""
    model = training_without_dropout(
        tiny_model(family, seed=4, dtype=torch.float64, num_hidden_layers=4)
    )
    ids, mask = batch()
    density, found = DensityLoss(model, **OPTIONS), []
    decoder: Any = model.base_model
    for call in (model, model.forward, decoder):
        with density.watching() as watched:
            call(input_ids=ids, attention_mask=mask)
        assert len(watched.forwards) == 1
        term = density(ids, mask, step=1, watched=watched)
        gradients = torch.autograd.grad(term.loss, list(model.parameters()), materialize_grads=True)
        found.append([term.exit_distance, *gradients])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("keep", [1, 4])
def test_logits_of_some_tokens_alone_are_not_read(keep: int) -> None:
    """``logits_to_keep``: places are those of the whole row, which such logits do not have."""
    model = tiny_model("llama", seed=4, dtype=torch.float64, num_hidden_layers=4).train()
    ids, mask = batch()
    density, found = DensityLoss(model, **OPTIONS), []
    for kept in (0, keep):
        with density.watching() as watched:
            model(input_ids=ids, attention_mask=mask, logits_to_keep=kept)
        assert (watched.forwards[-1].logits is None) == bool(kept)
        term = density(ids, mask, step=1, watched=watched)
        gradients = torch.autograd.grad(term.loss, list(model.parameters()), materialize_grads=True)
        found.append([term.exit_distance, *gradients])
    torch.testing.assert_close(found[0], found[1])


def test_gradients_equal_those_of_the_literal_term() -> None:
    model = tiny_model("llama", seed=4, dtype=torch.float64, num_hidden_layers=4).train()
    ids, mask = batch()
    density, without = (
        DensityLoss(model, **OPTIONS),
        DensityLoss(model, strength=0.7, seed=2, exits=0.0),
    )
    with density.watching():
        model(input_ids=ids, attention_mask=mask)
    places = list(model.parameters())
    found, own, wanted = (
        torch.autograd.grad(value, places, materialize_grads=True)
        for value in (
            density(ids, mask, step=1).loss,
            without(ids, mask, step=1).loss,
            literal(model, ids, mask, mask.bool(), 1, 0.5),
        )
    )
    for ours, base, added in zip(found, own, wanted, strict=True):
        torch.testing.assert_close(ours, base + 0.7 * 0.4 * added, atol=1e-7, rtol=1e-5)


def test_tokens_without_a_target_are_not_read() -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[2, 1] = 7, 8  # positions 2 of row 0 and 0 of row 2 predict them
    density = DensityLoss(model, **{**OPTIONS, "exit_tokens": 1.0})
    with density.watching():
        model(input_ids=ids, attention_mask=mask)
    counted = torch.zeros_like(mask, dtype=torch.bool)
    counted[0, 2] = counted[2, 0] = True
    found = density(ids, mask, labels, step=0).exit_distance
    wanted = literal(model, ids, mask, counted, 0, 1.0)
    torch.testing.assert_close(found, wanted.detach().float())


def test_a_watched_forward_is_bitwise_itself_and_keeps_no_hook() -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    own = model(input_ids=ids, attention_mask=mask).logits
    density = DensityLoss(model, **OPTIONS)
    with density.watching():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, own)
    with pytest.raises(KeyboardInterrupt), density.watching():
        raise KeyboardInterrupt
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_that_was_seen_outlives_the_call() -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    density = DensityLoss(model, **OPTIONS, start_step=1)
    for step in (0, 1):  # also where the term is off
        with density.watching():
            output = model(input_ids=ids, attention_mask=mask)
        kept = weakref.ref(output.logits)
        term = density(ids, mask, step=step)
        assert (term.exit_distance is None) == (step == 0)
        del output, term
        gc.collect()
        assert kept() is None


def test_the_last_forward_of_the_batch_counts() -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    density = DensityLoss(model, **OPTIONS)

    def distance(*forwards: tuple[Tensor, Tensor]) -> float:
        with density.watching():
            for tokens, real in forwards:
                model(input_ids=tokens, attention_mask=real)
            with torch.no_grad():
                model(input_ids=ids[:1])
        found = density(ids, mask, step=0).exit_distance
        assert found is not None
        return found.item()

    alone = distance((ids, mask))
    assert distance((ids.flip(0), mask.flip(0)), (ids, mask)) == alone
    assert distance((ids, mask), (ids[:, :5], mask[:, :5])) == alone


def test_one_block_may_span_several_batches() -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    density = DensityLoss(model, **OPTIONS)
    apart, together, kept = [], [], []
    for step in range(3):
        with density.watching():
            model(input_ids=ids, attention_mask=mask)
        apart.append(density(ids, mask, step=step))
    with density.watching():
        for step in range(3):
            output = model(input_ids=ids, attention_mask=mask)
            kept.append(weakref.ref(output.logits))
            together.append(density(ids, mask, step=step))
            del output
        values = [(term.loss.detach(), term.exit_distance) for term in together]
        together.clear()
        gc.collect()
        assert not any(each() is not None for each in kept)
    wanted = [(term.loss.detach(), term.exit_distance) for term in apart]
    torch.testing.assert_close(values, wanted)


def test_a_call_reads_the_exits_of_the_handle_it_is_given() -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    density, wanted = DensityLoss(model, **OPTIONS), []
    for rows, real in ((ids, mask), (ids.flip(0), mask)):
        with density.watching() as alone:
            model(input_ids=rows, attention_mask=real)
        wanted.append(density(ids, mask, step=0).exit_distance)  # that of the newest block
        assert not alone.forwards
    assert wanted[0] != wanted[1]
    with density.watching() as first:
        output = model(input_ids=ids, attention_mask=mask)
    kept = weakref.ref(output.logits)
    del output
    with density.watching() as second:
        model(input_ids=ids.flip(0), attention_mask=mask)
    assert density(ids, mask, step=0, watched=first).exit_distance == wanted[0]
    assert kept() is None  # a call lets go of what its handle holds, and of nothing else
    assert len(second.forwards) == 1
    assert density(ids, mask, step=0, watched=second).exit_distance == wanted[1]


def test_steps_without_exits_are_not_watched() -> None:
    model = tiny_model("llama", num_hidden_layers=3).train()
    density = DensityLoss(model, **OPTIONS, start_step=2)
    for step in range(4):
        with density.watching(step=step):
            assert bool(model._forward_hooks) == (step >= 2)


def test_exits_are_read_also_between_masked_runs() -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    options = {**OPTIONS, "warmup_steps": 7}
    often, seldom = DensityLoss(model, **options), DensityLoss(model, **options, every=4)
    runs = []
    seldom_density = seldom._density
    seldom._density = lambda *a: runs.append(a[2][0]) or seldom_density(*a)  # type: ignore[method-assign,func-returns-value]
    for step in range(9):
        terms = []
        for density in (often, seldom):
            with density.watching(step=step):
                model(input_ids=ids, attention_mask=mask)
            terms.append(density(ids, mask, step=step))
        each, few = terms
        assert torch.equal(each.exit_distance, few.exit_distance)
        weight = 0.7 * 0.4 * min(1, (step + 1) / 8)
        masked = each.loss - weight * each.exit_distance
        wanted = weight * few.exit_distance + (4 * masked if step % 4 == 0 else 0)
        torch.testing.assert_close(few.loss, wanted)
        assert few.loss.requires_grad
        assert few.strength == (4 * each.strength if step % 4 == 0 else 0)
        assert few.distortion.isnan() == (step % 4 != 0)
        assert few.skipped is None
    assert runs == [0, 4, 8]


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_exits_that_are_not_finite_follow_the_option(mode: Any) -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    density = DensityLoss(model, **{**OPTIONS, "exit_tokens": 1.0}, on_nonfinite=mode)
    with density.watching() as watched:
        model(input_ids=ids, attention_mask=mask)
    streams = watched.forwards[-1].streams
    streams[1] = streams[1] * torch.inf
    if mode == "raise":
        with pytest.raises(NonFiniteError, match=r"step 0: .*distances of early exits"):
            density(ids, mask, watched=watched)
    else:
        term = density(ids, mask, watched=watched)
        assert term.loss.item() == 0
        assert term.skipped is not None


def test_tokens_that_do_not_count_cannot_spoil_a_gradient() -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    density = DensityLoss(model, **{**OPTIONS, "exit_tokens": 1.0}, every=8)
    with density.watching(step=1) as watched:
        model(input_ids=ids, attention_mask=mask)
    spoilt = torch.where(mask[..., None] == 0, torch.nan, 0.0)
    seen = watched.forwards[-1]
    seen.streams = {at: stream + spoilt for at, stream in seen.streams.items()}
    density(ids, mask, step=1, watched=watched).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("watched", [False, True])
def test_checkpointing_changes_nothing(watched: bool) -> None:
    ids, mask = batch()
    found = []
    for checkpointing in (False, True):
        model = tiny_model("llama", seed=4, dtype=torch.float64, num_hidden_layers=4).train()
        if checkpointing:
            checkpointed(model)
        density = DensityLoss(model, **{**OPTIONS, "exits": 0.4 if watched else 0.0})
        with density.watching():
            task = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        (task + density(ids, mask, step=0).loss).backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=1e-10)


def test_a_model_of_one_layer_has_no_exit() -> None:
    model, ids = tiny_model("llama", num_hidden_layers=1).train(), tiny_prompt(6, batch=2)
    density = DensityLoss(model, **OPTIONS)
    with density.watching():
        model(input_ids=ids)
    assert density(ids).exit_distance is None


class Ops(TorchDispatchMode):
    """Names of all operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_exits_come_at_their_own_steps_between_masked_runs_and_weigh_as_much() -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=3).train(), batch()
    density = DensityLoss(model, **OPTIONS, every=2, exit_every=2)
    seldom = DensityLoss(model, **OPTIONS, every=2, exit_every=4, start_step=1)
    always = DensityLoss(model, **{**OPTIONS, "seed": density.options.seed}, every=100)
    for step in range(4):
        with density.watching(step=step) as watched:
            model(input_ids=ids, attention_mask=mask)
        assert bool(watched.forwards) == (step % 2 == 1)
        term = density(ids, mask, step=step, watched=watched)
        assert (term.strength > 0) == (step % 2 == 0)
        assert (term.exit_distance is not None) == (step % 2 == 1)
        if step % 2:
            with always.watching(step=step):
                model(input_ids=ids, attention_mask=mask)
            torch.testing.assert_close(term.loss, 2 * always(ids, mask, step=step).loss)
    for step in range(9):
        with seldom.watching(step=step) as watched:
            model(input_ids=ids, attention_mask=mask)
        assert bool(watched.forwards) == (step in (4, 8))


@pytest.mark.parametrize("share", [0.1, 0.35, 1.0])
@pytest.mark.parametrize("score", ["entropy", "loss"])
def test_the_easiest_of_every_depth_are_kept(share: float, score: str) -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=4), batch()
    counted = mask.bool()
    counted[:, -1] = False
    targets = torch.where(counted, ids.roll(-1, 1), -100)
    anatomy, watched = softtrace.attach(model).anatomy, Watched()
    with watching(model, anatomy, watched, (1, 2, 3)):
        logits = model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1)
    drawn = draw_exits(seed=1, step=(0, 0), rank=0, counted=counted, share=0.8, bounds=(1, 3))
    kept = easiest(watched.forwards[0], anatomy.readout, drawn, targets, score, share)
    logs = logits.double().log_softmax(-1)
    scores = -(logs.exp() * logs).sum(-1)
    if score == "loss":
        scores = -logs[torch.arange(ids.numel()), targets.flatten().clamp_min(0)]
    for depth in (1, 2, 3):
        there = drawn.places[drawn.used & (drawn.depths == depth)].tolist()
        wanted = sorted(there, key=lambda place: scores[place].item())
        found = kept.places[kept.used & (kept.depths == depth)].tolist()
        assert found == wanted[: math.ceil(share * len(there))]
    assert kept.used.sum() > 0
    assert torch.equal(kept.depths, kept.depths.sort().values)


def test_a_share_is_of_the_tokens_whose_score_is_finite() -> None:
    model, (ids, mask) = tiny_model("llama", num_hidden_layers=4), batch()
    anatomy, watched = softtrace.attach(model).anatomy, Watched()
    with watching(model, anatomy, watched, (2,)):
        model(input_ids=ids, attention_mask=mask)
    drawn = ExitDraw(torch.arange(8), torch.full((8,), 2), torch.ones(8, dtype=torch.bool))
    targets = torch.arange(21).reshape(3, 7)

    def score(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.where(targets < 4, targets.float(), torch.inf)

    kept = easiest(watched.forwards[0], anatomy.readout, drawn, targets, score, 0.75)
    assert kept.places[kept.used].tolist() == [0, 1, 2]  # of four, not of eight
