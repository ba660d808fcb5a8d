"""A fit whose strength follows its own validations: straight, resumed, and without any."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from softtrace.errors import InvalidInputError, TrainerSetupError
from softtrace.lightning import STATE_KEY, DensityPenalty
from softtrace.lightning.due_validation import is_due
from softtrace.loss.reference import read_losses
from tests.support.corpus import byte_tokenizer, write_tree
from tests.support.fitting import Batches, Calls, Tuner, batches, fit, trainer, weights
from tests.support.lightning_runs import ByteTuner, data_module

BUDGET: dict[str, Any] = {"budget": 1.0, "reference": {0: 3.0}, "crop": 12}
STRENGTH = "density/strength"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return write_tree(tmp_path / "tree")


def fit_corpus(
    corpus: Path, *callbacks: Any, ckpt_path: Path | None = None, every: int = 2, **settings: Any
) -> tuple[Tensor, dict[int, float]]:
    """The weights after two epochs of six batches, and the strength of every step."""
    strengths = {}

    def note(fitting: Trainer, *_: Any) -> None:
        strengths[fitting.global_step] = float(fitting.callback_metrics[STRENGTH])

    torch.manual_seed(0)
    module = ByteTuner()
    usual = {"max_epochs": 2, "limit_val_batches": 1, "val_check_interval": every}
    fitting = trainer(
        DensityPenalty(0.5, **BUDGET), Calls(on_train_batch_end=note), *callbacks,
        **{**usual, **settings},
    )  # fmt: skip
    fitting.fit(module, data_module(corpus), ckpt_path=ckpt_path, weights_only=True)
    return weights(module), strengths


def saves(folder: Path, hook: str) -> Calls:
    """A checkpoint at every call of a hook; the first one of a step."""

    def save(fitting: Trainer, *_: Any) -> None:
        path = folder / f"step={fitting.global_step}.ckpt"
        if not fitting.sanity_checking and not path.exists():
            fitting.save_checkpoint(path)

    return Calls(**{hook: save})


@pytest.mark.parametrize(
    ("hook", "accumulate"),
    [
        # before the validation that is due
        pytest.param("on_train_batch_end", 1, marks=pytest.mark.thorough),
        pytest.param("on_train_batch_end", 4, marks=pytest.mark.thorough),
        pytest.param("on_validation_end", 1, marks=pytest.mark.thorough),
    ],
)
def test_resumed_anywhere_it_ends_as_the_straight_one_bit_by_bit(
    corpus: Path, hook: str, accumulate: int
) -> None:
    settings = {"accumulate_grad_batches": accumulate}
    straight, strengths = fit_corpus(corpus, saves(corpus.parent, hook), **settings)
    assert len(set(strengths.values())) >= (6 if accumulate == 1 else 3)  # it moved
    # at the first step gradients may have been accumulated already, which no checkpoint holds
    found = sorted(set(corpus.parent.glob("step=*.ckpt")) - {corpus.parent / "step=0.ckpt"})
    assert len(found) >= 3
    for path in found[::2]:  # half of them take half as long
        again, after = fit_corpus(corpus, ckpt_path=path, **settings)
        assert torch.equal(again, straight), path
        assert after.items() <= strengths.items(), path


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoints_of_lightnings_own_callback_too(corpus: Path) -> None:
    own = ModelCheckpoint(corpus.parent / "own", "own-{step}", every_n_train_steps=2, save_top_k=-1)
    straight, _ = fit_corpus(corpus, own, enable_checkpointing=True)
    found = sorted((corpus.parent / "own").glob("own-*.ckpt"))
    assert len(found) == 6
    for path in found:
        kept = torch.load(path, weights_only=True)[STATE_KEY]
        assert kept["validation_is_due"]  # what this test is about
        assert torch.equal(fit_corpus(corpus, ckpt_path=path)[0], straight), path


def test_a_validation_is_due_between_the_end_of_a_batch_and_itself() -> None:
    found: dict[str, list[bool]] = {}

    def ask(hook: str) -> Any:
        return lambda fitting, *_: found.setdefault(hook, []).append(is_due(fitting))

    hooks = ("on_train_batch_start", "on_train_batch_end", "on_validation_end", "on_train_end")
    asking = Calls(**{hook: ask(hook) for hook in hooks})
    fitting = trainer(asking, limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=0)
    fitting.fit(Validated(), batches(), batches(1))
    assert found["on_train_batch_start"] == [False] * 4
    assert found["on_train_batch_end"] == [False, True, False, True]
    assert found["on_validation_end"] == [False] * 2


class Validated(Tuner):
    """Logs a held-out loss that a test sets."""

    def __init__(self, *losses: float, name: str = "loss/held_out") -> None:
        super().__init__()
        self.losses, self.name = list(losses), name

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log(self.name, self.losses.pop(0) if self.losses else 2.0)


def strengths_of(module: Validated, **options: Any) -> list[float]:
    found: list[float] = []
    note = Calls(on_train_batch_end=lambda t, *_: found.append(float(t.callback_metrics[STRENGTH])))
    penalty = DensityPenalty(0.5, **{"budget": 0.01, "reference": {0: 2.0}, **options})
    fitting = trainer(penalty, note, limit_val_batches=1, val_check_interval=1)
    fitting.fit(module, batches(), batches(1))
    assert "density/budget_spent" in fitting.callback_metrics
    return found


def test_the_strength_follows_the_held_out_loss() -> None:
    # the first is of the sanity check, which does not count
    found = strengths_of(Validated(9.0, 2.0, 2.01, 2.2))
    assert found[0] == 0.5
    assert found[1] == pytest.approx(0.5 * math.exp(0.5))  # nothing of the budget is spent
    assert found[2] == pytest.approx(found[1])  # half of it, and all by the next at this trend
    assert found[3] == pytest.approx(found[2] / 2)  # far above the budget
    own = strengths_of(Validated(9.0, 2.0, 2.01, 2.2, name="val_loss"), monitor="val_loss")
    assert own == found


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (Tuner, {}, "this fit has no validation, so the strength has nothing to follow"),
        (Validated, {"limit_val_batches": 0}, "this fit has no validation"),
        (Validated, {"val_data": []}, "this fit has no validation"),
        (Validated, {"max_steps": 3}, "first validation after 4 batches, and ends after 3 steps"),
        (
            Validated,
            {"check_val_every_n_epoch": 3, "max_epochs": 2},
            "first validation in epoch 3, and ends after 2",
        ),
        (
            Validated,
            {"check_val_every_n_epoch": 3, "max_epochs": -1, "max_steps": 11},
            "first validation after 12 batches, and ends after 11 steps",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_a_fit_without_validation_is_told_at_its_start(
    module: type[Tuner], settings: dict[str, Any], message: str
) -> None:
    options = {"limit_val_batches": 1, **settings}
    val_data = options.pop("val_data", None if module is Tuner else batches(1))
    steps: list[int] = []
    counting = Calls(on_train_batch_start=lambda t, *_: steps.append(t.global_step))
    fitting = trainer(DensityPenalty(0.5, **BUDGET), counting, **options)
    with pytest.raises(TrainerSetupError, match=message):
        fitting.fit(module(), batches(), val_data)
    assert not steps


def test_a_strength_of_0_needs_no_validation_and_no_reference(tmp_path: Path) -> None:
    fit(Tuner(), DensityPenalty(0.0, budget=0.01, reference=str(tmp_path / "nowhere")))


def test_a_validation_without_the_loss_is_told_what_it_logs() -> None:
    with pytest.raises(TrainerSetupError, match=r"logged no loss/held_out, but .*val_loss"):
        strengths_of(Validated(name="val_loss"))


def test_a_reference_that_cannot_be_read_stops_the_fit_before_anything_runs(tmp_path: Path) -> None:
    penalty = DensityPenalty(0.5, budget=0.01, reference=str(tmp_path / "nowhere"))
    with pytest.raises(InvalidInputError, match="reference: found no file at"):
        fit(Tuner(), penalty)


def test_what_a_plain_fit_logs_is_a_reference_by_global_step(tmp_path: Path) -> None:
    steps: list[int] = []
    note = Calls(
        on_validation_end=lambda t, *_: None if t.sanity_checking else steps.append(t.global_step)
    )
    fitting = trainer(
        DensityPenalty(0.0), note, logger=CSVLogger(tmp_path, name="logs"), max_epochs=2,
        limit_val_batches=1, val_check_interval=2, log_every_n_steps=1,
    )  # fmt: skip
    fitting.fit(Validated(9.0, 2.5, 2.25, 2.125), batches(), Batches(*batches(1)))
    assert steps == [2, 4, 6, 8]
    assert read_losses(tmp_path) == {2: 2.5, 4: 2.25, 6: 2.125, 8: 2.0}
