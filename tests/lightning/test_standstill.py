"""A run that does not move says so: when, what of, and which dial it names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from softtrace.lightning import DensityMonitor, DensityPenalty
from softtrace.lightning.standstill import standstill
from softtrace.loss.options import DensityOptions
from tests.lightning.test_monitor import BLOCKS, Validated, run
from tests.support.fitting import Calls

LOGGER = "softtrace.lightning.monitor"
NAN = float("nan")


def options(**given: Any) -> DensityOptions:
    """Strength and exits of the default preset, masked runs at every step."""
    return DensityOptions(**given).on(torch.device("cpu"))


def history(*measured: tuple[int, float, float]) -> list[dict[str, float]]:
    names = ("step", "area_easy", "exit_agreement_easy")
    return [dict(zip(names, each, strict=True)) for each in measured]


STILL = history((0, 0.3, 0.1), (200, 0.28, 0.1), (400, 0.29, 0.11))
BUDGET = {"budget": 0.01, "reference": {0: 3.0}}


def over(share: float, area: float = 0.29) -> list[dict[str, float]]:
    """The same, and the last held-out loss lies so far above the reference's."""
    return [*STILL[:-1], {**STILL[-1], "area_easy": area, "loss_over_reference": share}]


@pytest.mark.parametrize(("given", "measured", "patience"), [
    ({}, STILL, 400),
    ({}, history((0, 0.3, 0.1), (400, 0.35, 0.05)), 400),  # the other way round
    ({}, history((0, 0.3, 0.1), (200, 0.2, 0.3), (400, 0.3, 0.1)), 400),  # there and back
    ({"exits": 0.0}, history((0, 0.3, 0.1), (400, 0.29, 0.9)), 400),
    ({"exits": 0.0}, history((0, 0.3, NAN), (400, 0.29, NAN)), 400),
    ({"start_step": 50, "warmup_steps": 50},
     history((0, 0.9, 0), (100, 0.3, 0), (500, 0.3, 0)), 400),
    ({}, history((400, 0.9, 0), (100, 0.3, 0), (500, 0.3, 0)), 400),  # of another fit, the first
], ids=str)  # fmt: skip
def test_a_run_that_stands_still_is_told(
    given: dict[str, Any], measured: list[dict[str, float]], patience: int
) -> None:
    said = standstill(measured, options(**given), patience)
    assert said is not None
    assert "To change that, double strength (it is 0.35)." in said
    assert ("exits" in said) == ("exits" not in given)


@pytest.mark.parametrize(("given", "measured", "patience"), [
    ({}, [], 1),
    ({}, STILL[:1], 1),
    ({}, STILL, 401),
    ({"strength": 0.0}, STILL, 400),
    (BUDGET, STILL, 400),  # of which nobody knows what is spent
    (BUDGET, over(0.008), 400),  # which sets the strength
    (BUDGET, over(0.1), 400),
    (BUDGET, over(NAN), 400),
    (BUDGET, over(0.0, 0.2), 400),
    ({}, history((0, 0.3, 0.1), (400, 0.284, 0.1)), 400),
    ({}, history((0, 0.3, 0.1), (400, 0.3, 0.121)), 400),
    ({}, history((0, 0.3, 0.1), (400, NAN, 0.1)), 400),
    ({}, history((0, 0.3, NAN), (400, 0.3, NAN)), 400),
    ({"start_step": 1}, STILL, 400),
    ({"warmup_steps": 1}, STILL, 400),
    ({"start_step": 500}, STILL, 1),
    ({}, history((0, 0.3, 0.1), (300, 0.3, 0.1), (100, 0.3, 0.1), (450, 0.3, 0.1)), 400),
], ids=str)  # fmt: skip
def test_others_are_not(
    given: dict[str, Any], measured: list[dict[str, float]], patience: int
) -> None:
    assert standstill(measured, options(**given), patience) is None


def test_it_says_the_numbers() -> None:
    assert standstill(STILL, options(), 400) == (
        "The density penalty moves nothing any more: from step 0 to step 400 the area of "
        "easy tokens went from 0.3000 to 0.2900, and the share of easy tokens on which exits at "
        "half depth agree from 10.0 % to 11.0 %; less than a fall by 5 % of itself or a rise by 2 "
        "points. To change that, double strength (it is 0.35). "
        "DensityMonitor(patience=None) never says this."
    )


@pytest.mark.parametrize("share", [0.0079, 0.0, -0.2])
def test_a_budget_that_is_not_spent_is_no_reason_to_stand_still(share: float) -> None:
    said = standstill(over(share), options(**BUDGET), 400, 2.5)
    assert said is not None
    assert (
        "less than a fall by 5 % of itself or a rise by 2 points. The budget is not spent "
        f"(held-out loss {100 * share:+.2f} % against the reference, where +1.00 % is allowed). "
        "To change that, double strength (it is 0.35, times 2.5 by the budget) or validate more "
        "often (a budget raises it at validations only)."
    ) in said
    highest = standstill(over(share), options(**BUDGET), 400, 8.0)
    assert highest is not None
    assert "double strength (it is 0.35, times 8 by the budget). Dens" in highest


