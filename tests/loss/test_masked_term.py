"""Static masked runs: the same numbers, and nothing that a CUDA graph could not capture."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from softtrace import DensityLoss
from softtrace.density import chunks
from softtrace.graph.batch import Batch
from softtrace.loss.masked_term import MaskedTerm, masked_term
from softtrace.loss.windows import draw_windows
from softtrace.model.state import dropout_off
from softtrace.tracing.attach import attach
from softtrace.tracing.instrument import Instrument
from tests.support import zoo
from tests.support.tiny import tiny_prompt

#: whose result is a number on the host, or has a shape that follows from values
READING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "_unique2")
FAMILIES = ("llama", "gpt2", "gemma3_text", "olmo2", "gpt_neox", "qwen3", "mistral", "granite")


class NothingRead(TorchDispatchMode):
    """Refuses operations that wait for the device, which a capture would refuse on CUDA."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = function._schema.name.partition("::")[2]
        by_mask = name == "index" and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        reads = name in READING or by_mask
        assert not reads, f"{name} reads from the device"
        return function(*args, **(kwargs or {}))


def windows_of(model: nn.Module, penalty: DensityLoss, ids: Tensor, mask: Tensor | None) -> Any:
    options = penalty.options.on(ids.device)
    return draw_windows(attach(model), Batch.of(ids, mask), (0, 0), options), options


def gradients(model: nn.Module, found: MaskedTerm | None) -> list[Tensor]:
    assert found is not None
    weights = list(model.parameters())
    read = torch.autograd.grad(found.term, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, read, strict=True)]


@pytest.mark.parametrize(
    "changes", [{}, {"attention": "recomputed"}, {"masks": "soft"}, {"size_weight": 0.1},
                {"easy_quantile": 1.0, "distance": "kl"}],
)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_static_runs_give_the_same_and_read_nothing(family: str, changes: dict[str, Any]) -> None:
    model = zoo.tiny(family)
    ids, mask = tiny_prompt(12, seed=5, batch=4), torch.ones(4, 12, dtype=torch.long)
    mask[1, 9:], mask[2, :3] = 0, 0
    penalty = DensityLoss(model, share=1.0, crop=6, **changes)
    windows, options = windows_of(model, penalty, ids, mask)
    with dropout_off(model):
        plain = masked_term(attach(model), windows, options)
        wanted = gradients(model, plain)
        with NothingRead():
            static = masked_term(attach(model), windows, options, static=True)
            found = gradients(model, static)
    assert plain is not None
    assert static is not None
    assert plain.finite is None
    assert static.finite is not None
    assert bool(static.finite)
    for one, other in zip(plain[:-1], static[:-1], strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, other)
    assert any(bool(each.any()) for each in wanted)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("distance", ["tv", "kl"])
def test_a_few_logits_at_a_time_give_the_same(
    distance: str, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.tiny("llama").double()
    penalty = DensityLoss(model, share=1.0, crop=6, distance=distance)
    windows, options = windows_of(model, penalty, tiny_prompt(12, seed=5, batch=4), None)
    found = []
    for at_once in (chunks.AT_ONCE, 100):
        monkeypatch.setattr(chunks, "AT_ONCE", at_once)
        with dropout_off(model):
            term = masked_term(attach(model), windows, options, static=static)
            found.append((term, gradients(model, term)))
    (whole, by_whole), (parts, by_parts) = found
    assert whole is not None
    assert parts is not None
    torch.testing.assert_close(whole.term, parts.term, rtol=1e-12, atol=0)
    for one, other in zip(by_whole, by_parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert any(bool(each.any()) for each in by_parts)


@pytest.mark.parametrize("static", [False, True])
def test_logits_of_the_recording_run_are_gone_when_the_masked_run_runs(
    static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.tiny("llama")
    windows, options = windows_of(model, DensityLoss(model, share=1.0), tiny_prompt(9, 3), None)
    record, exit_logits = Instrument.record, Instrument.exit_logits
    logits: list[Any] = []

    def recording(self: Instrument, *args: Any, **others: Any) -> Any:
        found = record(self, *args, **others)
        logits.append(weakref.ref(found.logits.untyped_storage()))
        return found

    def masked(self: Instrument, *args: Any, **others: Any) -> Tensor:
        assert logits.pop()() is None
        return exit_logits(self, *args, **others)

    monkeypatch.setattr(Instrument, "record", recording)
    monkeypatch.setattr(Instrument, "exit_logits", masked)
    with dropout_off(model):
        assert masked_term(attach(model), windows, options, static=static) is not None
    assert not logits


def test_tokens_of_infinite_score_are_not_ranked() -> None:
    model, ids = zoo.tiny("llama"), tiny_prompt(12, batch=2)

    def score(logits: Tensor, targets: Tensor) -> Tensor:
        place = torch.arange(12.0)
        return torch.where(place < 8, place, torch.inf).expand(targets.shape)

    penalty = DensityLoss(model, share=1.0, easiness=score, easy_quantile=0.9, easy_width=0.0)
    found = masked_term(attach(model), *windows_of(model, penalty, ids, None))
    assert found is not None
    assert found.easy_share == 14 / 16  # round(0.9 * 16), the last two alike
