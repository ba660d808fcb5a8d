"""Batches, weights and options at the edge of what the penalty takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from softtrace import DensityLoss, DensityOptions
from softtrace.errors import InvalidInputError, NonFiniteError
from softtrace.lightning import DensityPenalty
from tests.support.fitting import Batch, Batches, Calls, Tuner, batches, fit, weights


class Deaf(Tuner):
    """Its loss takes any batch, also of NaN weights: what goes wrong is the penalty's affair."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.scale - 2) ** 2


def logged(module: Tuner, *args: Any, **options: Any) -> list[dict[str, float]]:
    """What every step logged."""
    steps: list[dict[str, float]] = []
    note = Calls(
        on_train_batch_end=lambda trainer, *_: steps.append(
            {name: float(value) for name, value in trainer.callback_metrics.items()}
        )
    )
    fit(module, *args, note, **options)
    return steps


def changed(number: int, **changes: Any) -> Batches:
    """The usual batches, one of them changed; None takes an entry away."""
    made = batches().batches
    both = {**made[number], **changes}
    made = list(made)
    made[number] = {name: value for name, value in both.items() if value is not None}
    return Batches(*made)


# --- batches


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"ids": torch.ones(2, 4), 7: torch.ones(2)}, r"a mapping with keys \['7', 'ids'\]"),
        (torch.ones(2, 4, dtype=torch.int64), "a Tensor"),
        ((torch.ones(2, 4), torch.ones(2, 4)), "a (tuple|list)"),
    ],
    ids=["mapping", "tensor", "pair"],
)
def test_batches_without_input_ids_are_refused(batch: Any, found: str) -> None:
    module = Deaf()
    message = f"batch: found {found}, expected a mapping with 'input_ids'.*inputs_of"
    with pytest.raises(InvalidInputError, match=message):
        fit(module, DensityPenalty(), data=Batches(batch))
    assert "training_step" not in vars(module)
    fit(module, DensityPenalty(0.0), data=Batches(batch))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.full((4, 12), 67)}, "ids from 67 to 67, allowed are 0 to 66"),
        ({"input_ids": torch.full((4, 12), -1)}, "ids from -1 to -1, allowed are 0 to 66"),
        ({"input_ids": torch.ones(4, 12)}, "input_ids: found torch.float32, expected int64"),
        ({"input_ids": torch.ones(12, dtype=torch.int64)}, r"input_ids: found \(12,\)"),
        ({"attention_mask": torch.full((4, 12), 2)}, "values other than 0 and 1"),
        ({"attention_mask": torch.ones(4, 11)}, r"attention_mask: found shape \(4, 11\)"),
        ({"labels": torch.ones(4, 11)}, r"labels: found shape \(4, 11\)"),
    ],
)
def test_malformed_batches_are_refused(changes: dict[str, Tensor], message: str) -> None:
    module = Deaf()
    with pytest.raises(InvalidInputError, match=message):
        fit(module, DensityPenalty(), data=changed(1, **changes))
    assert "training_step" not in vars(module)


def test_mask_and_labels_may_be_missing() -> None:
    def penalty() -> DensityPenalty:
        return DensityPenalty(exits=0.0)  # which are NaN here: nobody runs the model

    full = {"attention_mask": torch.ones(4, 12, dtype=torch.int64)}
    with_mask = logged(Deaf(), penalty(), data=changed(0, **full, labels=None))
    without = logged(Deaf(), penalty(), data=changed(0, attention_mask=None, labels=None))
    assert with_mask == without
    assert without[0]["loss/density"] > 0
    # Labels decide which tokens count.
    labels = batches().batches[0]["input_ids"].clone()
    labels[:, :6] = -100
    assert logged(Deaf(), penalty(), data=changed(0, **full, labels=labels))[0] != without[0]


def test_batch_without_a_label_has_no_term_and_the_fit_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(DensityLoss, "finish", lambda density: ended.append(density))

    class FromIds(Tuner):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    module = FromIds()
    nothing = changed(1, labels=torch.full((4, 12), -100))
    steps = logged(module, DensityPenalty(), data=nothing)
    assert [step["loss/density"] > 0 for step in steps] == [True, False, True, True]
    shares = [value for name, value in steps[1].items() if name.startswith("density/")]
    assert len(shares) == 4
    assert all(map(math.isnan, shares))
    assert steps[1]["loss/task"] > 0
    assert torch.isfinite(weights(module)).all()
    assert len(ended) == 1  # what there is to say of the last step


