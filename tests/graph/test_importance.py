"""Identity 1: an importance needs only the norms of values, not a vector for every edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import softtrace
from softtrace.errors import InvalidInputError
from softtrace.graph import attention_maps
from softtrace.graph.edges import EdgeImportance
from softtrace.graph.importance import LayerNorms, edge_shares, head_value_norms, norm_of
from tests.support import oracle
from tests.support.literal import edges_of, visible_map
from tests.support.tiny import FAMILIES, tiny_model, tiny_prompt


def measured(family: str, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    model = tiny_model(family, **options)
    with torch.no_grad():
        return softtrace.edge_importance(model, ids, mask)


def all_parts(importance: EdgeImportance) -> list[Tensor]:
    return [part for layer in importance.layers for part in layer]


def node_sums(importance: EdgeImportance) -> Tensor:
    """``[2 L, B, T]``: sums of the shares into every node."""
    sums = []
    for layer in importance.layers:
        sums.append(layer.attention.sum((1, 3)) + layer.attention_residual)
        sums.append(layer.mlp + layer.mlp_residual)
    return torch.stack(sums)


def test_the_norm_of_an_edge_factorises() -> None:
    generator = torch.Generator().manual_seed(0)
    batch, heads, kv_heads, length, head_dim, width = 2, 4, 2, 5, 3, 7
    value = torch.randn(batch, kv_heads, length, head_dim, generator=generator)
    weight = torch.randn(heads, head_dim, width, generator=generator)
    a = torch.rand(batch, heads, length, length, generator=generator).tril()
    norms = head_value_norms(value, weight)
    assert norms.shape == (batch, heads, length)
    repeated = value.repeat_interleave(heads // kv_heads, dim=1)
    for b, h, t, s in ((0, 0, 4, 0), (0, 1, 3, 3), (1, 2, 4, 2), (1, 3, 2, 1)):
        vector = a[b, h, t, s] * repeated[b, h, s] @ weight[h]
        assert (a * norms[:, :, None])[b, h, t, s].item() == pytest.approx(
            vector.abs().sum().item(), rel=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_importances_equal_those_of_materialised_edges(family: str) -> None:
    model, input_ids = tiny_model(family, seed=3, dtype=torch.float64), tiny_prompt(8, seed=3)
    with torch.no_grad():
        importance = softtrace.edge_importance(model, input_ids)
    ours, theirs = edges_of(importance), oracle.run_full(model, input_ids).importance
    assert ours.keys() == theirs.keys()
    error = max(abs(ours[edge] - theirs[edge]) / theirs[edge] for edge in ours)
    assert error < (1e-9 if family == "gpt2" else 1e-5)
    assert all(part.dtype == torch.float64 for part in all_parts(importance))


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_a_node_sum_to_one_and_absent_edges_are_zero(family: str) -> None:
    ids = tiny_prompt(9, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, 5:] = 0, 0
    importance = measured(family, ids, mask)
    assert importance.shape == (3, 3, 4, 9)
    valid = mask.bool()
    assert torch.equal(importance.valid, valid)
    sums = node_sums(importance)
    torch.testing.assert_close(sums, valid.float().expand_as(sums))
    window = 4 if family == "mistral" else None
    for layer, seen in zip(importance.layers, importance.visible, strict=True):
        assert torch.equal(seen, visible_map(valid, window))
        assert (layer.attention.masked_select(~seen[:, None]) == 0).all()
    for part in all_parts(importance):
        assert part.dtype == torch.float32
        assert ((part >= 0) & (part <= 1)).all()
        assert (part.movedim(2 if part.dim() == 4 else 1, 1)[~valid] == 0).all()


@pytest.mark.thorough
@settings(max_examples=12)
@given(
    family=st.sampled_from(FAMILIES),
    seed=st.integers(0, 50),
    lengths=st.lists(st.integers(1, 8), min_size=2, max_size=4),
    left=st.booleans(),
    extra=st.integers(0, 3),
)
def test_padding_and_neighbours_change_nothing(
    family: str, seed: int, lengths: list[int], left: bool, extra: int
) -> None:
    """A row of a padded batch, in any order of rows, has the importances it has alone."""
    model = tiny_model(family, seed=seed)
    total = max(lengths) + extra
    ids = tiny_prompt(total, seed=seed, batch=len(lengths))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1 if left else 0
        mask[row, : length if not left else 0] = 1
    ids[mask == 0] = 0
    order = list(reversed(range(len(lengths))))
    with torch.no_grad():
        padded = softtrace.edge_importance(model, ids, mask)
        turned = softtrace.edge_importance(model, ids[order], mask[order])
        for row, length in enumerate(lengths):
            inside = slice(total - length, None) if left else slice(0, length)
            alone = softtrace.edge_importance(model, ids[row : row + 1, inside])
            for both, part in zip(all_parts(padded), all_parts(alone), strict=True):
                found = both[row][..., inside]
                found = found[:, inside] if found.dim() == 3 else found
                torch.testing.assert_close(found, part[0], atol=2e-6, rtol=1e-4)
    for first, second in zip(all_parts(padded), all_parts(turned), strict=True):
        torch.testing.assert_close(first[order], second, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("elements", [1, 100, 1000])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(2, 2, 7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    whole = head_value_norms(value, weight)
    gradients = torch.autograd.grad(whole.square().sum(), (value, weight))
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", elements)
    chunked = head_value_norms(value, weight)
    torch.testing.assert_close(chunked, whole)
    again = torch.autograd.grad(chunked.square().sum(), (value, weight))
    for one, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(head_value_norms(value, weight), whole)


class Biggest(TorchDispatchMode):
    """Remembers the number of elements of the biggest tensor any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for output in made if isinstance(made, tuple | list) else (made,):
            if isinstance(output, Tensor) and not func.is_view:
                self.elements = max(self.elements, output.numel())
        return made


