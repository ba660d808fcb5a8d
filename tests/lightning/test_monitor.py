"""The callback that only measures: what it says, and that nothing notices it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from softtrace.errors import (
    InvalidInputError,
    NonFiniteError,
    TrainerSetupError,
    UnsupportedModelError,
)
from softtrace.lightning import DensityMonitor, DensityPenalty
from softtrace.metrics.functional import computation_density, early_exit_agreement
from softtrace.metrics.readings import readings
from tests.support.fitting import Batch, Batches, Calls, Tuner, batches, trainer, weights
from tests.support.tiny import tiny_model, tiny_prompt

BLOCKS = tiny_prompt(12, seed=9, batch=5)
NAMES = {f"{name}_{group}" for name in ("area", "size", "exit_agreement")
         for group in ("all", "easy", "hard")}  # fmt: skip
NAMES |= {"entropy_spearman_area", "entropy_spearman_size"}


class Validated(Tuner):
    """Its dropout draws in training; validation looks at whatever it is given."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.model(**batch).loss
        self.log("loss/held_out", loss, batch_size=len(batch["input_ids"]))


def run(module: Tuner, *callbacks: Callback, checkpoint: Any = None, **options: Any) -> Any:
    """Four steps, validated on two batches at every second."""
    torch.manual_seed(0)
    defaults = {"limit_val_batches": 1.0, "val_check_interval": 2, "num_sanity_val_steps": 1}
    fitting = trainer(*callbacks, **{**defaults, **options})
    validation = Batches(*batches(6).batches[4:])
    fitting.fit(module, batches(), validation, ckpt_path=checkpoint, weights_only=True)
    return fitting


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 has dropout
@pytest.mark.parametrize("strength", [None, 0.6])
def test_weights_are_those_of_a_run_without_it(family: str, strength: float | None) -> None:
    found = []
    for monitors in ([], [DensityMonitor()], [DensityMonitor(BLOCKS)]):
        penalty = [] if strength is None else [DensityPenalty(strength, share=0.5, crop=6)]
        module = Validated(family)
        run(module, *penalty, *monitors)
        found.append((weights(module), torch.get_rng_state()))
        assert all(len(monitor.history) == 2 for monitor in monitors)
        assert all(part.training for part in module.model.modules())
    for other, state in found[1:]:
        assert torch.equal(other, found[0][0])
        assert torch.equal(state, found[0][1])


