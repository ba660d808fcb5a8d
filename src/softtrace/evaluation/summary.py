"""The measured part of ``density.json``: what was measured of all tokens, in numbers."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from softtrace.data.blocks import even_places
from softtrace.density.baselines import NAMES_IN_FILES, Baseline
from softtrace.density.curve import SIZES
from softtrace.density.distortion import NUCLEUS_SHARES
from softtrace.evaluation.measure import Measurements
from softtrace.graph.edges import EDGE_KINDS
from softtrace.metrics.functional import (
    computation_density,
    density_uncertainty_correlation,
    early_exit_agreement,
    entropy_bounds,
    entropy_groups,
    nucleus_recovery,
    quantiles,
    trace_composition,
)

_SCATTER = 2000


def summarise(found: Measurements) -> dict[str, Any]:
    """The measured part of ``density.json``.

    Easy and hard are the lowest and the highest quarter by entropy. Losses, areas and TV are means,
    sizes are medians. Needs memory for a few rows of n numbers in float64 beside what it is given;
    parts that are mapped from files (:mod:`softtrace.evaluation.parts`) stay there.
    """
    entropy, loss = torch.cat(found.entropy).double(), torch.cat(found.loss).double()
    area, size = torch.cat(found.area).double(), torch.cat(found.size).double()
    layers = len(found.agreement[0])
    bounds = entropy_bounds(entropy)
    groups = entropy_groups(entropy)
    density = computation_density(entropy, area, size)
    correlation = density_uncertainty_correlation(entropy, area, size)

    chosen = even_places(len(entropy), _SCATTER)
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
            **_spreads(found.variation, groups),
            **_baselines(found),
        },
        "topology": _topology(found),
        "nucleus_recovery": _recovery(found),
        "early_exit": {
            "layers": list(range(1, layers + 1)),
            "agreement": _agreement(entropy, found.agreement, layers),
        },
        "scatter": {
            "entropy": entropy[chosen].tolist(),
            "size_at_tv_0.2": size[chosen].tolist(),
        },
    }


def _spreads(parts: list[Tensor], groups: dict[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """Mean and quartiles of each size, over the tokens of each group."""
    spreads: dict[str, dict[str, list[float]]] = {
        name: {"mean": [], "q25": [], "q75": []} for name in groups
    }
    for at in range(len(SIZES)):  # one size at a time: all of them could be too many
        row = torch.cat([part[at] for part in parts]).double()
        for name, rows in groups.items():
            chosen = row[rows]
            low, high = quantiles(chosen, (0.25, 0.75))
            for key, value in (("mean", chosen.mean()), ("q25", low), ("q75", high)):
                spreads[name][key].append(float(value))
    return spreads


def _agreement(entropy: Tensor, parts: list[Tensor], layers: int) -> dict[str, list[float]]:
    """Shares of the exits that agree, ``layers`` of them for each group."""
    shares: dict[str, list[float]] = {}
    for at in range(layers):  # one layer at a time, as sizes above
        row = torch.cat([part[at] for part in parts])
        for name, share in early_exit_agreement(entropy, row[:, None]).items():
            shares.setdefault(name, []).append(float(share))
    return shares


def _baselines(found: Measurements) -> dict[str, Any]:
    if not found.baselines:
        return {"baselines": None, "baseline_tokens": 0}
    joined = {key: torch.cat(parts, dim=1).double() for key, parts in found.baselines.items()}
    return {
        "baselines": {
            NAMES_IN_FILES[kind]: {
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