@pytest.mark.parametrize("gradients", [False, True])
def test_no_vector_per_edge_is_made(monkeypatch: pytest.MonkeyPatch, gradients: bool) -> None:
    length, width, heads = 48, 64, 8
    model = tiny_model("llama", hidden_size=width, num_attention_heads=heads)
    softtrace.attach(model)
    chunk = 4096
    monkeypatch.setattr(attention_maps, "CHUNK_ELEMENTS", chunk)
    with Biggest() as biggest, torch.set_grad_enabled(gradients):
        importance = softtrace.edge_importance(model, tiny_prompt(length))
        if gradients:
            sum(part.square().sum() for part in all_parts(importance)).backward()  # type: ignore[union-attr]
    allowed = max(chunk, heads * length * length, 2 * length * 67)
    assert heads * length * length <= biggest.elements <= allowed
    assert heads * length * width > allowed  # not even a vector per head and source, unchunked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    value = torch.full((1, 1, 2, 4), 200.0, dtype=dtype)
    weight = torch.full((1, 4, 200), 100.0, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms = head_value_norms(value, weight)
    assert norms.dtype == torch.float32
    assert norms.tolist() == [[[1.6e7, 1.6e7]]]  # beyond float16
    assert norm_of(value).tolist() == [[[800.0, 800.0]]]


def test_a_zero_node_gives_zeros_and_finite_gradients() -> None:
    zero = torch.zeros(1, 3, requires_grad=True)
    valid = torch.ones(1, 3, dtype=torch.bool)
    for middle in (zero, None):
        carried = (zero[:, None, :, None] * torch.ones(1, 2, 3, 3)).abs()
        (shares,) = edge_shares([LayerNorms(carried, zero, zero, middle)], valid)
        assert not any(part.any() for part in shares)
        (gradient,) = torch.autograd.grad(sum(part.sum() for part in shares), zero)
        assert gradient.isfinite().all()


def test_serial_and_parallel_layers_of_one_model_are_told_apart() -> None:
    """Two tokens, one head; the second token is padding."""
    attention = torch.tensor([[[[3.0, 0.0], [0.0, 0.0]]]])
    entry, mlp, middle = (torch.tensor([[size, 9.0]]) for size in (1.0, 4.0, 6.0))
    valid = torch.tensor([[True, False]])
    norms = [LayerNorms(attention.clone(), entry, mlp, each) for each in (middle, None)]
    serial, parallel = edge_shares(norms, valid)
    assert not norms  # taken apart, so that nothing exists twice
    for edges, first in ((serial, (0.75, 0.25, 0.4, 0.6)), (parallel, (0.375, 0.125, 0.5, 0.0))):
        assert edges.attention.tolist() == [[[[first[0], 0.0], [0.0, 0.0]]]]
        for part, share in zip(tuple(edges)[1:], first[1:], strict=True):
            torch.testing.assert_close(part, torch.tensor([[share, 0.0]]))
    assert (serial.parallel, parallel.parallel) == (False, True)


def test_norms_of_a_layer_move_to_another_device_whole() -> None:
    here = LayerNorms(torch.ones(1, 2, 3, 3), *(torch.ones(1, 3) for _ in range(4)))
    there = vars(here.to(torch.device("meta")))
    assert {name: part.device.type for name, part in there.items()} == dict.fromkeys(there, "meta")


def test_gradients_reach_every_weight_that_decides_an_importance() -> None:
    model = tiny_model("gpt2", dtype=torch.float64)
    importance = softtrace.edge_importance(model, tiny_prompt(6))
    total = sum((part.square().sum() for part in all_parts(importance)), torch.zeros(()))
    total.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"transformer.ln_f.bias"}  # a constant of the node, no edge
    detached = importance.detach()
    assert not any(part.requires_grad for part in all_parts(detached))
    for one, other in zip(all_parts(importance), all_parts(detached), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.full((1, 3), 67), None, "found ids from 67 to 67, allowed are 0 to 66"),
        (torch.tensor([[3, -1]]), None, "found ids from -1 to 3"),
        (torch.tensor([3, 4]), None, "expected a tensor of shape"),
        (torch.zeros(1, 0, dtype=torch.long), None, "no token in it"),
        (torch.tensor([[3, 4]]), torch.ones(1, 3), "attention_mask"),
    ],
)
def test_malformed_batches_are_refused(ids: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        measured("llama", ids, mask)
