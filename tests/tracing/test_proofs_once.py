"""What tests need not prove again is what was proven, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from softtrace.errors import UnsupportedModelError
from softtrace.tracing import attach as attaching
from softtrace.tracing.attach import attach
from tests.support.proofs import once
from tests.support.tiny import tiny_model


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runners of all proofs that were made."""
    made: list[Any] = []
    prove = attaching.prove

    def counted(runner: Any, *args: Any) -> Any:
        made.append(runner)
        return prove(runner, *args)

    monkeypatch.setattr(attaching, "prove", once(counted))
    return made


def test_an_equal_model_is_not_proven_again(proven: list[Any]) -> None:
    first, second = (attach(tiny_model("llama", seed=71)) for _ in range(2))
    assert len(proven) == 1
    assert second.verification is first.verification


def other_weight(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] += 1e-6


def other_number(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 1 + 1e-9


def other_config(model: Any) -> None:
    model.config.rms_norm_eps *= 2


def other_kind(model: Any) -> None:
    kind = type(model.model.norm)
    model.model.norm.__class__ = type("Norm", (kind,), {})


def hooked(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda *_: None)


def own_forward(model: Any) -> None:
    model.model.norm.forward = model.model.norm.forward


@pytest.mark.parametrize(
    "change", [other_weight, other_number, other_config, other_kind, hooked, own_forward]
)
def test_any_other_is(proven: list[Any], change: Callable[[Any], None]) -> None:
    attach(tiny_model("llama", seed=72))
    count = len(proven)
    model = tiny_model("llama", seed=72)
    change(model)
    attach(model)
    assert len(proven) == count + 1


def mixes_tokens(model: Any) -> None:
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda module, args, output: output + output.mean(1, keepdim=True))


def test_what_was_proven_once_is_refused_where_it_was_changed(proven: list[Any]) -> None:
    attach(tiny_model("llama", seed=73))
    for _ in range(2):
        model = tiny_model("llama", seed=73)
        mixes_tokens(model)
        with pytest.raises(UnsupportedModelError):
            attach(model)