def test_row_of_padding_is_left_out() -> None:
    (batch, *_) = batches()
    rows = {name: value[:3] for name, value in batch.items()}
    padding = {
        "input_ids": torch.zeros(1, 12, dtype=torch.int64),
        "attention_mask": torch.zeros(1, 12, dtype=torch.int64),
        "labels": torch.full((1, 12), -100),
    }
    padded = {name: torch.cat([rows[name], padding[name]]) for name in rows}
    results = []
    for data in (rows, padded):
        module = Tuner()
        steps = logged(module, DensityPenalty(share=1.0), data=Batches(data))
        results.append((steps[0], weights(module)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert torch.allclose(results[1][1], results[0][1], atol=1e-4)
    assert torch.isfinite(results[1][1]).all()


# --- training steps that Lightning refuses


@pytest.mark.parametrize(
    ("output", "message"),
    [({"total": torch.ones(())}, "'loss' key needs to be present"), (1.5, "must return a Tensor")],
    ids=["dict without loss", "float"],
)
def test_outputs_that_lightning_refuses_get_its_own_message(output: Any, message: str) -> None:
    class Wrong(Tuner):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return output

    for penalty in (DensityPenalty(0.0), DensityPenalty()):
        with pytest.raises(MisconfigurationException, match=message):
            fit(Wrong(), penalty)


# --- weights that are not finite


def spoil(number: int) -> Calls:
    """Break the model before a batch and mend it after it."""
    weight: list[Tensor] = []

    def before(_: Any, module: Any, __: Any, batch_idx: int) -> None:
        if batch_idx == number:
            weight.append(module.model.lm_head.weight.data.clone())
            module.model.lm_head.weight.data[5, 3] = float("nan")

    def after(_: Any, module: Any, *__: Any) -> None:
        if weight:
            module.model.lm_head.weight.data = weight.pop()

    return Calls(on_train_batch_start=before, on_train_batch_end=after)


def test_non_finite_logits_raise_and_name_the_step() -> None:
    module = Deaf()
    with pytest.raises(NonFiniteError, match=r"step 2: logits of the full model: .* NaN"):
        fit(module, DensityPenalty(), spoil(2))
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert module.model.config._attn_implementation != "softtrace"
    assert all(m.training for m in module.modules())


def test_non_finite_logits_can_be_skipped(caplog: pytest.LogCaptureFixture) -> None:
    module = Deaf()
    steps = logged(module, DensityPenalty(on_nonfinite="skip"), spoil(2))
    assert [step["loss/density"] > 0 for step in steps] == [True, True, False, True]
    assert [math.isnan(step["density/distortion"]) for step in steps] == [False, False, True, False]
    assert "step 2: logits of the full model" in caplog.text
    assert torch.isfinite(weights(module)).all()


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -0.1}, "strength: found -0.1, allowed "),
        ({"strength": float("nan")}, "strength: found nan"),
        ({"strength": float("inf")}, "strength: found inf"),
        ({"start_step": -1}, "start_step: found -1"),
        ({"warmup_steps": 0.5}, "warmup_steps: found 0.5"),
        ({"masks": "hard"}, "masks: found 'hard', allowed are 'straight', 'soft'"),
        ({"temperature": 0}, "temperature: found 0"),
        ({"family": "deep"}, "family: found 'deep'"),
        ({"thresholds": (0.3, 0.1)}, "thresholds: found .* low <= high"),
        ({"thresholds": (0.0, 0.1)}, "thresholds: found 0.0"),
        ({"thresholds": (0.1, 1.0)}, "thresholds: found 1.0"),
        ({"depths": (0.5, 1.5)}, "depths: found 1.5"),
        ({"attention": "mine"}, "attention: found 'mine'"),
        ({"distance": "js"}, "distance: found 'js'"),
        ({"easiness": "length"}, "easiness: found 'length', allowed are 'entropy'"),
        ({"easy_quantile": 0}, "easy_quantile: found 0"),
        ({"easy_width": -1}, "easy_width: found -1"),
        ({"share": 1.5}, "share: found 1.5"),
        ({"crop": 0}, "crop: found 0"),
        ({"size_weight": -1}, "size_weight: found -1"),
        ({"size_weight": 1.0, "family": "shallow"}, "size_weight: the family 'shallow'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite: found 'ignore'"),
        ({"seed": 0.5}, "seed: found 0.5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        DensityPenalty(**options)


def test_unknown_options_are_refused() -> None:
    message = r"^DensityPenalty: found 'strenght' \(did you mean 'strength'\?\), allowed are "
    with pytest.raises(InvalidInputError, match=message):
        DensityPenalty(strenght=1.0)


def test_defaults_are_those_of_the_plain_loop_door() -> None:
    assert DensityPenalty().options == DensityOptions()


def test_easiness_may_be_a_function() -> None:
    def by_position(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.arange(logits.shape[1], dtype=logits.dtype).expand(targets.shape)

    by_name = logged(Tuner(), DensityPenalty())
    by_function = logged(Tuner(), DensityPenalty(easiness=by_position))
    assert by_function[0]["loss/density"] > 0
    assert by_function[0]["loss/density"] != by_name[0]["loss/density"]