def test_flags_and_gradients_are_as_before_a_measurement() -> None:
    seen: list[Any] = []

    def note(module: Any) -> None:
        flags = [part.training for part in module.modules()]
        gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        seen.append((flags, gradients, torch.get_rng_state(), torch.is_grad_enabled()))

    module = Validated("gpt2")
    run(
        module,
        Calls(on_validation_epoch_end=lambda t, m: note(m)),
        DensityMonitor(BLOCKS),
        Calls(on_validation_epoch_end=lambda t, m: note(m)),
    )
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        assert before[0] == after[0]
        assert torch.equal(before[2], after[2])
        assert before[3] == after[3]
        for one, other in zip(before[1], after[1], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def by_hand(model: nn.Module, rows: list[tuple[Tensor, Tensor | None]]) -> dict[str, float]:
    """The same numbers, every row by itself."""
    entropy, area, size, agreed = [], [], [], []
    for ids, mask in rows:
        read = readings(model, ids, mask, attention="recomputed")
        real = read["positions"][0].nonzero().flatten()
        late = real[len(real) // 2 :]
        entropy.append(read["curve"].entropy[0, late])
        area.append(read["curve"].area()[0, late])
        size.append(read["curve"].size_at(0.2)[0, late])
        agreed.append(read["exits"][:, 0, late])
    whole = torch.cat(entropy)
    density = computation_density(whole, torch.cat(area), torch.cat(size))
    exits = early_exit_agreement(whole, torch.cat(agreed, 1).T)
    return {
        "tokens": len(whole),
        **{name: float(value) for name, value in density.items()},
        **{f"exit_agreement_{name}": float(value[0]) for name, value in exits.items()},
    }


def test_history_is_what_the_metrics_say_by_hand() -> None:
    monitor = DensityMonitor(BLOCKS, batch_size=2)
    module = Validated()
    run(module, monitor)
    wanted = by_hand(module.model, [(row[None], None) for row in BLOCKS])
    found = monitor.history[-1]
    assert found.keys() == NAMES | {"step", "tokens"}
    assert [each["step"] for each in monitor.history] == [2, 4]
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert found["area_easy"] != monitor.history[0]["area_easy"]


class LoggedLate(Tuner):
    """Logs its held-out loss at the very end of a validation, when callbacks were asked already."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.loss = self.model(**batch).loss

    def on_validation_epoch_end(self) -> None:
        self.log("loss/held_out", self.loss)


@pytest.mark.parametrize("first", [True, False], ids=["penalty first", "monitor first"])
@pytest.mark.parametrize(("module", "known"), [(Validated, True), (LoggedLate, False)])
def test_the_loss_is_held_against_a_budget(module: Any, known: bool, first: bool) -> None:
    losses: list[float] = []

    def note(fitting: Any, *_: Any) -> None:
        if not fitting.sanity_checking:
            losses.append(float(fitting.callback_metrics["loss/held_out"]))

    penalty = DensityPenalty(0.5, share=0.5, crop=6, budget=0.01, reference={2: 2.0, 4: 4.0})
    monitor = DensityMonitor(BLOCKS)
    order = [penalty, monitor] if first else [monitor, penalty]
    fitting = run(module(), *order, Calls(on_validation_end=note))
    found = [each.get("loss_over_reference") for each in monitor.history]
    wanted = [losses[0] / 2 - 1, losses[1] / 4 - 1]
    assert found == (pytest.approx(wanted, abs=1e-6) if known else [None, None])
    assert ("density/loss_over_reference" in fitting.callback_metrics) == known
    assert penalty.budget is not None
    assert penalty.budget.spent == pytest.approx(wanted[1] / 0.01, abs=1e-3)


@pytest.mark.thorough
def test_without_blocks_the_first_rows_of_validation_are_kept() -> None:
    monitor = DensityMonitor(max_rows=6)
    module = Validated()
    run(module, monitor)
    first, second = batches(6).batches[4:]
    rows = [(first["input_ids"][i : i + 1], first["attention_mask"][i : i + 1]) for i in range(4)]
    rows += [(second["input_ids"][i : i + 1], second["attention_mask"][i : i + 1]) for i in (0, 1)]
    found, wanted = monitor.history[-1], by_hand(module.model, rows)
    assert wanted["tokens"] < 6 * 6  # two rows are padded
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_min_context_counts_real_tokens() -> None:
    monitor = DensityMonitor(BLOCKS, min_context=9)
    run(Validated(), monitor)
    assert monitor.history[0]["tokens"] == 5 * 3


def test_curves_reach_the_logger_and_checkpoints_can_go_by_them(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="density/size_easy")
    monitor, logger = DensityMonitor(BLOCKS), CSVLogger(tmp_path)
    fitted = run(
        Validated(), monitor, best, logger=logger, enable_checkpointing=True, log_every_n_steps=1
    )
    logger.finalize("success")
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("density/size_easy")]
    assert len(rows) == 2
    for name in NAMES:
        values = [float(row[f"density/{name}"]) for row in rows]
        assert values == pytest.approx([each[name] for each in monitor.history], nan_ok=True)
        assert float(fitted.callback_metrics[f"density/{name}"]) == pytest.approx(values[-1])
    assert best.best_model_score is not None
    smallest = min(each["size_easy"] for each in monitor.history)
    assert float(best.best_model_score) == pytest.approx(smallest)


@pytest.mark.thorough
@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [1, 3]), (9, [1])])
def test_every_keeps_measurements_apart(every: int, steps: list[int]) -> None:
    monitor = DensityMonitor(BLOCKS, every=every)
    run(Validated(), monitor, val_check_interval=1)
    assert [each["step"] for each in monitor.history] == steps


@pytest.mark.thorough
def test_a_resumed_fit_goes_on_with_the_history(tmp_path: Path) -> None:
    whole = DensityMonitor(every=3)
    run(Validated(), whole, val_check_interval=1, max_epochs=2)
    saved = tmp_path / "middle.ckpt"

    def save(fitting: Any, *_: Any) -> None:
        if fitting.global_step == 4:
            fitting.save_checkpoint(saved)

    run(Validated(), DensityMonitor(every=3), Calls(on_train_epoch_end=save), val_check_interval=1)
    again = DensityMonitor(every=3)
    run(Validated(), again, val_check_interval=1, max_epochs=2, checkpoint=saved)
    assert [each["step"] for each in whole.history] == [1, 4, 7]
    assert again.history == whole.history
    with pytest.raises(TrainerSetupError, match="found DensityMonitor version 0"):
        again.load_state_dict({"version": 0, "history": []})


def test_a_second_fit_from_the_start_measures_anew() -> None:
    monitor = DensityMonitor(BLOCKS, every=3)
    for _ in range(2):
        run(Validated(), monitor)
    assert [each["step"] for each in monitor.history] == [2, 2]


@pytest.mark.thorough
@pytest.mark.parametrize("options", [
    {"fast_dev_run": 2},
    {"precision": "bf16-mixed"},
    {"precision": "64-true"},
    {"precision": "bf16-true"},
], ids=str)  # fmt: skip
def test_measures_under_other_ways_to_fit(options: dict[str, Any]) -> None:
    monitor = DensityMonitor(BLOCKS)
    run(Validated(), DensityPenalty(0.6, share=0.5, crop=6), monitor, **options)
    assert monitor.history
    for each in monitor.history:
        assert 0 < each["area_easy"] < 1
        assert 0 < each["size_easy"] <= 1
    if "precision" in options:  # the weights are other ones than in a run in float32
        usual = DensityMonitor(BLOCKS)
        run(Validated(), DensityPenalty(0.6, share=0.5, crop=6), usual)
        assert usual.history != monitor.history
        assert usual.history[-1]["area_all"] == pytest.approx(
            monitor.history[-1]["area_all"], abs=0.1
        )


def test_measures_in_validate_alone() -> None:
    monitor, module = DensityMonitor(every=100), Validated()
    fitting = trainer(monitor, limit_val_batches=1.0)
    for _ in range(2):
        fitting.validate(module, Batches(*batches(6).batches[4:]), verbose=False)
    assert len(monitor.history) == 2
    assert monitor.history[0] == monitor.history[1]


def test_a_model_measured_first_in_validation_can_be_trained_with_the_penalty() -> None:
    """What attaching keeps must not be of inference mode, in which Lightning validates."""
    seen: list[bool] = []

    class Noting(DensityMonitor):
        def _read(self, *args: Any) -> Any:
            seen.append(torch.is_inference_mode_enabled() or torch.is_grad_enabled())
            seen.append(any(each.is_inference() for each in args[1].values() if each is not None))
            return super()._read(*args)

        def on_validation_epoch_end(self, *args: Any) -> None:
            assert torch.is_inference_mode_enabled()
            super().on_validation_epoch_end(*args)

    module = Validated()
    fitting = trainer(Noting(), limit_val_batches=1.0)
    fitting.validate(module, Batches(*batches(1).batches), verbose=False)
    assert seen == [False, False]
    run(module, DensityPenalty(0.6, share=0.5, crop=6))


class Other(Validated):
    """Rows of a dataset come as a tensor."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss/held_out", self.model(input_ids=batch, labels=batch).loss, batch_size=5)


def test_batches_of_other_shapes() -> None:
    class Own(DensityMonitor):
        def inputs_of(self, batch: Any) -> dict[str, Any]:
            return {"input_ids": batch}

    def one(monitor: DensityMonitor) -> DensityMonitor:
        loader: Any = DataLoader(list(BLOCKS), batch_size=5)
        trainer(monitor, limit_val_batches=1.0).validate(Other(), loader, verbose=False)
        return monitor

    assert one(Own()).history == one(DensityMonitor(BLOCKS)).history
    with pytest.raises(InvalidInputError, match=r"found a Tensor.*DensityMonitor\.inputs_of"):
        one(DensityMonitor())


def test_packed_rows_keep_their_documents_apart() -> None:
    ids, packed = tiny_prompt(12, seed=3), torch.tensor([[*range(7), *range(5)]])
    model = tiny_model("llama")
    found = readings(model, ids, position_ids=packed, min_context=3, attention="recomputed")
    assert found["positions"].sum() == 4 + 2
    apart = readings(model, ids[:, 7:], min_context=3, attention="recomputed")
    torch.testing.assert_close(
        found["curve"].area()[:, 7:], apart["curve"].area(), atol=1e-6, rtol=1e-5
    )


class Two(Validated):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = tiny_model("llama")


def test_what_it_cannot_work_with_is_refused() -> None:
    with pytest.raises(TrainerSetupError, match=r"holds 2 causal .*DensityMonitor needs"):
        run(Two(), DensityMonitor())
    with pytest.raises(TrainerSetupError, match="during validation, and this fit has none"):
        run(Validated(), DensityMonitor(), limit_val_batches=0)
    with pytest.raises(TrainerSetupError, match="this fit has none"):
        trainer(DensityMonitor(), limit_val_batches=1.0).fit(Tuner(), batches())

    from lightning.pytorch import strategies

    class Own(strategies.SingleDeviceStrategy):
        pass

    with pytest.raises(TrainerSetupError, match=r"found Own .*DensityMonitor\(allow_untested"):
        run(Validated(), DensityMonitor(), strategy=Own("cpu"))
    run(Validated(), DensityMonitor(allow_untested=True), strategy=Own("cpu"))


def test_errors_of_a_measurement_are_raised() -> None:
    module = Validated()
    blow = Calls(on_validation_start=lambda t, m: m.model.lm_head.weight.data.fill_(torch.nan))
    with pytest.raises((NonFiniteError, UnsupportedModelError)):
        run(module, blow, DensityMonitor(BLOCKS), num_sanity_val_steps=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: found 0, allowed are integers from 1"),
        ({"max_rows": 0}, "max_rows: found 0"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"patience": 0}, "patience: found 0, allowed are integers from 1, None"),
        ({"min_context": -1}, "min_context: found -1, allowed are integers from 0, None"),
        ({"blocks": torch.zeros(0, 4, dtype=torch.int64)}, r"blocks: found .* shape \(0, 4\)"),
        ({"blocks": torch.zeros(4)}, r"blocks: found torch.float32 of shape \(4,\)"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        DensityMonitor(**options)
