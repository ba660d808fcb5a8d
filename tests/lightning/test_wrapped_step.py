"""The wrapped training step by itself: what it holds on to, and that it lets go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softtrace import DensityLoss
from softtrace.errors import TrainerSetupError
from softtrace.lightning.wrapped_step import WrappedStep
from softtrace.loss.inputs import batch_inputs
from softtrace.loss.integration import ExpectedGradient
from tests.support.fitting import Tuner, batches


def wrapped(module: Tuner) -> WrappedStep:
    """The step of the module, wrapped as in the first batch of a fit."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=1))
    epoch = SimpleNamespace(batch_progress=progress)
    trainer: Any = SimpleNamespace(
        global_step=0, accumulate_grad_batches=1, fit_loop=SimpleNamespace(epoch_loop=epoch)
    )
    return WrappedStep(trainer, module, DensityLoss(module.model), batch_inputs, lambda *_: None)


def test_restoring_twice_leaves_the_step_of_the_next_one_alone() -> None:
    module = Tuner()
    first = wrapped(module)
    first.restore()
    assert "training_step" not in vars(module)
    second = wrapped(module)
    own = module.training_step
    first.restore()
    assert module.training_step is own
    second.restore()
    assert "training_step" not in vars(module)


def test_a_wrapper_that_others_hold_adds_nothing_once_it_was_put_back() -> None:
    module, (batch, *_) = Tuner(), batches().batches
    task = module.training_step(batch, 0)
    step = wrapped(module)
    held: Any = module.training_step
    assert held(batch, 0) > task
    step.restore()
    assert torch.equal(held(batch, 0), task)
    step.check_used()


def test_every_term_of_a_backward_has_to_be_used() -> None:
    module, (batch, *_) = Tuner(), batches().batches
    step = wrapped(module)
    used, dropped = (module.training_step(batch, 0) for _ in range(2))
    used.backward()
    with pytest.raises(TrainerSetupError, match=r"step 0: .* no gradient reached"):
        step.check_used()
    step.check_used()  # said once
    del dropped
    module.training_step(batch, 0).backward()
    step.check_used()
    module.training_step(batch, 0)
    step.forget_terms()
    step.check_used()
    step.restore()


def test_a_gradient_of_zero_has_not_arrived() -> None:
    loss = torch.ones((), requires_grad=True) * 2
    expected = ExpectedGradient(loss)
    (0 * loss).backward(retain_graph=True)
    assert not expected.arrived
    loss.backward()
    assert expected.arrived
