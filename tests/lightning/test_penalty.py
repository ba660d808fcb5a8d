from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from softtrace import DensityLoss, DensityOptions, DensityTerm
from softtrace.lightning import DensityPenalty
from tests.support.fitting import (
    Batch,
    Batches,
    Calls,
    OnlyBatch,
    Tuner,
    batches,
    fit,
    forget_warnings,
    weights,
)
from tests.support.waiting import no_collector

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])  # without and with dropout
LOGGED = {
    "loss/task",
    "loss/density",
    "density/soft_size",
    "density/distortion",
    "density/easy_share",
    "density/exit_distance",
}


def assert_equal_states(one: Any, other: Any) -> None:
    """Nested dicts and lists with tensors, bit by bit."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_states(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal_states(left, right)
    else:
        assert one == other


# --- what is trained


@pytest.mark.thorough
@FAMILIES
def test_strength_0_is_inert(family: str) -> None:
    plain, silent, loud = Tuner(family), Tuner(family), Tuner(family)
    wrapped: list[bool] = []
    watch = Calls(
        on_train_batch_start=lambda _, module, *__: wrapped.append("training_step" in vars(module))
    )
    without = fit(plain, max_epochs=2)
    after = torch.get_rng_state()
    penalised = fit(silent, DensityPenalty(0.0), watch, max_epochs=2)
    assert without.global_step == penalised.global_step == 8
    assert not any(wrapped)
    assert torch.equal(weights(silent), weights(plain))
    assert_equal_states(without.optimizers[0].state_dict(), penalised.optimizers[0].state_dict())
    assert not LOGGED & set(penalised.callback_metrics)

    wrapped.clear()
    fit(loud, DensityPenalty(0.75), watch, max_epochs=2)
    assert all(wrapped)
    assert not torch.equal(weights(loud), weights(plain))
    # The draws of the penalty are its own: dropout and shuffling stay those of the plain run.
    assert torch.equal(torch.get_rng_state(), after)


def by_hand(
    module: Tuner,
    data: Batches,
    *,
    epochs: int,
    accumulate: int = 1,
    clip: float | None = None,
    skip: tuple[int, ...] = (),
    **options: Any,
) -> None:
    """The loop that a user without Lightning writes, with the plain-loop integration."""
    torch.manual_seed(0)
    density = DensityLoss(module.model, DensityOptions(**options))
    optimizer = module.configure_optimizers()
    step = 0
    for _ in range(epochs):
        for number, batch in enumerate(data):
            micro_step = number % accumulate
            with density.watching():  # before the term, as a training step does
                task = module.model(**batch).loss
            if micro_step == 0:
                optimizer.zero_grad()
            if number not in skip:
                term = density(**batch, step=step, micro_step=micro_step).loss
                ((task + term) / accumulate).backward()
            if micro_step == accumulate - 1 or number == len(data) - 1:
                if clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                step += 1


@pytest.mark.thorough
@FAMILIES
@pytest.mark.parametrize(
    ("accumulate", "clip"), [(1, None), (2, None), (1, 0.05), (3, 0.05)], ids=str
)
def test_equals_the_plain_loop_bit_by_bit(family: str, accumulate: int, clip: float | None) -> None:
    # Five batches: the last group of an epoch is smaller than the others.
    data, options = batches(5), {"strength": 0.6, "warmup_steps": 3, "masks": "soft", "crop": 9}
    expected, module, plain = Tuner(family), Tuner(family), Tuner(family)
    by_hand(expected, data, epochs=2, accumulate=accumulate, clip=clip, **options)
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    fit(module, DensityPenalty(**options), data=data, max_epochs=2, **settings)
    assert torch.equal(weights(module), weights(expected))
    fit(plain, data=data, max_epochs=2, **settings)
    assert not torch.equal(weights(plain), weights(expected))


def test_every_accumulated_batch_has_draws_of_its_own() -> None:
    drawn: list[tuple[int, int]] = []

    class Noting(DensityLoss):
        def __call__(self, *args: Any, **kwargs: Any) -> DensityTerm:
            drawn.append((kwargs["step"], kwargs["micro_step"]))
            return super().__call__(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softtrace.lightning.penalty.DensityLoss", Noting)
        fit(Tuner(), DensityPenalty(), data=batches(5), max_epochs=2, accumulate_grad_batches=2)
    assert drawn == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1), (5, 0)]


class ReturnsDict(Tuner):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return {"note": batch_idx, "loss": super().training_step(batch, batch_idx)}


class SkipsSecond(Tuner):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


def test_dict_keeps_its_other_entries_and_gets_the_whole_loss() -> None:
    module, expected = ReturnsDict(), Tuner()
    outputs: list[dict[str, Any]] = []
    metrics: list[dict[str, Tensor]] = []

    def note(trainer: Any, module: Any, output: dict[str, Any], *_: Any) -> None:
        outputs.append(output)
        metrics.append(dict(trainer.callback_metrics))

    fit(module, DensityPenalty(), Calls(on_train_batch_end=note))
    by_hand(expected, batches(), epochs=1)
    assert torch.equal(weights(module), weights(expected))
    assert [output["note"] for output in outputs] == [0, 1, 2, 3]
    for output, logged in zip(outputs, metrics, strict=True):
        assert output["loss"] == logged["loss/task"] + logged["loss/density"]


def test_skipped_batch_skips_the_term_too() -> None:
    module, expected = SkipsSecond("gpt2"), Tuner("gpt2")
    forget_warnings()
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(module, DensityPenalty(), max_epochs=2)
    by_hand(expected, batches(), epochs=2, skip=(1,))
    assert torch.equal(weights(module), weights(expected))


class KeywordDefaults(Tuner):
    def training_step(self, batch: Batch, batch_idx: int = 0, scale: float = 1.0) -> Any:
        return scale * self.model(**batch).loss


def decorated(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    return inner


class DecoratedOnlyBatch(Tuner):
    @decorated
    def training_step(self, batch: Batch) -> Any:
        return self.model(**batch).loss


class Decorated(Tuner):
    @decorated
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.model(**batch).loss * (batch_idx >= 0)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [Tuner, OnlyBatch, KeywordDefaults, Decorated, DecoratedOnlyBatch])
def test_training_step_may_be_declared_in_every_way_that_lightning_takes(kind: type[Tuner]) -> None:
    module, expected = kind(), Tuner()
    fit(module, DensityPenalty())
    by_hand(expected, batches(), epochs=1)
    assert torch.equal(weights(module), weights(expected))


def test_batch_idx_arrives() -> None:
    arrived: list[int] = []

    class Notes(Tuner):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            arrived.append(batch_idx)
            return self.model(**batch).loss

    fit(Notes(), DensityPenalty(), max_epochs=2)
    assert arrived == [0, 1, 2, 3, 0, 1, 2, 3]


def test_batch_may_be_passed_as_a_keyword() -> None:
    def call_by_name(_: Any, module: Any) -> None:
        step = module.training_step
        module.training_step = lambda batch, batch_idx: step(batch_idx=batch_idx, batch=batch)

    module, expected = Tuner(), Tuner()
    fit(module, DensityPenalty(), Calls(on_train_start=call_by_name))
    by_hand(expected, batches(), epochs=1)
    assert torch.equal(weights(module), weights(expected))


def test_other_batches_need_one_method() -> None:
    class Pairs(Tuner):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            return self.model(batch[0], labels=batch[1]).loss

    class PairPenalty(DensityPenalty):
        def inputs_of(self, batch: Any) -> dict[str, Any]:
            return {"input_ids": batch[0], "labels": batch[1]}

    named = [{name: batch[name] for name in ("input_ids", "labels")} for batch in batches()]
    module, expected = Pairs(), Tuner()
    fit(module, PairPenalty(), data=Batches(*(tuple(batch.values()) for batch in named)))
    by_hand(expected, Batches(*named), epochs=1)
    assert torch.equal(weights(module), weights(expected))


def test_fitting_twice_works() -> None:
    module, expected = Tuner(), Tuner()
    penalty = DensityPenalty()
    for _ in range(2):
        fit(module, penalty)
        by_hand(expected, batches(), epochs=1)
        assert torch.equal(weights(module), weights(expected))


def test_start_step_delays_the_term_and_warm_up_raises_it() -> None:
    terms: list[float] = []
    weights_at: dict[int, Tensor] = {}
    plain_at: dict[int, Tensor] = {}

    def note(into: dict[int, Tensor]) -> Calls:
        return Calls(
            on_train_batch_end=lambda trainer, module, *_: into.update(
                {trainer.global_step: weights(module).clone()}
            )
        )

    def divide(trainer: Any, *_: Any) -> None:
        term, distortion = (
            float(trainer.callback_metrics[name]) for name in ("loss/density", "density/distortion")
        )
        assert math.isnan(distortion) == (len(terms) < 3)  # nothing ran
        terms.append(0.0 if math.isnan(distortion) else term / distortion)

    ratio = Calls(on_train_batch_end=divide)
    late = DensityPenalty(strength=0.8, start_step=3, warmup_steps=1, exits=0.0)
    fit(Tuner(), late, note(weights_at), ratio, max_epochs=2)
    fit(Tuner(), note(plain_at), max_epochs=2)
    assert terms == pytest.approx([0, 0, 0, 0.4, 0.8, 0.8, 0.8, 0.8])
    assert [torch.equal(weights_at[step], plain_at[step]) for step in range(1, 9)] == (
        [True] * 3 + [False] * 5
    )


# --- what is logged


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_values_are_those_of_the_term(accumulate: int) -> None:
    options = {"strength": 0.6, "size_weight": 0.5, "family": "sparse", "exits": 0.3}
    options["exit_map"] = False  # a new DensityLoss has not learned what the fit's has
    expected: list[dict[str, float]] = []
    backpropagated: list[float] = []
    logged: list[dict[str, float]] = []

    def compute(trainer: Any, module: Any, batch: Batch, number: int) -> None:
        model = copy.deepcopy(module.model)
        step = {"step": trainer.global_step, "micro_step": number % accumulate}
        density = DensityLoss(model, **options)
        with torch.enable_grad():
            with density.watching():
                task = model(**batch).loss.detach()
            term = density(**batch, **step)
        expected.append(
            {
                "loss/task": float(task),
                "loss/density": float(term.loss.detach()),
                "density/soft_size": float(term.soft_size),
                "density/distortion": float(term.distortion),
                "density/easy_share": float(term.easy_share),
                "density/exit_distance": float(term.exit_distance),
            }
        )

    watch = Calls(
        on_train_batch_start=compute,
        on_before_backward=lambda _, __, loss: backpropagated.append(float(loss.detach())),
        on_train_batch_end=lambda trainer, *_: logged.append(
            {name: float(value) for name, value in trainer.callback_metrics.items()}
        ),
    )
    fit(Tuner(), DensityPenalty(**options), watch, accumulate_grad_batches=accumulate)
    assert len(logged) == 4
    for found, wanted, loss in zip(logged, expected, backpropagated, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)
        assert found["loss/task"] + found["loss/density"] == pytest.approx(loss * accumulate)
        mix = found["density/distortion"] + 0.5 * found["density/soft_size"]
        mix += 0.3 * found["density/exit_distance"]
        assert found["loss/density"] == pytest.approx(0.6 * mix)
        assert 0 < found["density/soft_size"] < 1


def test_loggers_get_every_step(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Tuner(), DensityPenalty(), logger=logger, log_every_n_steps=1)
    header, *rows = (tmp_path / "metrics.csv").read_text().split()
    assert set(header.split(",")) == LOGGED | {"epoch", "step"}
    assert len(rows) == 4
    assert all(value for row in rows for value in row.split(","))


def test_between_masked_runs_the_last_one_is_logged() -> None:
    added: list[float] = []
    seen: list[dict[str, float]] = []

    class Noting(DensityPenalty):
        def _log(self, pl_module: Any, task: Tensor, term: DensityTerm) -> None:
            added.append(term.loss.item())
            super()._log(pl_module, task, term)

    look = Calls(
        on_train_batch_end=lambda trainer, *_: seen.append(
            {name: float(value) for name, value in trainer.callback_metrics.items()}
        )
    )
    fit(Tuner(), Noting(every=3, share=1.0), look, max_epochs=2)
    assert len(added) == len(seen) == 8
    for step, values in enumerate(seen):
        assert values["density/soft_size"] == seen[step - step % 3]["density/soft_size"] > 0
        assert values["density/distortion"] == seen[step - step % 3]["density/distortion"] > 0
        few = added[max(0, step - 2) : step + 1]
        assert values["loss/density"] == pytest.approx(sum(few) / len(few))
        assert added[step] > 0  # exits, where nothing runs masked
    assert seen[3]["density/distortion"] != seen[0]["density/distortion"]
    assert all(added[due] > 3 * added[due + 1] for due in (0, 3, 6))


def test_nothing_of_a_step_outlives_it() -> None:
    terms: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Noting(DensityPenalty):
        def _log(self, pl_module: Any, task: Tensor, term: DensityTerm) -> None:
            terms.append(weakref.ref(term.loss))
            super()._log(pl_module, task, term)

    look = Calls(on_train_batch_end=lambda *_: alive.append(terms[-1]() is not None))
    with no_collector():
        fit(Tuner(), Noting(masks="soft"), look)
    assert alive == [False] * 4
