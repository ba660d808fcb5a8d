"""Leaving out what nobody reads changes no result, no gradient and no hook of the user's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import softtrace
from softtrace.density.distortion import entropy
from softtrace.graph.edges import LayerEdges
from softtrace.graph.masks import hard_masks
from softtrace.model.hooks import register
from softtrace.tracing import skipping as rows_module
from softtrace.tracing.skipping import KeptRows, Unread, kept_rows
from tests.support.tiny import FAMILIES, tiny_model, tiny_prompt
from tests.support.zoo import tiny


def run(module: nn.Module, narrowed: Any, x: Tensor) -> Tensor:
    handles: list[Any] = []
    register(narrowed.hooks(), handles)
    try:
        return module(x)  # type: ignore[no-any-return]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    "mask",
    [
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]],
        [[0.0, 0.5, 0.0], [1.0, 0.0, 0.0]],
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
    ],
)
def test_kept_rows_times_their_mask_are_those_of_the_whole(mask: list[list[float]]) -> None:
    torch.manual_seed(0)
    module, kept = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)), torch.tensor(mask)
    x = torch.randn(2, 3, 4, requires_grad=True)
    found = kept[..., None] * run(module, KeptRows(module, kept_rows([kept])[0]), x)
    expected = kept[..., None] * module(x)
    torch.testing.assert_close(found, expected)
    places = [x, *module.parameters()]
    gradients = [torch.autograd.grad(y.square().sum(), places) for y in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_module_runs_on_the_kept_rows_alone() -> None:
    module, sizes = nn.Linear(4, 4), list[tuple[int, ...]]()
    count = nn.Sequential(nn.Identity(), module)
    module.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    for mask in ([[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]):
        (rows,) = kept_rows([torch.tensor(mask).bool()])
        run(count, KeptRows(count, rows), torch.ones(2, 3, 4))
    assert sizes == [(1, 3, 4), (1, 1, 4), (2, 3, 4)]


def test_rows_are_told_apart_by_layer() -> None:
    masks = [torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.zeros(2, 2), torch.ones(2, 2)]
    assert [rows.tolist() for rows in kept_rows(masks)] == [[1, 2], [0], [0, 1, 2, 3]]


def test_what_nobody_reads_runs_on_one_row_and_keeps_its_shape() -> None:
    torch.manual_seed(0)
    module, sizes = nn.Linear(4, 6), list[int]()
    module.register_forward_hook(lambda _, args, output: sizes.append(output.numel()))
    x = torch.randn(2, 3, 4)
    found = run(module, Unread(module), x)
    assert found.shape == (2, 3, 6)
    # Hooks of the user see the full output; the module's own forward made one row of it.
    assert sizes == [36]
    assert torch.equal(found[1, 2], found[0, 0])


def test_projections_that_the_model_clips_in_place_can_be_left_out() -> None:
    model, ids = tiny("olmo", clip_qkv=0.5), tiny_prompt(6, batch=2)
    with torch.no_grad():
        logits = model(ids).logits
    curve = softtrace.density_curve(model, ids, thresholds=(1e-30,))
    torch.testing.assert_close(curve.entropy, entropy(logits))
    assert curve.total_variation.max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_the_user_see_full_shapes(family: str) -> None:
    model, ids = tiny_model(family), tiny_prompt(5, batch=2)
    instrument = softtrace.attach(model)
    layer = instrument.anatomy.layers[1]
    seen: list[tuple[Any, ...]] = []
    for module in (*layer.token_wise, *layer.score_projections):
        module.register_forward_pre_hook(
            lambda _, args, kw: seen.append((args, kw)), with_kwargs=True
        )
        module.register_forward_hook(lambda _, args, output: seen.append(output.shape[:2]))
    with torch.no_grad():
        recording = instrument.record(instrument.batch(ids))
        seen.clear()
        masks = hard_masks(recording.importance, 0.45)
        instrument.masked_logits(recording.batch, masks, recording.attention)
    shapes = [
        next(iter((*entry[0], *entry[1].values()))).shape[:2]
        if isinstance(entry[0], tuple)
        else entry
        for entry in seen
    ]
    assert len(shapes) == 2 * (1 + len(layer.score_projections))
    assert set(shapes) == {(2, 5)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recorded", [True, False])
def test_masked_runs_are_the_same_with_nothing_left_out(
    family: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(family, dtype=torch.float64), tiny_prompt(7, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    instrument = softtrace.attach(model)
    recording = instrument.record(instrument.batch(ids, mask))
    attention = recording.attention if recorded else None

    def logits(kept: tuple[LayerEdges, ...]) -> Tensor:
        return instrument.masked_logits(instrument.batch(ids, mask), kept, attention)[mask.bool()]

    for tau in (0.6, 0.45, 0.2, 1.0):
        kept = hard_masks(recording.importance, tau)
        narrowed = logits(kept)
        with monkeypatch.context() as patched:
            for kind in (rows_module.KeptRows, rows_module.Unread):
                patched.setattr(kind, "narrow", lambda self, hidden: None)
            whole = logits(kept)
        torch.testing.assert_close(narrowed, whole, atol=1e-10, rtol=1e-8)
