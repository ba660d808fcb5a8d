"""What the matrix compares: a case of the zoo with its own logits and the literal reference."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

import softtrace
from softtrace.graph.edges import EDGE_KINDS, EdgeImportance, LayerEdges
from softtrace.tracing.instrument import Instrument
from tests.support.reference import Layer, Reference, reference
from tests.support.zoo import VOCABULARY


def padded() -> tuple[Tensor, Tensor]:
    """Two rows of seven tokens, one of them left-padded by two."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, mask


def inputs_of(instrument: Instrument, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What the model's own forward takes."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in instrument.forward_parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return inputs


def literal(case: str, model: PreTrainedModel) -> tuple[Instrument, Reference]:
    """The instrument of a case, and the reference of the padded batch."""
    instrument = softtrace.attach(model)
    return instrument, reference(case, model, inputs_of(instrument, *padded()))


def coins(importance: EdgeImportance, seed: int, *, residual_only: bool) -> list[LayerEdges]:
    """Every edge kept with a probability of 0.6, or the residual edges alone."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for layer in importance.existing():
        parts = []
        for kind, there in zip(EDGE_KINDS, layer, strict=True):
            drawn = torch.rand(there.shape, generator=generator) < 0.6
            keep = torch.tensor(kind.endswith("residual")) if residual_only else drawn
            parts.append((there & keep).float())
        masks.append(LayerEdges(*parts, parallel=layer.parallel))
    return masks


@torch.no_grad()
def literal_errors(case: str, model: PreTrainedModel) -> dict[str, float]:
    """Largest absolute differences from the literal reference: importances, masked logits."""
    ids, mask = padded()
    valid = mask.bool()
    instrument, own = literal(case, model)
    recording = instrument.record(instrument.batch(ids, mask))
    _, expected = own.run(None)
    importance = 0.0
    for one, other in zip(recording.importance.layers, expected, strict=True):
        for kind in EDGE_KINDS:
            difference = (getattr(one, kind) - getattr(other, kind)).abs()
            rows = valid[:, None].expand(difference.shape[:3]) if difference.dim() == 4 else valid
            importance = max(importance, float(difference[rows].max()))
    masks = coins(recording.importance, 2, residual_only=False)
    found = instrument.masked_logits(recording.batch, masks, recording.attention)
    logits, _ = own.run([Layer(*each) for each in masks])
    return {"importance": importance, "masked": float((found - logits)[valid].abs().max())}
