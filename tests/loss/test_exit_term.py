"""Exits as one function with its backward pass, as a GPU replays it, against exits as they are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from softtrace import DensityLoss
from softtrace.loss import captured as masked_runs
from softtrace.loss import density_loss, exit_term
from softtrace.loss.draws import ExitDraw, draw_exits
from softtrace.loss.early_exits import rows
from softtrace.loss.exit_term import (
    ExitDistance,
    _Chosen,
    _part_by_part,
    _parts,
    exit_mean,
    exits_and_gradients,
)
from softtrace.model.state import dropout_off
from softtrace.tracing.attach import attach
from tests.support import zoo
from tests.support.live_bytes import peak_bytes
from tests.support.skips import cuda
from tests.support.tiny import tiny_prompt

LAYERS = 4


def term_of(family: str, **changes: Any) -> tuple[Any, DensityLoss]:
    model = zoo.tiny(family, num_hidden_layers=LAYERS).train()
    next(model.parameters()).requires_grad_(False)
    options: dict[str, Any] = {"exits": 1.0, "exit_tokens": 1.0, **changes}
    penalty = DensityLoss(model, **options)
    if penalty.exit_maps is not None:
        with torch.no_grad():
            for each in penalty.exit_maps.maps.parameters():
                each.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return model, penalty


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "changes", "backend", "parts"),
    [
        ("llama", {}, "aot_eager", 2),
        ("gemma2", {"exit_quantile": 1.0}, "eager", 3),
        ("gpt2", {"exit_map": False}, "eager", 1),
    ],
)
def test_one_function_gives_the_gradients_of_exits_as_they_are(
    family: str,
    changes: dict[str, Any],
    backend: str,
    parts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_parts: list[int] = []

    def part_by_part(sum_of: Any, given: Any, *others: Any) -> Any:
        in_parts.append(len(given))
        return _part_by_part(sum_of, given, *others)

    monkeypatch.setattr(exit_term, "_part_by_part", part_by_part)
    model, penalty = term_of(family, **changes)
    instrument = attach(model)
    options = penalty.options.on(torch.device("cpu"))
    found = []
    for seed in (0, 1):
        ids = tiny_prompt(9, batch=3, seed=seed)
        with penalty.watching() as watched, dropout_off(model):
            model(input_ids=ids)
        batch = instrument.batch(ids)
        seen = watched.last_of(ids.shape, [LAYERS // 2])
        assert seen is not None
        drawn = draw_exits(
            seed=0, step=(seed, 0), rank=0, counted=batch.counted,
            share=1.0, bounds=options.exit_bounds(LAYERS),
        )  # fmt: skip
        found.append((seen, drawn, batch.targets))
    chosen = [_Chosen.of(*each, depth=LAYERS // 2) for each in found]
    read = math.ceil(options.exit_quantile * len(chosen[0].early))
    logits = read * instrument.anatomy.readout.predicted
    monkeypatch.setattr(exit_term, "AT_ONCE", math.ceil(logits / parts))
    maps = None if penalty.exit_maps is None else penalty.exit_maps.maps
    own = chosen[0].copy()
    calls = [
        exits_and_gradients(instrument, own, maps, replace(options, fuse=fuse), backend)
        for fuse in (False, True)
    ]
    trained = [each for each in model.parameters() if each.requires_grad]
    for (seen, drawn, targets), new in zip(found, chosen, strict=True):
        for place, value in zip(own.tensors(), new.tensors(), strict=True):
            place.copy_(value.detach())
        early = rows(seen.streams[LAYERS // 2], drawn.places).detach().requires_grad_()
        with dropout_off(model):
            plain: ExitDistance = penalty._exit_term(
                instrument, replace_stream(seen, early, drawn.places), drawn, targets, options, True
            )
            by = [early, *trained]
            copies = [] if penalty.exit_maps is None else [*penalty.exit_maps._copies.values()]
            wanted: list[Tensor | None] = [*torch.autograd.grad(
                plain.mean, [*copies, *by], allow_unused=True
            )]  # fmt: skip
            if penalty.exit_maps is not None:
                penalty.exit_maps._copies.clear()
            into = [each if each is None else torch.full_like(each, 7) for each in calls[0]()]
            for call, places in ((call, each) for call in calls for each in (None, into)):
                given = call(places)
                mean, finite, by_map, *gradients = given
                if places is not None:
                    pairs = [*zip(given, places, strict=True)][2:]
                    assert all(one is other for one, other in pairs)
                torch.testing.assert_close(mean, plain.mean.detach())
                assert finite
                got = [*([] if maps is None else [by_map]), *gradients]
                assert (by_map is None) == (maps is None)
                assert got[len(copies)].abs().sum() > 0
                for one, other in zip(got, wanted, strict=True):
                    assert (one is None) == (other is None)
                    if one is not None:
                        torch.testing.assert_close(one, other)
    assert in_parts == [parts] * len(in_parts)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_exits_in_parts_hold_the_logits_of_one_part(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, vocabulary = 64, 4096
    model = zoo.tiny("llama", num_hidden_layers=LAYERS, vocab_size=vocabulary)
    penalty = DensityLoss(model, exits=1.0, exit_quantile=share, exit_map=False)
    options = replace(penalty.options.on(torch.device("cpu")), fuse=False)
    width = model.config.hidden_size
    chosen = _Chosen(
        torch.randn(count, width), torch.randn(count, width), torch.arange(count),
        torch.ones(count, dtype=torch.bool), LAYERS // 2,
    )  # fmt: skip
    monkeypatch.setattr(exit_term, "CHUNK", 4)
    run = exits_and_gradients(attach(model), chosen, None, options)
    into = [each if each is None else torch.empty_like(each) for each in run()]
    logits = math.ceil(share * count) * vocabulary
    whole = peak_bytes(run, into)
    monkeypatch.setattr(exit_term, "AT_ONCE", logits // 8)
    less = peak_bytes(run, into)
    # Of the full prediction, of the exit, and the gradient: seven of eight parts at least thrice.
    assert whole - less > 3 * 7 / 8 * logits * 4 - 2 * vocabulary * width * 4
    monkeypatch.setattr(exit_term, "AT_ONCE", logits)
    assert peak_bytes(run, into) == whole


def test_parts_are_as_many_as_logits_ask_for_and_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = ExitDraw(torch.arange(7), torch.full((7,), 2), torch.arange(7) < 5)

    def sizes(at_once: int) -> list[int]:
        monkeypatch.setattr(exit_term, "AT_ONCE", at_once)
        found = _parts(drawn, vocabulary=10)
        for name in ("places", "depths", "used"):
            whole = torch.cat([getattr(each, name) for each in found])
            assert torch.equal(whole, getattr(drawn, name))
        return [len(each.places) for each in found]

    assert sizes(70) == [7]
    assert sizes(69) == [4, 3]
    assert sizes(30) == [3, 3, 1]
    assert sizes(1) == [1] * 7


def test_gradients_of_parts_add_up_where_they_are_to_lie_and_are_zero_if_one_is_not_finite() -> (
    None
):
    x, y = torch.arange(6.0).requires_grad_(), torch.ones(2).requires_grad_()
    used = torch.tensor([True, True, True, True, False, True])
    drawn = ExitDraw(torch.arange(6), torch.full((6,), 2), used)
    parts = [
        ExitDraw(*each) for each in zip(*(v.split(2) for v in vars(drawn).values()), strict=True)
    ]
    places = [torch.full((6,), 7.0), torch.full((2,), 7.0), None]
    unused = torch.zeros(1).requires_grad_()

    def sum_of(part: ExitDraw) -> tuple[Tensor, Tensor]:
        found = torch.where(part.used, x.index_select(0, part.places).square(), 0.0)
        if 2 in part.places:  # a leaf that only one part reaches
            found = found * y
        return found.sum(), found.detach().isfinite().all()

    wanted = torch.autograd.grad((x.square() * used).sum() / 5, x)[0]
    for into in ([None, None, None], places):
        mean, finite, (by_x, by_y, by_none) = _part_by_part(sum_of, parts, [x, y, unused], into)
        assert finite
        torch.testing.assert_close(mean, (x.square() * used).sum().detach() / 5)
        torch.testing.assert_close(by_x, wanted)
        torch.testing.assert_close(by_y, torch.tensor([4.0, 9.0]) / 5)
        assert by_none is None
    assert by_x is places[0]
    assert by_y is places[1]
    with torch.no_grad():
        x[0] = torch.inf
    mean, finite, (by_x, *_) = _part_by_part(sum_of, parts, [x, y, unused], places)
    assert not finite
    assert mean == 0
    assert not by_x.any()


def replace_stream(seen: Any, early: Tensor, places: Tensor) -> Any:
    """The forward with the rows of one stream taken from elsewhere, and its last stream alone."""
    own = seen.streams[LAYERS // 2]
    streams = {
        LAYERS // 2: own.detach().flatten(0, 1).index_copy(0, places, early).reshape(own.shape)
    }
    return replace(seen, streams=streams, last=seen.last.detach(), logits=None)


@cuda
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("exits", "at_once"), [(0.0, exit_term.AT_ONCE), (0.5, 600)])
def test_replayed_exits_train_the_model_and_the_map_as_launched_ones_do(
    exits: float, at_once: int, fuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exit_term, "AT_ONCE", at_once)
    ended = []
    for captured in (False, True):
        model = zoo.tiny("llama", num_hidden_layers=LAYERS).cuda().train()
        density = DensityLoss(
            model, every=100, exit_every=1, exits=exits, exit_map=True, cuda_graph=captured,
            fuse=fuse, exit_tokens=1.0,
        )  # fmt: skip
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(1, 8):
            ids = tiny_prompt(16, seed=step, batch=3).cuda()
            with density.watching(step=step) as watched:
                loss = model(input_ids=ids, labels=ids).loss
            (loss + density(ids, step=step, watched=watched).loss).backward()
            optimiser.step()
            optimiser.zero_grad()
        assert len(density._exit_term.graphs.known) == captured
        assert density.exit_maps is not None
        density.exit_maps.begin(100)
        ended.append([*model.parameters(), *density.exit_maps.maps.parameters()])
    for one, other in zip(*ended, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("fuse", "compiled", "wanted"),
    [
        (None, False, (True, False)),
        (None, True, (True, True)),
        (True, False, (True, True)),
        (False, True, (False, False)),
    ],
)
def test_exits_are_fused_by_default_and_masked_runs_where_the_model_is_compiled(
    fuse: bool | None,
    compiled: bool,
    wanted: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, penalty = term_of("llama", fuse=fuse, every=1)
    options, ids = penalty.options, tiny_prompt(9, batch=3)
    asked: dict[str, bool] = {}
    with monkeypatch.context() as patched:
        patched.setattr(density_loss, "is_compiled", lambda modules: compiled)
        on_gpu = penalty.options_of_a_step(torch.device("cuda"))
    penalty.options = replace(options, fuse=on_gpu.fuse)
    for module, term in ((exit_term, penalty._exit_term), (masked_runs, penalty._captured)):

        def note(key: Any, capture: Any, fuse: bool, name: str = module.__name__) -> None:
            asked[name] = fuse

        monkeypatch.setattr(module, "capturable", lambda *_: True)
        monkeypatch.setattr(term.graphs, "of", note)
    with penalty.watching(step=0) as watched:
        model(input_ids=ids)
    penalty(ids, step=0, watched=watched)
    assert tuple(asked.values()) == wanted


def test_exits_of_no_token_are_zero() -> None:
    """As in a process without a target, beside others whose weights are in parts."""
    model, penalty = term_of("llama", exit_map=False)
    instrument, options = attach(model), penalty.options.on(torch.device("cpu"))
    streams = torch.randn(2, 3, model.config.hidden_size)
    nobody = torch.zeros(3, dtype=torch.bool)
    chosen = _Chosen(*streams, torch.arange(3), nobody, LAYERS // 2)
    plain = exit_mean(
        instrument, chosen.seen(), chosen.drawn(), chosen.targets[None], options, lambda h, _: h
    )
    assert plain.mean == 0
    mean, _, _, *gradients = exits_and_gradients(instrument, chosen, None, options)()
    assert mean == 0
    assert all(each is None or not each.any() for each in gradients)
