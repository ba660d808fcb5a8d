"""What a CUDA graph of masked runs rests on, where there is no CUDA: other weights, its key."""

from __future__ import annotations

import pytest
import torch

from softtrace import DensityLoss
from softtrace.graph.batch import Batch
from softtrace.loss.captured import _key, with_weights
from softtrace.loss.masked_term import masked_term
from softtrace.model.state import dropout_off
from softtrace.tracing.attach import attach
from tests.support import zoo
from tests.support.tiny import tiny_prompt


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_gradients_at_shared_weights_are_those_of_the_model(family: str) -> None:
    model = zoo.tiny(family)
    own = dict(model.named_parameters())
    shared = {name: each.detach().requires_grad_() for name, each in own.items()}
    penalty = DensityLoss(model, share=1.0)
    options = penalty.options.on(torch.device("cpu"))
    windows = penalty._windows(attach(model), Batch.of(tiny_prompt(9, batch=3)), (0, 0), options)
    assert windows is not None

    def run() -> torch.Tensor:
        found = masked_term(attach(model), windows, options, static=True)
        assert found is not None
        return found.term

    with dropout_off(model):
        wanted = torch.autograd.grad(run(), list(own.values()), allow_unused=True)
        term = with_weights(model, shared, run)
        found = torch.autograd.grad(term, list(shared.values()), allow_unused=True)
    assert all(model.get_parameter(name) is each for name, each in own.items())
    for one, other in zip(wanted, found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)
    assert sum(each is not None for each in found) > len(found) / 2


def test_a_graph_is_of_its_shape_its_weights_and_its_options() -> None:
    model = zoo.tiny("llama")
    penalty = DensityLoss(model, share=1.0, crop=4)
    options = penalty.options.on(torch.device("cpu"))

    def key(rows: int = 3, strength: float = 0.35) -> object:
        batch = Batch.of(tiny_prompt(9, batch=rows))
        windows = penalty._windows(attach(model), batch, (0, 0), options)
        assert windows is not None
        changed = DensityLoss(model, options, strength=strength).options
        return hash(_key(model, windows, changed))

    first = key()
    assert first == key()
    with torch.no_grad():
        next(model.parameters()).add_(1)  # an optimiser's step, in place
    assert first == key()
    assert first not in (key(rows=2), key(strength=0.1))
    frozen = next(model.parameters()).requires_grad_(False)
    assert first != key()
    frozen.requires_grad_(True)
    assert first == key()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert first != key()
