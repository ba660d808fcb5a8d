"""What guesses and checks cost by steps of fixed shapes, which are not what they cost eagerly.

Where the host says every step anew, a run over several tokens costs hardly more than one over one
token, and few layers far less than many. By captured steps neither is so: a way to draft that was
chosen by the costs of one loop may be a poor one for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from softtrace.decoding.exit_checks import ProvenExit
from softtrace.decoding.replay import Drafting, Guesses, best_drafting, check_costs
from softtrace.decoding.static_decoder import StaticDecoder
from softtrace.evaluation.decode_race import now, over_plain


@torch.no_grad()
def fixed_costs(decoder: StaticDecoder, row: Tensor) -> tuple[dict[int, float], list[float], float]:
    """Costs of guesses by each number of layers, of runs over 1, 2, ... tokens, and of choosing.

    They are times over that of one token through all layers
    (:func:`softtrace.evaluation.decode_race.over_plain`). Measured are guesses by the decoder's
    own exit, since for every other steps would have to be compiled, and runs over 2 and over most
    tokens; others lie on lines through these and a plain token.

    Args:
        decoder: whose ``draft_tokens`` are the most tokens, K.
        row: ``[T]``, a prompt that leaves room for as many.

    Returns:
        Costs of guesses by 1 to L - 1 layers, of runs over 1 to K tokens, and of choosing a token,
        which is a part of a guess.
    """
    parts, steps, runner, texts = decoder._parts, decoder._steps, decoder._runner, decoder._texts
    most, layers = decoder.draft_tokens, decoder.proven_exit.layers
    kinds: dict[str | int, tuple[str, Callable[..., None], tuple[int, ...]]] = {
        "plain": ("whole", steps.plain, ()), "guess": ("first", steps.guess, ()),
        "no guess": ("first", steps.follow, ()),  # the last token of a draft
        **{count: ("whole", steps.read, (count,)) for count in {2, most} if count > 1},
    }  # fmt: skip

    def seconds(kind: str | int) -> float:
        part, step, numbers = kinds[kind]
        texts.begin([row], most)
        steps.place.zero_()
        began = now(row)
        runner.run(part, step, *numbers)
        return now(row) - began

    with parts.prepared():
        texts.begin([], 0)
        for part, step, numbers in kinds.values():
            runner.make_ready(part, step, *numbers)
        texts.begin([row], most)
        parts.start.zero_()
        parts.choose("whole")
        parts.read(texts.tokens[:, : len(row)])
        middle = over_plain([kind for kind in kinds if kind != "plain"], "plain", seconds)
    a_layer = (1 - middle["guess"]) / (layers - parts.depth)
    guesses = {depth: max(0.0, 1 - a_layer * (layers - depth)) for depth in range(1, layers)}
    pairs = middle.get(2, 1.0)
    more = (middle[most] - pairs) / (most - 2) if most > 2 else 0.0
    runs = [1.0, *(max(1.0, pairs + more * (n - 2)) for n in range(2, most + 1))]
    return guesses, runs, max(0.0, middle["guess"] - middle["no guess"])


def fixed_drafting(
    network: Any,
    proven_exit: ProvenExit,
    texts: Sequence[Guesses],
    rows: Sequence[Tensor],
    longest: int,
    backend: str | None,
    exit_layer: int | None = None,
    draft_tokens: int | None = None,
) -> Drafting:
    """The way to draft by steps of fixed shapes that a replay of texts finds fastest.

    It never stops where a guess is unsure, since the host would have to wait for every guess.

    Args:
        network, proven_exit: of one model.
        texts: what its exits said of texts that it wrote.
        rows: prompts, ``[1, T]`` each.
        longest: tokens that a check may write.
        backend: of ``torch.compile``.
        exit_layer, draft_tokens: None considers all.

    Raises:
        UnsupportedModelError, InvalidInputError: see :class:`softtrace.decoding.StaticDecoder`.
    """
    row, layers = max(rows, key=lambda each: each.shape[1])[0], proven_exit.layers
    decoder = StaticDecoder(
        network, exit_layer=layers // 2, draft_tokens=longest, proven_exit=proven_exit,
        capacity=max(8, len(row) + longest), backend=backend, eos_token_id=-1,
    )  # fmt: skip
    costs, whole, head = fixed_costs(decoder, row)
    depths = costs if exit_layer is None else (exit_layer,)
    checks = check_costs(costs, whole)
    return best_drafting(texts, depths, costs, checks, draft_tokens, 0.0, head)