@pytest.mark.parametrize(("every", "first"), [(4, False), (5, True), (None, True)])
def test_where_masked_runs_come_seldom_that_dial_is_first(every: int | None, first: bool) -> None:
    seldom = DensityOptions(every=every).on(torch.device("xpu"))
    said = standstill(STILL, seldom, 400)
    assert said is not None
    assert ("To change that, lower every first" in said) == first
    assert ("raise share (it is 0.3); if that does not help, double" in said) == first
    assert "double strength" in said


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == LOGGER]


def penalty(strength: float = 1e-9, **given: Any) -> DensityPenalty:
    return DensityPenalty(strength, share=0.5, crop=6, exits=0.0, **given)


class Frozen(Validated):
    """Learns next to nothing, so that its densities stay whatever else is done."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-9)


def test_a_fit_that_does_not_move_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    monitor = DensityMonitor(BLOCKS, patience=1)
    run(Frozen(), penalty(), monitor, val_check_interval=1)
    (said,) = warnings(caplog)
    area = [each["area_easy"] for each in monitor.history]
    assert f"from step 1 to step 2 the area of easy tokens went from {area[0]:.4f}" in said
    assert "double strength (it is 1e-09)" in said
    assert [record.levelno for record in caplog.records if record.name == LOGGER] == [
        logging.WARNING
    ]


@pytest.mark.parametrize("reference", [9.0, 1.0], ids=["not spent", "spent"])
def test_a_fit_with_a_budget_warns_unless_it_is_spent(
    reference: float, caplog: pytest.LogCaptureFixture
) -> None:
    held = penalty(budget=0.01, reference={0: reference})
    run(Frozen(), held, DensityMonitor(BLOCKS, patience=1), val_check_interval=1)
    said = warnings(caplog)
    assert len(said) == (reference > 5)
    # What the first validation found doubled the strength, the most at a time.
    assert all("(it is 1e-09, times 2 by the budget)" in each for each in said)


@pytest.mark.thorough
def test_another_fit_from_the_start_may_say_it_too(caplog: pytest.LogCaptureFixture) -> None:
    monitor = DensityMonitor(BLOCKS, patience=1)
    for _ in range(2):
        run(Frozen(), penalty(), monitor, val_check_interval=1)
    assert len(warnings(caplog)) == 2


@pytest.mark.thorough
@pytest.mark.parametrize(("callbacks", "patience"), [
    ((), 1), ((penalty(0.0),), 1), ((penalty(),), None), ((penalty(start_step=3),), 2),
], ids=["alone", "strength 0", "never", "too late"])  # fmt: skip
def test_fits_that_do_not_warn(
    callbacks: tuple[DensityPenalty, ...], patience: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    run(Frozen(), *callbacks, DensityMonitor(BLOCKS, patience=patience), val_check_interval=1)
    assert not warnings(caplog)


@pytest.mark.thorough
def test_other_processes_are_silent(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.Trainer.is_global_zero", False)
    monitor = DensityMonitor(BLOCKS, patience=1)
    run(Frozen(), penalty(), monitor, val_check_interval=1)
    assert not warnings(caplog)
    assert monitor.state_dict()["warned"] is True


@pytest.mark.thorough
@pytest.mark.parametrize(("patience", "later"), [(2, 0), (5, 1)], ids=["before", "after"])
def test_a_resumed_fit_warns_as_the_straight_one(
    patience: int, later: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = tmp_path / "middle.ckpt"

    def save(fitting: Any, *_: Any) -> None:
        if fitting.global_step == 4:
            fitting.save_checkpoint(saved)

    def fitted(*callbacks: Callback, checkpoint: Any = None) -> tuple[dict[str, Any], int]:
        caplog.clear()
        monitor = DensityMonitor(BLOCKS, patience=patience)
        run(Frozen(), penalty(), monitor, *callbacks, val_check_interval=1, max_epochs=2,
            checkpoint=checkpoint)  # fmt: skip
        return monitor.state_dict(), len(warnings(caplog))

    whole, said = fitted(Calls(on_train_epoch_end=save))
    assert said == 1
    state, said = fitted(checkpoint=saved)
    assert said == later
    assert state == whole


def test_states_from_before_it_could_warn_are_read() -> None:
    monitor = DensityMonitor()
    monitor.load_state_dict({"version": 1, "history": history((3, 0.3, 0.1))})
    assert monitor.state_dict()["warned"] is False
    monitor.load_state_dict({"version": 1, "history": [], "warned": True})
    assert monitor.state_dict()["warned"] is True
