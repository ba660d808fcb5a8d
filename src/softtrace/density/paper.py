"""The quantities of arXiv 2605.27033 as its authors compute them, where this project's differ.

Names are theirs; their functions are those of their code, llm-strace. What is different is in one
table, ``recipes/PAPER.md``. Each position is looked at with a run of its own for every size, so
nothing here is interpolated but what they interpolate.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from softtrace.density.distortion import nucleus_recovered
from softtrace.graph.importance import working_dtype

# fmt: off
PAPER_SIZES: tuple[float, ...] = (
    1e-5, 2e-5, 4e-5, 8e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1e-3, 1.2e-3, 1.4e-3, 2e-3, 3e-3, 4e-3, 6e-3,
    8e-3, 1e-2, 2e-2, 4e-2, 6e-2, 8e-2, 1e-1, 2e-1, 4e-1, 6e-1, 8e-1, 1.0,
)
# fmt: on
"""s of the 27 traces of an input, the full graph last (``2_stratification_cpu.py``)."""

COMMON_SIZES: tuple[float, ...] = tuple(np.logspace(-5, 0, 150).tolist())
"""150 sizes on which curves of several inputs are averaged (``COMMON_SIZE``)."""

NUCLEUS_CANDIDATES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)
"""p in per cent of which ν is one (``get_intersection_nucleus``)."""

NUCLEUS_TARGETS = (1, 5, 10, 20, 40, 60, 80, 90)
"""k in per cent for which the first size with ν >= k is reported (``nu_targets``)."""

DEPTH_GROUPS = 4

_SMALLEST = 1e-8  # what a size of 0 is taken for, so that it has a logarithm
_TOP = 5
_TOP_SHARE = 0.6


def edge_count(size: float, total: int) -> int:
    """Edges of the trace of size s, int(s·|E|): rounded down, so that a trace can be empty.

    ``label_graph_with_strata_sizes``. This project rounds up
    (:func:`softtrace.graph.trace.trace_length`), so that the trace is at least of that size.

    Args:
        size: s, in [0, 1].
        total: |E|.
    """
    return int(size * total)


def auc(sizes: Tensor, variation: Tensor) -> Tensor:
    """AUC, "computation density": the trapezoid of TV over log10 of the size.

    ``aggregate_straces.py``. It is not divided by its width, which is 5 decades where the smallest
    trace has a size of 1e-5, and 8 where it is empty: a size of 0 is taken for 1e-8. This project's
    area is a mean TV from 1e-4 (:meth:`softtrace.DensityCurve.area`), hence in [0, 1].

    Args:
        sizes: ``[..., K]`` shares of |E| that the traces really have, rising.
        variation: ``[..., K]`` TV of each.

    Returns:
        ``[...]`` float64.
    """
    decades = sizes.double().clamp(_SMALLEST, 1.0).log10()
    return torch.trapezoid(variation.double(), decades, dim=-1)


def shared_nucleus(full: Tensor, masked: Tensor) -> Tensor:
    """ν: the largest p whose ordered top-p lists are equal, in per cent; 0 if none is.

    ``get_intersection_nucleus``. Lists can be equal at a large p and not at a smaller one, where
    one prediction needs fewer tokens for it; so ν >= k says less than that the top-k lists are
    equal, which is what this project's nucleus recovery asks at each p by itself.

    Args:
        full, masked: logits ``[..., V]``.

    Returns:
        ``[...]`` int64, one of :data:`NUCLEUS_CANDIDATES` or 0.
    """
    shares = tuple(p / 100 for p in NUCLEUS_CANDIDATES)
    candidates = torch.tensor(NUCLEUS_CANDIDATES, device=full.device)
    return (nucleus_recovered(full, masked, shares) * candidates).amax(-1)


def first_size(sizes: Tensor, nucleus: Tensor, target: int) -> Tensor:
    """The first size with ν >= k; larger ones may have a smaller ν again.

    ``nucleus_sizes`` of ``aggregate_straces.py``.

    Args:
        sizes: ``[..., K]`` rising.
        nucleus: ``[..., K]``, ν at each.
        target: k in per cent.

    Returns:
        ``[...]``; NaN where no size has it, which they leave out.
    """
    reached = nucleus >= target
    first = sizes.gather(-1, reached.int().argmax(-1, keepdim=True))[..., 0]
    return first.masked_fill(~reached.any(-1), torch.nan)


def depth_groups(layers: int) -> Tensor:
    """``[L]`` int64, the group of every layer as ``numpy.array_split`` makes four of them.

    ``extract_topology``: the first groups get the layers that are left over (30 layers: 8, 8, 7,
    7). This project's quartile of layer l is ⌊4·l/L⌋ (8, 7, 8, 7).
    """
    parts = np.array_split(np.arange(layers), DEPTH_GROUPS)
    return torch.tensor([group for group, part in enumerate(parts) for _ in part])


def by_depth_group(counts: Tensor) -> Tensor:
    """``[..., L, X]`` numbers of edges to ``[..., 4, X]``, summed over the groups' layers."""
    groups = depth_groups(counts.shape[-2]).to(counts.device)
    summed = counts.new_zeros(*counts.shape[:-2], DEPTH_GROUPS, counts.shape[-1])
    return summed.index_add_(-2, groups, counts)


def nucleus_frequency(logits: Tensor, counts: Tensor) -> Tensor:
    """Mean unigram frequency of the five most likely tokens of the top-60 % list.

    ``get_nucleus`` and ``pred_token_count``. Fewer than five where the list is shorter; tokens that
    the corpus lacks are left out. This project compares whole predictions with the unigrams
    (:class:`softtrace.evaluation.study.unigrams.Unigrams`).

    Args:
        logits: ``[..., V]``.
        counts: ``[V]``, how often each token is in a corpus.

    Returns:
        ``[...]`` float64, a share of the corpus' tokens; NaN where the corpus has none of them.
    """
    likely = logits.to(working_dtype(logits.dtype)).softmax(-1)
    mass, tokens = likely.topk(min(_TOP, logits.shape[-1]), dim=-1)
    before = mass.cumsum(-1) - mass
    found = counts.to(tokens.device)[tokens].double()
    listed = (before <= _TOP_SHARE) & (found > 0)
    return (found * listed).sum(-1) / listed.sum(-1) / counts.sum()


def on_common_sizes(sizes: Tensor, values: Tensor) -> Tensor:
    """Values of several inputs on :data:`COMMON_SIZES`, linear in s between an input's own sizes.

    ``safe_interp``. Beyond an input's smallest size its value is held. This project interpolates
    in log s.

    Args:
        sizes: ``[N, K]`` rising.
        values: ``[N, K, ...]``.

    Returns:
        ``[N, 150, ...]`` float64.
    """
    flat = values.double().reshape(*values.shape[:2], -1).numpy()
    inputs = zip(sizes.double().numpy(), flat, strict=True)
    found = [
        np.stack([np.interp(COMMON_SIZES, own, each) for each in curves.T], axis=-1)
        for own, curves in inputs
    ]
    rows = torch.from_numpy(np.stack(found))
    return rows.reshape(len(values), len(COMMON_SIZES), *values.shape[2:])
