"""A loop of one's own that resumes: by torch.save and by distributed checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from softtrace import DensityLoss, TrainerSetupError
from tests.support.tiny import tiny_model
from tests.support.units import by_layer
from tests.support.ways_to_shard import loss_of, one_process_group, whole_weights

pytestmark = pytest.mark.thorough

OPTIONS: dict[str, Any] = {
    "share": 0.5, "crop": 6, "exits": 0.6, "every": 2, "budget": 0.01, "reference": {0: 1.0},
}  # fmt: skip


class Loop:
    """A training of a model, whole or in parts."""

    def __init__(self, shard: Callable[[Any], None] | None = None) -> None:
        self.model: Any = tiny_model("llama", seed=1, dtype=torch.float64).train()
        if shard is not None:
            shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.density = DensityLoss(self.model, **OPTIONS)

    def run(self, *steps: int) -> None:
        for step in steps:
            loss_of(self.model, self.density, step, 0, 9).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            assert self.density.budget is not None
            self.density.budget.update(step, 9.0)  # far above: the strength falls

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "density": self.density}


def by_save(straight: Loop, resumed: Loop, folder: Path) -> None:
    parts = ("model", "optimizer", "density")
    torch.save({name: getattr(straight, name).state_dict() for name in parts}, folder / "a.pt")
    kept = torch.load(folder / "a.pt", weights_only=True)
    for name in parts:
        getattr(resumed, name).load_state_dict(kept[name])


def in_parts(straight: Loop, resumed: Loop, folder: Path) -> None:
    dcp.save(straight.state(), checkpoint_id=folder)
    state = resumed.state()
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        resumed.model, resumed.optimizer,
        model_state_dict=state["model"], optim_state_dict=state["optimizer"],
    )  # fmt: skip


@pytest.mark.parametrize(("way", "shard"), [(by_save, None), (in_parts, by_layer)])
def test_a_resumed_loop_ends_with_the_weights_of_a_straight_one(
    tmp_path: Path, way: Callable[..., None], shard: Any
) -> None:
    with one_process_group():
        straight, resumed, without = (Loop(shard) for _ in range(3))
        straight.run(0, 1, 2)
        for number, each in enumerate((resumed, without)):
            (tmp_path / str(number)).mkdir()
            way(straight, each, tmp_path / str(number))
        without.density = DensityLoss(without.model, **OPTIONS)
        for loop in (straight, resumed, without):
            loop.run(3, 4)
        wanted, found, other = (whole_weights(each.model) for each in (straight, resumed, without))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not all(torch.equal(other[name], wanted[name]) for name in wanted)


def test_the_count_of_steps_is_kept() -> None:
    model = tiny_model("llama")
    density, other = DensityLoss(model, exits=0.0), DensityLoss(model, exits=0.0)
    density.step = 7
    other.load_state_dict(density.state_dict())
    assert other.step == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "found DensityLoss seed 0, this run has 3"),
        ({"exits": 0.0, "exit_map": False}, "found one of exit_maps, this run has none"),
        ({"budget": None, "reference": None}, "found one of budget, this run has none"),
    ],
)
def test_a_state_of_another_term_is_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    kept = DensityLoss(model, **OPTIONS).state_dict()
    with pytest.raises(TrainerSetupError, match=message):
        DensityLoss(model, **{**OPTIONS, **changes}).load_state_dict(kept)
