"""What a checkpoint of a loop of one's own keeps of the term; all else follows from the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import safetensors.torch

from softtrace.errors import TrainerSetupError
from softtrace.loss.budget import LossBudget
from softtrace.loss.integration import STATE_VERSION, check_state
from softtrace.loss.learned_maps import LearnedMaps


def state_of_loop(
    seed: int, step: int, budget: LossBudget | None, maps: LearnedMaps | None
) -> dict[str, Any]:
    """The state of one ``DensityLoss``, alike in all processes.

    Maps are bytes of a safetensors file: their optimiser has tensors only once they have learned,
    and a distributed checkpoint loads no tensor that the new run does not have yet.
    """
    return {
        "version": STATE_VERSION,
        "seed": seed,
        "step": step,
        "budget": None if budget is None else budget.state(),
        "exit_maps": None if maps is None else safetensors.torch.save(maps.state()),
    }


def resume_loop(
    kept: Mapping[str, Any], seed: int, budget: LossBudget | None, maps: LearnedMaps | None
) -> int:
    """Resume from :func:`state_of_loop`; gives the step.

    Raises:
        TrainerSetupError: it is of another layout, seed or exits, or of a term with a budget or
            maps where this one has none, or the other way round.
    """
    check_state(kept, seed, found="DensityLoss {name} {value}", resumed="a training")
    for name, own in (("budget", budget), ("exit_maps", maps)):
        if (kept.get(name) is None) != (own is None):
            was, now = ("none", "one") if kept.get(name) is None else ("one", "none")
            raise TrainerSetupError(
                f"checkpoint: found {was} of {name}, this run has {now}; resume with the options "
                "of the term that it was started with"
            )
    if budget is not None:
        budget.load(kept["budget"])
    if maps is not None:
        maps.load(safetensors.torch.load(kept["exit_maps"]))
    return int(kept["step"])
