"""Exits as one function with its backward pass, as a GPU replays it, against exits as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from softtrace import DensityLoss
from softtrace.loss.draws import draw_exits
from softtrace.loss.early_exits import rows
from softtrace.loss.exit_term import ExitDistance, _Chosen, exits_and_gradients
from softtrace.model.state import dropout_off
from softtrace.tracing.attach import attach
from tests.support import zoo
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
    ("family", "changes", "backend"),
    [
        ("llama", {}, "aot_eager"),
        ("gemma2", {"exit_quantile": 1.0}, "eager"),
        ("gpt2", {"exit_map": False}, "eager"),
    ],
)
def test_one_function_gives_the_gradients_of_exits_as_they_are(
    family: str, changes: dict[str, Any], backend: str
) -> None:
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
            for call in calls:
                mean, finite, by_map, *gradients = call()
                torch.testing.assert_close(mean, plain.mean.detach())
                assert finite
                got = [*([] if maps is None else [by_map]), *gradients]
                assert (by_map is None) == (maps is None)
                assert got[len(copies)].abs().sum() > 0
                for one, other in zip(got, wanted, strict=True):
                    assert (one is None) == (other is None)
                    if one is not None:
                        torch.testing.assert_close(one, other)


def replace_stream(seen: Any, early: Tensor, places: Tensor) -> Any:
    """The forward with the rows of one stream taken from elsewhere, and its last stream alone."""
    own = seen.streams[LAYERS // 2]
    streams = {
        LAYERS // 2: own.detach().flatten(0, 1).index_copy(0, places, early).reshape(own.shape)
    }
    return replace(seen, streams=streams, last=seen.last.detach(), logits=None)


@cuda
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("exits", [0.0, 0.5])
def test_replayed_exits_train_the_model_and_the_map_as_launched_ones_do(
    exits: float, fuse: bool
) -> None:
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
