"""What goes wrong around the penalty: what it refuses, and that it leaves no trace of itself."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from softtrace.errors import (
    TrainerSetupError,
    UnsupportedModelError,
)
from softtrace.lightning import DensityPenalty
from tests.support.fitting import (
    Batch,
    Calls,
    Manual,
    TakesIterator,
    Tuner,
    batches,
    fit,
    forget_warnings,
    weights,
)
from tests.support.tiny import tiny_model

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def traces(module: Tuner) -> dict[str, Any]:
    """Everything that the penalty or its runs touch on the way."""
    modules = dict(module.named_modules())
    return {
        "own step": vars(module).get("training_step"),
        "step": module.training_step,
        "hooks": {name: sum(len(getattr(m, h)) for h in HOOKS) for name, m in modules.items()},
        "attention": [
            m.config._attn_implementation for m in modules.values() if hasattr(m, "config")
        ],
        "training": {name: m.training for name, m in modules.items()},
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
    }


class Boom(Exception):
    pass


def boom_at(step: int, error: type[BaseException] = Boom) -> Callable[..., None]:
    def function(trainer: Any, *_: Any) -> None:
        if trainer.global_step == step:
            raise error

    return function


class BoomInStep(Tuner):
    error: type[BaseException] = Boom

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 2:
            raise self.error
        return loss


class Interrupted(BoomInStep):
    error = KeyboardInterrupt


class BoomInTerm(DensityPenalty):
    """In the middle of a run of ours, while its hooks and attention are in place."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.handle = pl_module.model.lm_head.register_forward_hook(self.spoil)

    def spoil(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if not module.training:  # eval mode: our run, not the user's
            self.handle.remove()
            raise Boom


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """Lightning ignores further interrupts of the process once there was one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class Ending:
    """One way in which a fit ends.

    Args:
        error: that it raises, if any.
        module: what is fitted.
        penalty: its class.
        hook: of a callback after the penalty, and what it does.
        options: of the Trainer.
    """

    def __init__(
        self,
        error: type[BaseException] | None = None,
        module: type[Tuner] = Tuner,
        penalty: type[DensityPenalty] = DensityPenalty,
        hook: tuple[str, Callable[..., None]] | None = None,
        **options: Any,
    ) -> None:
        self.error, self.module, self.penalty = error, module, penalty
        self.hook, self.options = hook, options

    def fit(self, module: Tuner, *callbacks: Callback) -> None:
        if self.hook is not None:
            callbacks = (*callbacks, Calls(**dict([self.hook])))
        if self.error is None:
            fit(module, *callbacks, **self.options)
            return
        with pytest.raises(self.error):
            fit(module, *callbacks, **self.options)


ENDINGS = {
    "as planned": Ending(max_epochs=2),
    "fast_dev_run": Ending(fast_dev_run=True),
    "max_steps": Ending(max_steps=3, max_epochs=-1),
    "nothing to do": Ending(limit_train_batches=0),
    "error in training_step": Ending(Boom, BoomInStep),
    "interrupt": Ending(SystemExit, Interrupted),
    "error in a run of ours": Ending(Boom, penalty=BoomInTerm),
    "error of a callback at the start": Ending(Boom, hook=("on_train_start", boom_at(0))),
    "error of a callback in a batch": Ending(Boom, hook=("on_before_backward", boom_at(1))),
    "error of a callback after a batch": Ending(Boom, hook=("on_train_batch_end", boom_at(3))),
    "error of a callback at the end": Ending(Boom, hook=("on_train_end", boom_at(4))),
    "interrupt in a callback": Ending(
        SystemExit, hook=("on_train_batch_end", boom_at(2, KeyboardInterrupt))
    ),
}


@pytest.mark.thorough
@pytest.mark.usefixtures("_interrupts")
@pytest.mark.parametrize("own_step", [False, True], ids=["method", "instance attribute"])
@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_nothing_is_left_behind(ending: Ending, own_step: bool) -> None:
    def build() -> Tuner:
        module = ending.module("gpt2")
        if own_step:
            step = type(module).training_step
            module.training_step = functools.partial(step, module)  # type: ignore[method-assign]
        return module

    module, plain = build(), build()
    before = traces(module)
    ending.fit(module, ending.penalty())
    after = traces(module)
    if ending.penalty is DensityPenalty:  # what Lightning changes by itself, as train/eval flags
        ending.fit(plain)
        expected = traces(plain)
        assert after["training"] == expected["training"]
        assert after["attributes"] == expected["attributes"]
    assert after["own step"] is before["own step"]
    assert (after["own step"] is not None) == own_step
    assert after["step"] == before["step"]
    assert after["hooks"] == before["hooks"]
    assert not any(after["hooks"].values())
    assert after["attention"] == before["attention"]
    assert after["training"] == before["training"]
    # ... so that the module can be fitted again, without the penalty and with it.
    if ending.error is None:
        metrics = fit(module).callback_metrics
        assert not metrics
        assert fit(module, ending.penalty()).callback_metrics["loss/density"] > 0


def test_flags_of_frozen_parts_are_kept_during_training() -> None:
    flags: list[bool] = []

    class Frozen(Tuner):
        def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
            flags.append(self.model.model.layers[1].training)
            flags.append(self.model.model.layers[0].training)

        def on_train_start(self) -> None:
            self.model.model.layers[1].eval()

    fit(Frozen(), DensityPenalty())
    assert flags == [False, True] * 4


# --- others that wrap


class Wrapper(Callback):
    """Another callback with a wrapper around training_step; it knows nothing of ours."""

    def __init__(self, change: Callable[[Any, Tensor, Batch], Any], tidy: str = "no") -> None:
        self.change, self.tidy = change, tidy

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found = pl_module.training_step

        @functools.wraps(self.found)
        def step(batch: Batch, batch_idx: int) -> Any:
            return self.change(pl_module, self.found(batch, batch_idx), batch)

        pl_module.training_step = step
        if self.tidy == "early":
            vars(pl_module).pop("training_step")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.tidy == "late":
            pl_module.training_step = self.found


def task_alone(module: Any, loss: Tensor, batch: Batch) -> Tensor:
    return module.model(**batch).loss


def detached(module: Any, loss: Tensor, batch: Batch) -> Tensor:
    return loss.detach() + task_alone(module, loss, batch)


def nullified(module: Any, loss: Tensor, batch: Batch) -> Tensor:
    return 0.0 * loss + task_alone(module, loss, batch)


def as_dict_of_another(module: Any, loss: Tensor, batch: Batch) -> Any:
    return {"loss": task_alone(module, loss, batch), "total": loss}


@pytest.mark.parametrize("change", [task_alone, detached, nullified, as_dict_of_another])
def test_dropped_term_is_an_error(change: Any) -> None:
    module = Tuner()
    with pytest.raises(TrainerSetupError, match=r"step 0: .* no gradient reached"):
        fit(module, DensityPenalty(), Wrapper(change))
    assert "training_step" not in vars(module)


def test_dropped_term_is_an_error_at_whatever_step_and_by_whatever_hook() -> None:
    class OwnBackward(Tuner):
        def backward(self, loss: Tensor) -> None:
            if self.global_step == 2:
                loss = self.model(**batches().batches[0]).loss
            loss.backward()

    with pytest.raises(TrainerSetupError, match="step 2: "):
        fit(OwnBackward(), DensityPenalty())
    fit(OwnBackward(), DensityPenalty(0.0))
    fit(OwnBackward(), DensityPenalty(start_step=4))  # no term, nothing to drop


def test_term_that_is_kept_is_no_error() -> None:
    fit(Tuner(), DensityPenalty(), Wrapper(lambda _, loss, __: 3.0 * loss))
    fit(Tuner(), DensityPenalty(), Wrapper(lambda _, loss, __: {"loss": loss, "other": 1}))


def test_batch_that_another_skips_is_no_error() -> None:
    count = iter(range(10))
    forget_warnings()
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(
            Tuner(),
            DensityPenalty(),
            Wrapper(lambda _, loss, __: loss if next(count) != 1 else None),
        )


@pytest.mark.thorough
@pytest.mark.parametrize("tidy", ["early", "late"])
def test_leftovers_of_another_wrapper_do_no_harm(tidy: str) -> None:
    # Without maps, which the model of the first fit has learned and the other has not.
    module, again = Tuner(), Tuner()
    keep = Wrapper(lambda _, loss, __: loss, tidy)
    fit(module, DensityPenalty(exit_map=False), keep)
    again.load_state_dict(module.state_dict())
    # A wrapper of ours that the other one put back adds nothing, nor twice in the next fit.
    for callbacks in ((), (DensityPenalty(exit_map=False),)):
        fit(module, *callbacks)
        fit(again, *callbacks)
        assert torch.equal(weights(module), weights(again))


# --- what is refused at the start


class NoModel(Tuner):
    def __init__(self) -> None:
        super().__init__(model=nn.Linear(2, 2))


class NoHead(Tuner):
    def __init__(self) -> None:
        super().__init__(model=tiny_model("llama").model)


class TwoModels(Tuner):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = tiny_model("llama", seed=1).train()


class Unsupported(Tuner):
    def __init__(self) -> None:
        config = OpenAIGPTConfig(vocab_size=67, n_embd=32, n_layer=2, n_head=4)
        super().__init__(model=OpenAIGPTLMHeadModel(config))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (NoModel, TrainerSetupError, "NoModel holds 0 causal language models; .* exactly one"),
        (NoHead, TrainerSetupError, "NoHead holds 0 causal language models"),
        (
            TwoModels,
            TrainerSetupError,
            r"holds 2 .*: model \(LlamaForCausalLM\), teacher \(LlamaForCausalLM\)",
        ),
        (Manual, TrainerSetupError, r"manual optimisation.*loss \+ softtrace\.DensityLoss\("),
        (Unsupported, UnsupportedModelError, "output of a norm"),
    ],
)
def test_modules_it_cannot_work_with_are_refused(
    kind: type[Tuner], error: type[Exception], message: str
) -> None:
    module = kind()
    before = weights(module).clone()
    with pytest.raises(error, match=message):
        fit(module, DensityPenalty())
    assert "training_step" not in vars(module)
    assert torch.equal(weights(module), before)


class ManualAtWork(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().step()


@pytest.mark.parametrize("kind", [ManualAtWork, TwoModels, Unsupported])
def test_strength_0_refuses_no_module(kind: type[Tuner]) -> None:
    fit(kind(), DensityPenalty(strength=0))


def test_training_step_that_fetches_its_batches_is_refused() -> None:
    with (
        pytest.warns(UserWarning, match="dataloader_iter"),
        pytest.raises(TrainerSetupError, match=r"takes dataloader_iter.*take \(batch\) or"),
    ):
        fit(TakesIterator(), DensityPenalty())


def test_two_penalties_are_refused() -> None:
    class Special(DensityPenalty):
        pass

    with pytest.raises(TrainerSetupError, match="found 2 DensityPenalty callbacks, allowed is one"):
        fit(Tuner(), DensityPenalty(), Special())
    with pytest.raises(TrainerSetupError, match="found 2 DensityPenalty callbacks, allowed is one"):
        fit(Tuner(), DensityPenalty(), DensityPenalty())


@pytest.mark.thorough
def test_model_inside_another_module_is_found() -> None:
    class Nested(Tuner):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"a": nn.ModuleList([self.model])})
            del self.model

        @property
        def model(self) -> Any:
            return self.inner["a"][0]

        @model.deleter
        def model(self) -> None:
            del self._modules["model"]

    nested, flat = Nested(), Tuner()
    fit(nested, DensityPenalty())
    fit(flat, DensityPenalty())
    assert torch.equal(weights(nested), weights(flat))
