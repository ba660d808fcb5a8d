"""The Trainer's integration: mixed precision, sharding, several tries, a cut checkpoint."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig

import softtrace
from softtrace import CheckpointError, TrainerSetupError
from tests.support.fitting import weights
from tests.support.hf_training import MICRO, OPTIONS, DensityTrainer, arguments, rows, train
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.thorough


def trainer_of(folder: Path, density: Any = OPTIONS, model: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = tiny_model("llama").train() if model is None else model
    settings = arguments(folder, **changes)
    return DensityTrainer(model=model, args=settings, train_dataset=rows(), density=density)


def test_mixed_precision_trains(tmp_path: Path) -> None:
    """Accelerate puts autocast around the forward; the proof is of the model's own."""
    terms = []
    for half in (False, True):
        trainer = trainer_of(tmp_path, bf16=half)
        trainer.train()
        assert ("_original_forward" in vars(trainer.model)) == half
        terms.append([entry["loss/density"] for entry in trainer.state.log_history[:-1]])
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert terms[0] != terms[1]
    assert terms[0][0] == pytest.approx(terms[1][0], rel=0.05)


def test_a_model_that_accelerate_prepared_can_be_attached(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, {"strength": 0.0}, bf16=True, max_steps=1)
    trainer.train()
    around = vars(trainer.model)["forward"]
    softtrace.attach(trainer.model)
    assert vars(trainer.model)["forward"] is around


@pytest.mark.parametrize(
    ("place", "value", "name"),
    [
        ("is_fsdp_enabled", True, "FSDP"),
        ("tp_size", 2, r"TP \(tensor parallelism: .* splits"),
        ("cp_size", 2, r"CP \(context parallelism: .* splits"),
        ("sp_size", 2, r"SP \(sequence parallelism: .* splits"),
    ],
)
def test_sharding_is_refused_by_name(tmp_path: Path, place: str, value: Any, name: str) -> None:
    trainer = trainer_of(tmp_path)
    if place.startswith("is_"):
        setattr(trainer, place, value)
    else:
        layout = ParallelismConfig(**{place: value})
        trainer.accelerator = type("Accelerator", (), {"parallelism_config": layout})()
    trainer.state.stateful_callbacks = {}
    with pytest.raises(TrainerSetupError, match=f"found {name}.*allow_untested=True"):
        trainer._begin()
    trainer.allow_untested = True
    trainer._begin()
    assert trainer._density is not None


def test_a_second_try_with_smaller_batches_starts_anew(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "tries", auto_find_batch_size=True, max_steps=6)
    failures: list[int] = []

    def run_out(module: Any, args: Any) -> None:
        """Of memory, at the third step of the first try."""
        if trainer.state.global_step == 2 and not failures:
            failures.append(2)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    trainer.model.register_forward_pre_hook(run_out)
    asked: list[tuple[int, int, int]] = []
    note = trainer._note

    def noting(term: Any, batches: int) -> None:
        asked.append((*trainer._place, trainer._train_batch_size))
        note(term, batches)

    trainer._note = noting
    trainer.train()
    sizes = [size for *_, size in asked]
    assert failures
    assert len(set(sizes)) == 2  # it did try twice
    second = [each for each in asked if each[2] == sizes[-1]]
    assert [step for step, *_ in second] == list(range(6))
    assert {micro for _, micro, _ in second} == {1}
    for entry in trainer.state.log_history[:-1]:
        assert entry["loss/task"] + entry["loss/density"] == pytest.approx(entry["loss"])


def test_nothing_grows_where_nothing_is_logged(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, logging_strategy="no")
    held: list[int] = []
    note = trainer._note

    def noting(term: Any, batches: int) -> None:
        note(term, batches)
        held.append(sum(value.numel() for value in trainer._sums.values()))

    trainer._note = noting
    trainer.train()
    assert len(held) == 16 // MICRO
    assert len(set(held)) == 1


def test_a_checkpoint_that_was_cut_short_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(tmp_path, OPTIONS, save_strategy="steps", save_steps=2)
    cut = tmp_path / "checkpoint-8"
    (cut / "trainer_state.json").unlink()  # written last
    again = trainer_of(
        tmp_path, model=tiny_model("llama", seed=5, dtype=torch.float64).train(),
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "softtrace"):
        again.train(resume_from_checkpoint=True)
    assert "checkpoint-8 was cut short" in caplog.text
    assert torch.equal(weights(again.model), weights(whole.model))
    for path in tmp_path.glob("checkpoint-*"):
        (path / "trainer_state.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="found no whole checkpoint"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)
    for path in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="No valid checkpoint"):  # the Trainer's own words
        trainer_of(tmp_path).train(resume_from_checkpoint=True)
