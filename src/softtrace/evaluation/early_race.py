"""Early exit without a check, for an agreement that is named: what it saves on other prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from softtrace.decoding.calibration import least_confidence
from softtrace.decoding.exit_checks import ProvenExit
from softtrace.decoding.replay import Guesses
from softtrace.decoding.speculative import greedy
from softtrace.decoding.unchecked import agreement_of, exit_early
from softtrace.errors import InvalidInputError
from softtrace.evaluation.decode_race import now, quartiles


def race_early(
    network: Any,
    proven_exit: ProvenExit,
    texts: Sequence[Guesses],
    rows: Sequence[Tensor],
    exit_layer: int,
    new_tokens: int,
    agreement: float,
) -> dict[str, Any]:
    """Choose a confidence on some texts, and let tokens out by it on other prompts.

    Args:
        network: writes past ends.
        proven_exit: of it, with a proof of its cache.
        texts: what the exits said, for the choice.
        rows: other prompts, ``[1, T]`` each.
        exit_layer: 1 to L - 1.
        new_tokens: tokens that are written for each prompt.
        agreement: share of tokens, let out early, that the whole model is to agree to.

    Returns:
        The choice (``confidence``, ``agreement_chosen_on``), and what it came to: ``agreement`` of
        all new tokens but the first, ``early``, the share of them that went out early,
        ``layers_saved``, ``speedup`` over the eager loop. Where no confidence reaches the
        agreement, why (``left_out``) in place of all that.
    """
    asked = {"exit_layer": exit_layer, "agreement_asked": agreement}
    place = exit_layer - 1
    sure = [each for text in texts for each in text.sure[place]]
    right = [each for text in texts for each in text.right[place]]
    try:
        chosen = least_confidence(sure, right, agreement)
    except InvalidInputError as error:
        return {**asked, "left_out": str(error)}
    found, ratios, agreed = [], [], []
    for number, row in enumerate([rows[0], *rows]):  # the first run warms up
        began = now(row)
        greedy(network, row, new_tokens)
        between = now(row)
        text = exit_early(
            network, row, confidence=chosen.confidence, exit_layer=exit_layer,
            max_new_tokens=new_tokens, proven_exit=proven_exit,
        )  # fmt: skip
        ended = now(row)
        if number:
            found.append(text)
            ratios.append((between - began) / (ended - between))
            agreed.append(agreement_of(network, row, text.tokens) * new_tokens - 1)
    return {
        **asked,
        "left_out": None,
        "confidence": chosen.confidence,
        "agreement_chosen_on": chosen.agreement,
        "agreement": statistics.mean(agreed) / (new_tokens - 1),
        "early": statistics.mean(float(each.early.sum()) / (new_tokens - 1) for each in found),
        "layers_saved": statistics.mean(each.layers_saved for each in found),
        "speedup": quartiles(ratios),
    }
