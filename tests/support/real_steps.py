"""Steps of training from one start, of real models: what a plain loop does is what all should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softtrace import DensityLoss
from softtrace.data import pack
from softtrace.model.exit_maps import set_exit_maps
from tests.support.fitting import weights
from tests.support.real import documents, real_model, real_tokenizer

RATE = 0.01


class Start:
    """A model to begin from again and again: what was proven of it holds for all its steps."""

    def __init__(self, name: str, dtype: str, length: int) -> None:
        self.model = real_model(name, dtype)
        self.ids = pack(documents(), real_tokenizer(name), length)[:1]
        self._weights = [each.detach().clone() for each in self.model.parameters()]
        self.before = weights(self.model).float()

    def stepped(self, train: Callable[..., None], folder: Path) -> Tensor:
        """All weights after one step from the start on one block of the text."""
        with torch.no_grad():
            for each, first in zip(self.model.parameters(), self._weights, strict=True):
                each.copy_(first)
        set_exit_maps(self.model, None)  # a term would continue with them
        self.model.train().zero_grad()
        assert torch.equal(weights(self.model).float(), self.before)
        train(self.model, self.ids, folder)
        return weights(self.model).float()


def loop(model: Any, ids: Tensor, folder: Path) -> None:
    density_loss = DensityLoss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with density_loss.watching(model, 0) as watched:
        task = model(input_ids=ids, labels=ids).loss
    term = density_loss(ids, step=0, watched=watched)
    (task + term.loss).backward()
    optimizer.step()
    assert term.skipped is None
    assert 0 < float(term.distortion) <= 1
    assert term.exit_distance is not None
    assert 0 < float(term.exit_distance) < 30
    assert float(term.loss.detach()) > 0.1
