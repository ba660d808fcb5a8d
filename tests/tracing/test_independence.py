"""Models whose outputs add up, but whose sub-blocks read what the graph does not say: refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput

import softtrace
from softtrace.errors import UnsupportedModelError
from softtrace.tracing import independence
from softtrace.tracing.attach import attach
from softtrace.tracing.verification import Checks
from tests.model.test_attention_interception import (
    TheirAttention,
    TheirConfig,
    TheirLayer,
    TheirModel,
    causal,
)
from tests.support.zoo import redraw, tiny

PAST = "the prediction still depends on the tokens"
OTHERS = "a prediction depends on edges that do not reach it"


class Sharing(TheirModel):
    """Layers hand something on beside the residual stream."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        allowed, shared = causal(input_ids.shape[1], attention_mask), {}
        x: Tensor = self.tokens(input_ids)
        for layer in self.stack:
            x = layer(x, allowed, shared)
        return CausalLMOutput(logits=self.to_vocabulary(self.last(x)))


class MLPFirst(TheirLayer):
    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        x = x + self.feed(self.norm_mid(x))
        return x + self.attend(self.norm_in(x), allowed)


class ReadsEntry(TheirLayer):
    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        node = x + self.attend(self.norm_in(x), allowed)
        return node + self.feed(self.norm_mid(node) + x)  # type: ignore[no-any-return]


class GatedByEntry(TheirLayer):
    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.up, self.gate, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        node = x + self.attend(self.norm_in(x), allowed)
        up = functional.silu(self.up(self.norm_mid(node)))
        return node + self.down(up * self.gate(x))  # type: ignore[no-any-return]


class MixedValues(TheirAttention):
    """A short convolution over the values."""

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = (e.unflatten(-1, (4, -1)).transpose(1, 2) for e in self.qkv(x).chunk(3, dim=-1))
        v = v + functional.pad(v, (0, 0, 1, 0))[:, :, :-1]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class WithMixedValues(TheirLayer):
    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.attend = MixedValues(way)


class SharedValues(TheirAttention):
    def forward(self, x: Tensor, allowed: Tensor, shared: Any) -> Tensor:  # type: ignore[override]
        q, k, v = (e.unflatten(-1, (4, -1)).transpose(1, 2) for e in self.qkv(x).chunk(3, dim=-1))
        k, v = shared.setdefault("kv", (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class WithSharedValues(TheirLayer):
    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.attend = SharedValues(way)

    def forward(self, x: Tensor, allowed: Tensor, shared: Any) -> Tensor:  # type: ignore[override]
        x = x + self.attend(self.norm_in(x), allowed, shared)
        return x + self.feed(self.norm_mid(x))  # type: ignore[no-any-return]


class ReadsBelow(TheirLayer):
    def forward(self, x: Tensor, allowed: Tensor, shared: Any) -> Tensor:  # type: ignore[override]
        x = x + self.attend(self.norm_in(x), allowed)
        hidden = self.norm_mid(x) + shared.get("below", 0)
        shared["below"] = hidden
        return x + self.feed(hidden)  # type: ignore[no-any-return]


class ReadsEmbedding(TheirLayer):
    def forward(self, x: Tensor, allowed: Tensor, shared: Any) -> Tensor:  # type: ignore[override]
        first = shared.setdefault("embedding", x)
        x = x + self.attend(self.norm_in(x) + first, allowed)
        return x + self.feed(self.norm_mid(x))  # type: ignore[no-any-return]


class ReadsNodeTwice(TheirLayer):
    """A router beside the norm, which reads the same node: nothing goes past the edges."""

    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.router = nn.Linear(32, 1)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        node = x + self.attend(self.norm_in(x), allowed)
        return node + self.feed(self.norm_mid(node) + self.router(node))  # type: ignore[no-any-return]


def made(layer: type[TheirLayer], kind: type[TheirModel] = TheirModel) -> TheirModel:
    model = kind(TheirConfig("softmax"))
    model.stack = nn.ModuleList([layer("softmax") for _ in range(3)])
    redraw(model)
    return model.float().eval()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "MLP before attention": (lambda: made(MLPFirst), OTHERS),
    "MLP reads the entry": (lambda: made(ReadsEntry), PAST),
    "MLP gated by the entry": (lambda: made(GatedByEntry), PAST),
    "values of several tokens mixed": (lambda: made(WithMixedValues), OTHERS),
    "values shared between layers": (lambda: made(WithSharedValues, Sharing), PAST),
    "MLP reads the layer below": (lambda: made(ReadsBelow, Sharing), PAST),
    "attention reads the embedding": (lambda: made(ReadsEmbedding, Sharing), PAST),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ways_around_the_edges_are_found(name: str) -> None:
    build, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=reason):
        softtrace.attach(build())


@pytest.mark.parametrize("layer", [TheirLayer, ReadsNodeTwice])
def test_what_reads_its_node_alone_passes(layer: type[TheirLayer]) -> None:
    model = made(layer)
    found = attach(model).verification
    for check in ("nodes cut off their edges", "edges that do not reach a prediction"):
        assert found.errors[check] <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "cohere", "gpt2", "granite"])
def test_the_rows_of_the_check_differ_where_they_should(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not vacuous: without the masks the tokens do change what the rows predict."""
    model = tiny(kind)
    instrument = attach(model)
    kept = independence._hidden
    seen: list[float] = []

    def unmasked(instrument: Any, rows: Any, attention: Any, device: Any) -> Tensor:
        whole = [type(row)(row.ids, [m.map(torch.ones_like) for m in row.masks]) for row in rows]
        hidden = kept(instrument, whole, attention, device)
        seen.append(float((hidden[::2] - hidden[1::2]).abs().max()))
        return kept(instrument, rows, attention, device)

    monkeypatch.setattr(independence, "_hidden", unmasked)
    independence.check_independence(instrument, Checks(), 1e-4, torch.device("cpu"))
    assert len(seen) == 2
    assert min(seen) > 0.1
