"""What every trainer that is given the term does alike: it proves its use, logs it and saves."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softtrace.errors import TrainerSetupError
from softtrace.loss.budget import LossBudget
from softtrace.loss.options import DensityOptions
from softtrace.loss.term import DensityTerm

STATE_VERSION = 3
_EXITS = "density/exit_distance"
_READ = (1, 2, STATE_VERSION)  # 1 kept nothing of what was logged, 2 nothing of a budget


class ExpectedGradient:
    """A gradient other than 0 that has to arrive at a loss.

    Args:
        loss: scalar with a graph; it is not held.
    """

    def __init__(self, loss: Tensor) -> None:
        self.arrived = False
        loss.register_hook(self._arrive)  # type: ignore[no-untyped-call]

    def _arrive(self, gradient: Tensor) -> None:
        self.arrived = self.arrived or bool(gradient != 0)


class TermLog:
    """Names and values of what is logged of the term in one training.

    What masked runs and exits measure stays as the last ones gave it: loggers look at every 50th
    step or so, where those of ``every`` and ``exit_every`` seldom are. NaN before the first and
    where a run was skipped. So what is logged next depends on steps that are over, and is part of
    what a checkpoint keeps.

    Args:
        options: of the term.
        terms: the mean of how many is logged as ``loss/density``.
        budget: that the strength is held by, if any.

    Attributes:
        measured: what the last runs gave, by name; scalars, none before the first step.
    """

    def __init__(
        self, options: DensityOptions, terms: int = 1, budget: LossBudget | None = None
    ) -> None:
        self._strength, self._budget = options.strength, budget
        self._has_exits = options.reads_exits
        self._added: deque[Tensor] = deque(maxlen=terms)
        self.measured: dict[str, Tensor] = {}

    def state(self) -> dict[str, Any]:
        """What a resumed training starts from; scalars on the CPU."""
        return {
            "added": [each.cpu() for each in self._added],
            "measured": {name: value.cpu() for name, value in self.measured.items()},
        }

    def load(self, kept: Mapping[str, Any], device: torch.device) -> None:
        """Resume from a :meth:`state`.

        Args:
            kept: that state.
            device: of the terms to come.
        """
        self._added.extend(each.to(device) for each in kept["added"])
        self.measured = {name: value.to(device) for name, value in kept["measured"].items()}

    def of(self, term: DensityTerm) -> dict[str, Tensor]:
        """What to log at the step of this term; scalars without a graph."""
        self._added.append(term.loss.detach())
        if term.strength > 0 or not self.measured:
            self.measured |= {
                "density/soft_size": term.soft_size,
                "density/distortion": term.distortion,
                "density/easy_share": term.easy_share,
            }
        if self._has_exits:
            read = term.exit_distance
            if read is not None or term.skipped is not None or _EXITS not in self.measured:
                unread = torch.full_like(term.soft_size, torch.nan)
                self.measured[_EXITS] = unread if read is None else read
        values = {"loss/density": torch.stack(list(self._added)).mean(), **self.measured}
        if (budget := self._budget) is not None:
            spent = math.nan if budget.spent is None else budget.spent
            strength = self._strength * budget.factor
            for name, value in (("strength", strength), ("budget_spent", spent)):
                values[f"density/{name}"] = torch.full_like(term.soft_size, value)
        return values


def state_of(seed: int, log: Any = None, budget: LossBudget | None = None) -> dict[str, Any]:
    """What a checkpoint keeps of the term; draws, and all else, are functions of the step.

    Args:
        seed: of the term.
        log: what is logged next continues this; None starts anew.
        budget: that the strength is held by, if any.
    """
    kept = None if budget is None else budget.state()
    return {"version": STATE_VERSION, "seed": seed, "log": log, "budget": kept}


def measured_loss(metrics: Mapping[str, Any], monitor: str) -> float:
    """The held-out loss among what a validation logged.

    Raises:
        TrainerSetupError: it is not there; names what is.
    """
    if monitor not in metrics:
        raise TrainerSetupError(
            f"budget: the validation logged no {monitor}, but {', '.join(metrics) or 'nothing'}; "
            "name the held-out loss by monitor"
        )
    return float(metrics[monitor])


def check_state(kept: Mapping[str, Any], seed: int, *, found: str, resumed: str) -> None:
    """Refuse a checkpoint of an unknown layout or another seed; older layouts are read.

    Args:
        kept: of the term in the checkpoint.
        seed: of this training.
        found: says in the error what it was, with ``{name}`` and ``{value}``.
        resumed: what is, for the error.

    Raises:
        TrainerSetupError: which of them differs, and from what.
    """
    for name, allowed in (("version", _READ), ("seed", (seed,))):
        if kept.get(name) not in allowed:
            was = found.format(name=name, value=repr(kept.get(name)))
            raise TrainerSetupError(
                f"checkpoint: found {was}, this run has {allowed[-1]!r}; {resumed} resumes only "
                "with what it was started with"
            )
