"""Everything ``softtrace evaluate`` measures on a set of blocks, and its summary in numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from softtrace.baselines import Baseline, baseline_scores, baseline_thresholds
from softtrace.curve import SIZES, DensityCurve, curve_of, default_thresholds
from softtrace.distortion import NUCLEUS_SHARES
from softtrace.easiness import loss_score
from softtrace.evaluation.early_exit import exit_agreement
from softtrace.graph import EDGE_KINDS
from softtrace.instrument import attach
from softtrace.metrics.functional import (
    computation_density,
    density_uncertainty_correlation,
    early_exit_agreement,
    entropy_bounds,
    entropy_groups,
    nucleus_recovery,
    trace_composition,
)
from softtrace.recording import Recording

_SCATTER = 2000

Progress = Callable[[int], Any]


@dataclass
class Measurements:
    """Per explained position, batches one after another; ``n`` positions.

    Attributes:
        entropy, loss: ``[n]`` nats.
        area, size: ``[n]``; size is that at TV 0.2.
        variation: ``[26, n]`` TV at :data:`SIZES`.
        agreement: ``[L, n]`` bool, early exits.
        composition: ``[26, 4, 4]`` edges of all traces by depth quartile and kind, summed.
        nucleus: ``[26, m, 8]`` recovered shares, on the first blocks.
        baselines: name to ``[26, m]`` TV, on the first blocks.
    """

    entropy: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    area: list[Tensor] = field(default_factory=list)
    size: list[Tensor] = field(default_factory=list)
    variation: list[Tensor] = field(default_factory=list)
    agreement: list[Tensor] = field(default_factory=list)
    composition: Tensor | None = None
    nucleus: list[Tensor] = field(default_factory=list)
    baselines: dict[tuple[Baseline, bool], list[Tensor]] = field(default_factory=dict)


@torch.no_grad()
def measure(
    model: nn.Module,
    blocks: Tensor,
    *,
    min_context: int,
    batch_size: int,
    extra_blocks: int,
    progress: Progress,
) -> Measurements:
    """Measure blocks of one length, without padding.

    Args:
        model: a causal language model.
        blocks: ``[N, T]`` ids.
        min_context: positions before this one are context only: the number of edges grows with
            the length, so sizes are compared between positions of similar length.
        batch_size: sequences a forward.
        extra_blocks: how many of the first blocks also get baselines and nucleus recovery.
        progress: called with the number of blocks that were finished.
    """
    instrument = attach(model)
    device = next(model.parameters()).device
    found = Measurements()
    explained = slice(min_context, blocks.shape[1] - 1)  # the last token's target is not known
    for start, batch in _batches(blocks, batch_size, extra_blocks):
        ids = batch.to(device)
        recording = instrument.record(ids, keep_hidden=True)
        extra = start < extra_blocks
        curve = curve_of(
            instrument,
            ids,
            recording,
            recording.importance,
            default_thresholds(),
            composition=True,
            nucleus=extra,
        )
        _collect(found, curve, recording, ids, explained)
        found.agreement.append(_flat(exit_agreement(instrument, recording), explained))
        if extra:
            nucleus = curve.at_sizes(values=_nucleus(curve))[:, :, explained]
            found.nucleus.append(nucleus.flatten(1, 2).cpu())
            for kind in get_args(Baseline):
                for keep in (True, False):
                    scores = baseline_scores(
                        recording.importance, kind, keep_residual=keep, seed=start
                    )
                    other = curve_of(instrument, ids, recording, scores, baseline_thresholds())
                    read = _flat(other.at_sizes(), explained)
                    found.baselines.setdefault((kind, keep), []).append(read)
        progress(len(batch))
    return found


def _batches(blocks: Tensor, batch_size: int, extra_blocks: int) -> Iterator[tuple[int, Tensor]]:
    """Batches and where they start; none holds both first ``extra_blocks`` blocks and others."""
    for low, high in ((0, min(extra_blocks, len(blocks))), (extra_blocks, len(blocks))):
        for start in range(low, high, batch_size):
            yield start, blocks[start : min(start + batch_size, high)]


def _flat(values: Tensor, explained: slice) -> Tensor:
    """``[..., B, T]`` to ``[..., B·T']`` on the CPU."""
    return values[..., explained].flatten(-2).cpu()


def _nucleus(curve: DensityCurve) -> Tensor:
    if curve.nucleus is None:
        raise ValueError("the curve was made without nucleus recovery")
    return curve.nucleus


def _collect(
    found: Measurements, curve: DensityCurve, recording: Recording, ids: Tensor, explained: slice
) -> None:
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    found.entropy.append(_flat(curve.entropy, explained))
    found.loss.append(_flat(loss_score(recording.logits, targets), explained))
    found.area.append(_flat(curve.area(), explained))
    found.size.append(_flat(curve.size_at(0.2), explained))
    found.variation.append(_flat(curve.at_sizes(), explained))
    if curve.composition is not None:
        edges = curve.at_sizes(values=curve.composition)[:, :, explained].sum((1, 2)).cpu()
        found.composition = edges if found.composition is None else found.composition + edges


def summarise(found: Measurements) -> dict[str, Any]:
    """The measured part of ``density.json``.

    Easy and hard are the lowest and the highest quarter by entropy. Losses, areas and TV are means,
    sizes are medians.
    """
    entropy, loss = torch.cat(found.entropy).double(), torch.cat(found.loss).double()
    area, size = torch.cat(found.area).double(), torch.cat(found.size).double()
    variation = torch.cat(found.variation, dim=1).double()
    agreement = torch.cat(found.agreement, dim=1)
    bounds = entropy_bounds(entropy)
    groups = entropy_groups(entropy)
    density = computation_density(entropy, area, size)
    correlation = density_uncertainty_correlation(entropy, area, size)

    chosen = torch.linspace(0, len(entropy) - 1, min(_SCATTER, len(entropy))).long()
    return {
        "tokens": len(entropy),
        "easy": {
            "rule": "lowest quarter by entropy of the full prediction",
            "entropy_bound": float(bounds[0]),
        },
        "hard": {
            "rule": "highest quarter by entropy of the full prediction",
            "entropy_bound": float(bounds[1]),
        },
        "loss_nats": {name: float(loss[rows].mean()) for name, rows in groups.items()},
        "area": {name: float(density[f"area_{name}"]) for name in groups},
        "size_at_tv_0.2": {name: float(density[f"size_{name}"]) for name in groups},
        "entropy_spearman": {
            "area": float(correlation["area"]),
            "size_at_tv_0.2": float(correlation["size"]),
        },
        "curve": {
            "sizes": list(SIZES),
            **{name: _spread(variation[:, rows]) for name, rows in groups.items()},
            **_baselines(found),
        },
        "topology": _topology(found),
        "nucleus_recovery": _recovery(found),
        "early_exit": {
            "layers": list(range(1, len(agreement) + 1)),
            "agreement": {
                name: shares.tolist()
                for name, shares in early_exit_agreement(entropy, agreement.T).items()
            },
        },
        "scatter": {
            "entropy": entropy[chosen].tolist(),
            "size_at_tv_0.2": size[chosen].tolist(),
        },
    }


def _spread(values: Tensor) -> dict[str, list[float]]:
    return {
        "mean": values.mean(-1).tolist(),
        "q25": values.quantile(0.25, dim=-1).tolist(),
        "q75": values.quantile(0.75, dim=-1).tolist(),
    }


def _baselines(found: Measurements) -> dict[str, Any]:
    if not found.baselines:
        return {"baselines": None, "baseline_tokens": 0}
    joined = {key: torch.cat(parts, dim=1).double() for key, parts in found.baselines.items()}
    return {
        "baselines": {
            kind: {
                "residual_kept": joined[kind, True].mean(-1).tolist(),
                "residual_not_kept": joined[kind, False].mean(-1).tolist(),
            }
            for kind in get_args(Baseline)
        },
        "baseline_tokens": next(iter(joined.values())).shape[1],
    }


def _topology(found: Measurements) -> dict[str, Any] | None:
    if found.composition is None:
        return None
    shares = trace_composition(found.composition.double())
    return {"sizes": list(SIZES), "kinds": list(EDGE_KINDS), "shares": shares.tolist()}


def _recovery(found: Measurements) -> dict[str, Any] | None:
    if not found.nucleus:
        return None
    recovered = torch.cat(found.nucleus, dim=1).double()
    tokens = torch.tensor(recovered.shape[1])
    return {
        "p": list(NUCLEUS_SHARES),
        "sizes": list(SIZES),
        "recovered": nucleus_recovery(recovered.sum(1), tokens).tolist(),
        "tokens": int(tokens),
    }
