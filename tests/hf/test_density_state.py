"""A training by transformers' Trainer whose strength follows its own evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softtrace.errors import TrainerSetupError
from softtrace.hf import DensityState
from softtrace.loss.budget import LossBudget
from tests.support.fitting import weights
from tests.support.hf_training import OPTIONS, DensityTrainer, OrderedTrainer, arguments, rows
from tests.support.tiny import tiny_model

EVALUATED: dict[str, Any] = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1,
}  # fmt: skip


def trained(
    folder: Path, density: dict[str, Any] | None, checkpoint: str | None = None, **changes: Any
) -> Any:
    torch.manual_seed(0)
    kind, own = (OrderedTrainer, {}) if density is None else (DensityTrainer, {"density": density})
    settings = {**EVALUATED, **changes}
    held_out = settings.pop("eval_dataset", rows()[:4])
    trainer: Any = kind(
        model=tiny_model("gpt2", dtype=torch.float64).train(), args=arguments(folder, **settings),
        train_dataset=rows(), eval_dataset=held_out, **own,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def logged(trainer: Any) -> list[dict[str, float]]:
    names = ("step", "density/strength", "density/budget_spent", "loss/density")
    return [
        {name: entry[name] for name in names}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.mark.thorough
def test_it_follows_its_evaluations_and_resumed_it_ends_bit_by_bit(tmp_path: Path) -> None:
    trained(tmp_path / "plain", None)
    options = {**OPTIONS, "budget": 0.05, "reference": str(tmp_path / "plain")}
    whole = trained(tmp_path / "held", options)
    entries = logged(whole)
    strengths = [entry["density/strength"] for entry in entries]
    assert strengths[0] == strengths[1] == pytest.approx(OPTIONS["strength"])
    assert len(set(strengths)) == 4
    for step in (1, 2, 3, 6):
        again = trained(tmp_path / "held", options, str(tmp_path / "held" / f"checkpoint-{step}"))
        assert torch.equal(weights(again.model), weights(whole.model)), step
        assert repr(logged(again)) == repr(entries), step
    assert again._density is None  # an evaluation after the training tells nobody
    again.evaluate()
    other = {**OPTIONS, "strength": OPTIONS["strength"]}
    fixed = trained(tmp_path / "fixed", other)
    assert not torch.equal(weights(fixed.model), weights(whole.model))  # it would be noticed
    assert not {"density/strength", "density/budget_spent"} & set(fixed.state.log_history[0])
    # a checkpoint of before there were budgets: the factor begins anew
    state = tmp_path / "held" / "checkpoint-2" / "trainer_state.json"
    kept = json.loads(state.read_text())
    older = {"version": 2, "seed": 3, "log": None}
    kept["stateful_callbacks"]["DensityState"]["attributes"] = older
    state.write_text(json.dumps(kept))
    anew = trained(tmp_path / "held", options, str(state.parent))
    assert logged(anew)[2]["density/strength"] == pytest.approx(OPTIONS["strength"])


def test_a_training_without_evaluation_is_told(tmp_path: Path) -> None:
    options = {**OPTIONS, "budget": 0.05, "reference": {0: 5.0}}
    with pytest.raises(TrainerSetupError, match=r"this training has no evaluation \(eval_strategy"):
        trained(tmp_path, options, eval_strategy="no")
    with pytest.raises(TrainerSetupError, match="first evaluation after 9 steps, and ends after 8"):
        trained(tmp_path, options, eval_steps=9)
    trained(tmp_path, options, eval_steps=8)


def test_a_monitor_of_none_of_several_sets_is_told(tmp_path: Path) -> None:
    sets = {"prose": rows()[:4], "code": rows()[4:8]}
    for monitor, found in ((None, "eval_loss"), ("eval_pros_loss", "eval_pros_loss")):
        options = {**OPTIONS, "budget": 0.05, "reference": {0: 5.0}, "monitor": monitor}
        message = f"found monitor {found}, but .* are eval_prose_loss, eval_code_loss; name"
        with pytest.raises(TrainerSetupError, match=message):
            trained(tmp_path, options, eval_dataset=sets)


@pytest.mark.parametrize("density", [{"strength": 0}, {"strength": 0.6, "crop": 6, "seed": 3}])
def test_a_run_with_a_budget_goes_on_without_one(tmp_path: Path, density: dict[str, Any]) -> None:
    options = {**OPTIONS, "budget": 0.05, "reference": {0: 5.0}}
    trained(tmp_path, options, max_steps=2)
    changes = {"eval_on_start": True, "restore_callback_states_from_checkpoint": True}
    settings: dict[str, Any] = {**density, "seed": 3}
    again = trained(tmp_path, settings, str(tmp_path / "checkpoint-2"), max_steps=4, **changes)
    kept = again.state.stateful_callbacks["DensityState"]["attributes"]
    assert kept["budget"] is None


def test_one_that_a_user_gave_is_replaced(tmp_path: Path) -> None:
    trainer = DensityTrainer(
        model=tiny_model("llama").train(), args=arguments(tmp_path, max_steps=1),
        train_dataset=rows(), density=OPTIONS, callbacks=[DensityState()],
    )  # fmt: skip
    trainer.train()
    assert [state.seed for state in trainer._states()] == [OPTIONS["seed"]]


def state_with(monitor: str) -> tuple[DensityState, LossBudget]:
    state, budget = DensityState(), LossBudget(0.01, {0: 2.0})
    state.budget, state.monitor = budget, monitor
    return state, budget


def tell(state: DensityState, **metrics: float) -> None:
    class Now:
        global_step = 5

    state.on_evaluate(None, Now(), None, metrics=metrics)  # type: ignore[arg-type]


def test_which_of_several_losses_is_followed() -> None:
    state, budget = state_with("eval_prose_loss")
    tell(state, eval_code_loss=9.0)
    assert budget.spent is None
    tell(state, eval_prose_loss=2.01)
    assert budget.spent == pytest.approx(0.5)
    state, _ = state_with("eval_loss")
    with pytest.raises(TrainerSetupError, match="logged no eval_loss, but eval_code_loss; name"):
        tell(state, eval_code_loss=2.0)
    tell(state, test_loss=9.0)  # of an evaluation of the user's
    state, _ = state_with("eval_los")
    with pytest.raises(TrainerSetupError, match="logged no eval_los, but eval_loss; name"):
        tell(state, eval_loss=2.0)
    tell(DensityState(), eval_other=1.0)  # without a budget it listens to nothing
