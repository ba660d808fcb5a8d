"""The table of what the Lightning integration works with, walked row by row.

Every supported row fits at strength 0 bit by bit as without the callback, and at another
strength to other, finite weights.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import strategies
from torch import Tensor

from softtrace.errors import InvalidInputError, TrainerSetupError
from softtrace.lightning import DensityPenalty
from softtrace.lightning.support import LIGHTNING, check_strategy, name_of
from tests.support.fitting import Batches, Manual, TakesIterator, Tuner, batches, fit, weights
from tests.support.ways_to_fit import OPTIONS, WAYS, Checkpointed, Closures, Reentrant, Way

pytestmark = pytest.mark.thorough


#: these have tests of their own, in several processes
ELSEWHERE = {
    *("DDPStrategy", "DeepSpeedStrategy", "DeepSpeedStrategy(stage=3)", "FSDPStrategy"),
    "ModelParallelStrategy",
}

#: refused rows that are no strategies: what is fitted, and what the error says
REFUSED: dict[str, tuple[type[Tuner], type[Exception], str]] = {
    "training_step(dataloader_iter)": (TakesIterator, TrainerSetupError, "takes dataloader_iter"),
    "manual optimisation": (Manual, TrainerSetupError, "uses manual optimisation"),
    "activation checkpointing, reentrant": (Reentrant, InvalidInputError, "use_reentrant=True"),
}


@pytest.fixture(autouse=True)
def _other_peoples_warnings() -> Iterator[None]:
    """Of finders, of half precision on a CPU, of skipped batches: Lightning's own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_every_row_is_walked() -> None:
    supported = {row.name for row in LIGHTNING if row.refused is None}
    assert supported == set(WAYS) | ELSEWHERE
    refused = {row.name for row in LIGHTNING if row.refused and row.kind != "strategy"}
    assert refused == set(REFUSED)
    assert len({row.name for row in LIGHTNING}) == len(LIGHTNING)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_strength_0_is_inert_and_others_are_not(way: Way) -> None:
    plain, fitted = way.fit()
    silent, _ = way.fit(DensityPenalty(0.0, **OPTIONS))
    loud, penalised = way.fit(DensityPenalty(0.6, **OPTIONS))
    assert fitted.global_step == penalised.global_step > 0
    assert (weights(silent) - weights(plain)).abs().max() == 0.0
    assert torch.isfinite(weights(loud)).all()
    assert not torch.equal(weights(loud), weights(plain))
    assert "training_step" not in vars(loud)


def test_accumulation_is_rescheduled_before_the_fits_end() -> None:
    scheduled = WAYS["GradientAccumulationScheduler"]
    way, without = scheduled.fit()[0], Way(steps=scheduled.steps).fit()[0]
    assert not torch.equal(weights(way), weights(without))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_modules_say_why(name: str) -> None:
    kind, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        fit(kind(), DensityPenalty(0.6))


def test_reentrant_checkpointing_is_refused_for_its_exits_alone() -> None:
    for reentrant in (Reentrant, Checkpointed):
        module = reentrant()
        fit(module, DensityPenalty(0.6, exits=0.0))
        found = weights(module)
        if reentrant is Reentrant:
            first = found
    torch.testing.assert_close(first, found, atol=1e-5, rtol=1e-4)


def test_strategies_that_are_not_supported_are_refused_by_name() -> None:
    for row in LIGHTNING:
        if row.kind == "strategy" and row.refused:
            with pytest.raises(
                TrainerSetupError, match=f"found {re.escape(row.name)} .*supported are Single"
            ):
                check_strategy(row.name)
            check_strategy(row.name, allow_untested=True)

    flat = strategies.FSDPStrategy(use_orig_params=False)
    assert name_of(flat) == "FSDPStrategy(use_orig_params=False)"
    assert name_of(strategies.FSDPStrategy()) == "FSDPStrategy"
    assert name_of(strategies.DDPStrategy()) == "DDPStrategy"
    with pytest.raises(
        TrainerSetupError, match=r"found DDPStrategy\(start_method='fork'\) \(its processes end"
    ):
        check_strategy(name_of(strategies.DDPStrategy(start_method="fork")))

    class Own(strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(
        TrainerSetupError, match=r"found Own \(it was never tested\).*allow_untested"
    ):
        fit(Tuner(), DensityPenalty(), strategy=Own("cpu"))
    fit(Tuner(), DensityPenalty(0.0), strategy=Own("cpu"))
    own, usual = Tuner(), Tuner()
    fit(own, DensityPenalty(allow_untested=True), strategy=Own("cpu"))
    fit(usual, DensityPenalty())
    assert torch.equal(weights(own), weights(usual))


def test_closures_of_a_step_see_the_same_term() -> None:
    seen: list[tuple[int, float]] = []

    class Noting(DensityPenalty):
        def _log(self, pl_module: Any, task: Tensor, term: Any) -> None:
            seen.append((pl_module.global_step, float(term.distortion)))
            super()._log(pl_module, task, term)

    class Still(Closures):
        """Its steps go nowhere, so that only the draws could differ."""

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(
                self.parameters(), lr=0.0, max_iter=3, tolerance_grad=0.0, tolerance_change=-1.0
            )

    fit(Still(), Noting(0.6, **OPTIONS), data=Batches(*batches().batches[:2]))
    by_step: dict[int, set[float]] = {}
    for step, distortion in seen:
        by_step.setdefault(step, set()).add(distortion)
    assert len(seen) > 2 * len(by_step)  # closures did run repeatedly
    assert all(len(each) == 1 for each in by_step.values())
