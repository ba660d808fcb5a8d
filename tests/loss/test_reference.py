"""Held-out losses of a run that is over, as trainers leave them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softtrace import DensityLoss, DensityOptions
from softtrace.errors import InvalidInputError
from softtrace.loss.reference import loss_budget, read_losses
from tests.support.tiny import tiny_model, tiny_prompt

# as CSVLogger writes it; validations after 50 and 100 steps
METRICS = """epoch,loss/held_out,loss/train,step,val_loss
0,,3.5,9,
0,3.25,,49,4.5
0,,3.0,59,
0,3.125,,99,4.25
"""


def fit_folder(folder: Path) -> Path:
    for version, text in ((0, METRICS), (10, "epoch,loss/held_out,step\n0,3.0,149\n")):
        log = folder / "logs" / f"version_{version}"
        log.mkdir(parents=True)
        (log / "metrics.csv").write_text(text, encoding="utf-8")
    return folder


def test_a_fit_that_was_resumed_is_read_whole(tmp_path: Path) -> None:
    folder = fit_folder(tmp_path)
    assert read_losses(folder) == {50: 3.25, 100: 3.125, 150: 3.0}
    log = folder / "logs" / "version_0"
    for path in (log, log / "metrics.csv", str(log)):
        assert read_losses(path) == {50: 3.25, 100: 3.125}
    assert read_losses(log, "val_loss") == {50: 4.5, 100: 4.25}


def test_what_transformers_trainer_leaves(tmp_path: Path) -> None:
    logged = [{"step": 5, "loss": 3.5}, {"step": 5, "eval_loss": 3.25}, {"step": 10, "eval_x": 3}]
    for step, part in ((5, logged[:2]), (10, [*logged, {"step": 10, "eval_loss": 3.0}])):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": part}))
    assert read_losses(tmp_path) == {5: 3.25, 10: 3.0}
    assert read_losses(tmp_path / "checkpoint-5") == {5: 3.25}
    assert read_losses(tmp_path / "checkpoint-5" / "trainer_state.json") == {5: 3.25}
    assert read_losses(tmp_path, "eval_x") == {10: 3}


def test_what_holds_no_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"reference: found no file at .*nowhere; give the"):
        read_losses(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match=r"found none of metrics.csv, .* at "):
        read_losses(tmp_path)
    file = tmp_path / "metrics.csv"
    file.write_text(METRICS.replace("loss/held_out", "loss/other"))
    with pytest.raises(
        InvalidInputError, match=r"no loss/held_out or eval_loss in .*, but epoch, loss/other, "
    ):
        read_losses(tmp_path)
    with pytest.raises(InvalidInputError, match=r"found no eval in .*; name the held-out loss by"):
        read_losses(tmp_path, "eval")
    for name, text in (("metrics.csv", "a,b\n1,2\n"), ("trainer_state.json", "{}"), ("x", "[")):
        file = tmp_path / name
        file.write_text(text)
        with pytest.raises(InvalidInputError, match=f"{name} is no metrics.csv of Lightning's"):
            read_losses(file)


def test_the_strength_of_masked_runs_and_of_exits_gets_the_factor(tmp_path: Path) -> None:
    path = str(fit_folder(tmp_path))
    options = {"strength": 0.5, "exits": 0.3, "share": 1.0, "every": 1, "warmup_steps": 1}
    options["exit_map"] = False  # which would learn from one to the next
    model, ids = tiny_model("llama").train(), tiny_prompt(12, batch=2)
    plain, held = (
        DensityLoss(model, **options, **budget)
        for budget in ({}, {"budget": 0.01, "reference": path})
    )
    assert plain.budget is None
    assert held.budget is not None
    losses = []
    for density, factor in ((plain, 1.0), (held, 1.0), (held, 0.25)):
        if density.budget is not None:
            density.budget.factor = factor
        with density.watching() as watched:
            model(input_ids=ids)
        term = density(ids, step=5, watched=watched)
        losses.append(term.loss.item())
        assert term.strength == 0.5 * factor
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(losses[0] / 4, rel=1e-6)


def test_it_waits_for_the_end_of_the_warm_up() -> None:
    options = {"start_step": 3, "warmup_steps": 4, "budget": 0.01, "reference": {0: 2.0}}
    budget = loss_budget(DensityOptions(**options))  # type: ignore[arg-type]
    assert budget is not None
    budget.update(7, 2.0)
    assert budget.factor == 1
    budget.update(8, 2.0)
    assert budget.factor > 1
    assert loss_budget(DensityOptions()) is None
