"""How figures name the kind of attention that their masked runs were measured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MEANINGS = {
    "recorded": "masked runs keep the attention probabilities of the full run",
    "recomputed": "masked runs compute their attention probabilities anew, from what is left of "
    "their states, as a model cut down to these edges would",
    "kept": "edges of attention are counted but not masked",
}
"""What each :data:`~softtrace.tracing.masking.AttentionKind` means, for whoever reads figures."""


def attention_name(measured: Sequence[Mapping[str, Any]]) -> str:
    """What a figure is headed with, as "attention recomputed".

    Args:
        measured: each ``density.json`` that is drawn, or the ``settings`` of a ``study.json``.
            Those without the key are from before there was a choice: recorded.
    """
    kinds = sorted({str(each.get("attention", "recorded")) for each in measured})
    return f"attention {' and '.join(kinds)}"


def unmasked_note(measured: Sequence[Mapping[str, Any]]) -> str:
    """The same for a figure of full runs alone, which no kind of attention changes."""
    return f"{attention_name(measured)}, which does not matter here: nothing is masked"


def attention_meaning(measured: Sequence[Mapping[str, Any]]) -> str:
    """What the kinds of attention of these runs mean; one that is not known is only named."""
    kinds = sorted({str(each.get("attention", "recorded")) for each in measured})
    return "; ".join(MEANINGS.get(kind, kind) for kind in kinds)
