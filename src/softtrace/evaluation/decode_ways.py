"""All ways to write the same texts, timed interleaved on the user's prompts; which one to use."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from softtrace.decoding.exit_checks import ProvenExit
from softtrace.decoding.greedy_choice import greedy_choice
from softtrace.decoding.replay import LONGEST, Drafting, Guesses
from softtrace.decoding.speculative import Generation, generate, greedy, speculate
from softtrace.decoding.static_decoder import StaticDecoder
from softtrace.errors import InvalidInputError, UnsupportedModelError
from softtrace.evaluation.decode_race import now, quartiles
from softtrace.evaluation.fixed_costs import fixed_drafting
from softtrace.model.exit_maps import exit_maps_of

Write = Callable[[Tensor], Generation]
LOOKED_UP = 6
"""Tokens that lookups guess before a check, transformers' and ours."""


def race_ways(
    network: Any,
    proven_exit: ProvenExit,
    rows: Sequence[Tensor],
    way: Drafting,
    new_tokens: int,
    rounds: int,
    backend: str | None,
    texts: Sequence[Guesses] = (),
    asked: tuple[int | None, int | None] = (None, None),
) -> dict[str, Any]:
    """Tokens a second of every way to decode, one after another on each prompt.

    Args:
        network: writes past ends (:func:`softtrace.evaluation.decode_race.write_past_ends`), so
            that all texts are equally long.
        proven_exit: of it.
        rows: prompts, ``[1, T]`` each.
        way: how it drafts.
        new_tokens: tokens that are written for each prompt.
        rounds: how often every prompt is timed.
        backend: of ``torch.compile``; None runs the steps of fixed shapes as they are.
        texts: what exits said of others: by their costs a way is chosen for steps of fixed shapes.
            Without any it is ``way``, which was chosen by the costs of eager loops.
        asked: exit layer and draft tokens that are not to be chosen.

    Returns:
        ``loops``: of the eager loop and of transformers' own, speed with and without drafts, the
        ratio prompt by prompt, and how many guesses the eager loop accepted.
        ``race``: all ways. Of each of its ``ways`` the speed, the share of texts that are the eager
        loop's (and by how much the two tokens' scores differ at most where one begins to be
        another), and the share of guesses that were right, where it says so: of all
        (``acceptance``), and of those that came after right ones (``acceptance_each``).
        ``fixed``: exit layer and draft tokens of the steps of fixed shapes.
        ``left_out``: why there are no steps of fixed shapes, if so. ``use``: the fastest way.
        ``drafts_over_plain``: median ratio of the fastest way that drafts over the fastest that
        does not, prompt by prompt.
    """
    plain: dict[str, Write] = {
        "plain, eager": lambda row: greedy(network, row, new_tokens),
        "plain, transformers": lambda row: _generated(network, row, new_tokens),
    }
    drafted: dict[str, Write] = {
        "exit drafts, eager": lambda row: speculate(
            network, row, exit_layer=way.exit_layer, max_new_tokens=new_tokens,
            draft_tokens=way.draft_tokens, confidence=way.confidence, proven_exit=proven_exit,
        ),
        "exit drafts, transformers": lambda row: _by_exits(
            network, row, way, new_tokens, proven_exit
        ),
        "prompt lookup, transformers": lambda row: _generated(
            network, row, new_tokens, prompt_lookup_num_tokens=LOOKED_UP
        ),
    }  # fmt: skip
    if rows[0].device.type == "cuda":
        plain["plain, transformers, compiled"] = lambda row: _generated(
            network, row, new_tokens, cache_implementation="static"
        )
    left_out, by_fixed = None, way
    try:
        if texts:
            longest = min(asked[1] or LONGEST, new_tokens)
            by_fixed = fixed_drafting(network, proven_exit, texts, rows, longest, backend, *asked)
        fixed = _fixed(network, proven_exit, rows, way, by_fixed, new_tokens, backend)
        first = next(iter(fixed.values()))
        first.plain([rows[0]], 1)  # what cannot be compiled is known here
        for decoder in fixed.values():
            decoder.speculate([rows[0]], 1)
    except (InvalidInputError, UnsupportedModelError) as error:
        left_out = str(error)
    else:
        kind = "fixed shapes" if backend is None else "compiled"
        plain[f"plain, {kind}"] = lambda row: first.plain([row], new_tokens)[0]
        for draft, decoder in fixed.items():
            drafted[f"{draft}, {kind}"] = _drafts(decoder, new_tokens)
    ways = {**plain, **drafted}
    seconds, written = _time(ways, rows, rounds)
    speeds = {name: [new_tokens / spent for spent in each] for name, each in seconds.items()}
    middle = {name: statistics.median(each) for name, each in speeds.items()}
    best_plain, best_draft = (
        max(plain, key=middle.__getitem__),
        max(drafted, key=middle.__getitem__),
    )
    ratios = [a / b for a, b in zip(seconds[best_plain], seconds[best_draft], strict=True)]
    gain = quartiles(ratios)
    loops = {
        name: _loop(seconds, written, f"plain, {kind}", f"exit drafts, {kind}", new_tokens)
        for name, kind in (("direct", "eager"), ("transformers", "transformers"))
    }
    loops["direct"] |= _accepted(written["exit drafts, eager"])
    race = {
        "backend": backend,
        "left_out": left_out,
        "fixed": {"exit_layer": by_fixed.exit_layer, "draft_tokens": by_fixed.draft_tokens},
        "ways": {
            name: {
                "tokens_per_second": quartiles(each),
                "identical": _identical(written["plain, eager"], written[name]),
                "largest_tie": largest_tie(network, rows, written["plain, eager"], written[name]),
                "acceptance": _share(written[name], "drafted"),
                "acceptance_each": _share(written[name], "reached"),
            }
            for name, each in speeds.items()
        },
        "best_plain": best_plain,
        "best_draft": best_draft,
        "drafts_over_plain": gain,
        "use": best_draft if gain["median"] > 1 else best_plain,
    }
    return {"loops": loops, "race": race}


def _loop(
    seconds: dict[str, list[float]],
    written: dict[str, list[Generation]],
    plain: str,
    drafted: str,
    new_tokens: int,
) -> dict[str, Any]:
    """A loop that drafts against the same one that does not, prompt by prompt."""
    return {
        "plain_tokens_per_second": new_tokens / statistics.median(seconds[plain]),
        "tokens_per_second": new_tokens / statistics.median(seconds[drafted]),
        "speedup": quartiles(
            [a / b for a, b in zip(seconds[plain], seconds[drafted], strict=True)]
        ),
        "identical": _identical(written[plain], written[drafted]),
    }


def _accepted(found: Sequence[Generation]) -> dict[str, Any]:
    """Guesses that were made and accepted in all texts, and the checks that it took."""
    return {
        "drafted": sum(each.drafted for each in found),
        "accepted": sum(each.accepted for each in found),
        "checks": sum(each.checks for each in found),
        "acceptance": _share(found, "drafted"),
    }


def _drafts(decoder: StaticDecoder, new_tokens: int) -> Write:
    return lambda row: decoder.speculate([row], new_tokens)[0]


def _fixed(
    network: Any,
    proven_exit: ProvenExit,
    rows: Sequence[Tensor],
    way: Drafting,
    by_fixed: Drafting,
    new_tokens: int,
    backend: str | None,
) -> dict[str, StaticDecoder]:
    """Decoders by how they draft, each way alone; by ``way`` where a guess may be unsure."""
    usual: dict[str, Any] = {
        "exit_layer": by_fixed.exit_layer, "proven_exit": proven_exit, "backend": backend,
        "capacity": max(8, max(row.shape[1] for row in rows) + new_tokens), "eos_token_id": -1,
    }  # fmt: skip
    guesses = {"draft_tokens": by_fixed.draft_tokens}
    options: dict[str, dict[str, Any]] = {
        "exit drafts": guesses,
        "lookup drafts": {"draft": "lookup", "draft_tokens": LOOKED_UP},
        "lookup or exit drafts": {"draft": "both", **guesses},
    }
    if way.confidence:
        options["exit drafts to the first unsure"] = {
            "exit_layer": way.exit_layer, "confidence": way.confidence,
            "draft_tokens": way.draft_tokens,
        }  # fmt: skip
    maps = exit_maps_of(network)
    if maps is not None and maps.weight(by_fixed.exit_layer) is not None:
        options["exit drafts without the map"] = {"exit_map": _as_it_is, **guesses}
    return {name: StaticDecoder(network, **{**usual, **each}) for name, each in options.items()}


def _as_it_is(stream: Tensor) -> Tensor:
    return stream


def _time(
    ways: dict[str, Write], rows: Sequence[Tensor], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[Generation]]]:
    """Seconds of each text, and the texts."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[Generation]] = {name: [] for name in ways}
    with tqdm(total=rounds * len(rows), desc="decoding, all ways", unit="prompt") as bar:
        for turn in range(rounds + 1):  # the first one compiles and warms up
            for row in rows if turn else rows[:1]:
                for name, write in ways.items():
                    began = now(row)
                    text = write(row)
                    spent = now(row) - began
                    if turn:
                        seconds[name].append(spent)
                        texts[name].append(text)
                if turn:
                    bar.update()
    return seconds, texts


def _identical(wanted: Sequence[Generation], found: Sequence[Generation]) -> float:
    same = [torch.equal(a.tokens, b.tokens) for a, b in zip(wanted, found, strict=True)]
    return sum(same) / len(same)


@torch.no_grad()
def largest_tie(
    network: Any, rows: Sequence[Tensor], wanted: Sequence[Generation], found: Sequence[Generation]
) -> float | None:
    """How far apart the scores of two tokens are where two texts begin to differ, at most.

    ``rows`` are the prompts, ``[1, T]`` each, again and again where there are more texts.
    Over the largest score's magnitude: what rounding decides is below a machine epsilon or two.
    None where all texts are the same.
    """
    gaps = []
    for row, first, second in zip(itertools.cycle(rows), wanted, found, strict=False):
        a, b = first.tokens, second.tokens
        if torch.equal(a, b):
            continue
        place = int((a != b).nonzero()[0])
        whole = torch.cat((row, a[None, :place]), dim=1)
        choice = greedy_choice(network, row, len(a), ())
        scores = choice.scores(network(input_ids=whole).logits[0, -1:], a[:place].tolist())[0]
        gap = (scores[a[place]] - scores[b[place]]).abs() / scores[scores.isfinite()].abs().max()
        gaps.append(float(gap))
    return max(gaps, default=None)


def _share(found: Sequence[Generation], of: str) -> float | None:
    """Share of guesses that were right; None where nothing was guessed, or nothing is said."""
    guesses = sum(getattr(each, of) for each in found)
    return sum(each.accepted for each in found) / guesses if guesses else None


def _by_exits(
    network: Any, row: Tensor, way: Drafting, new_tokens: int, proven_exit: ProvenExit
) -> Generation:
    """transformers' own drafts by an exit, of which it does not say how many it accepts."""
    own = network.generation_config
    kept = {
        name: getattr(own, name)
        for name in ("num_assistant_tokens", "assistant_confidence_threshold")
    }
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        # The loop reads these from the model's own config alone.
        own.num_assistant_tokens = max(1, way.draft_tokens - 1)
        own.assistant_confidence_threshold = way.confidence
        whole = generate(
            network, row, way.exit_layer, proven_exit=proven_exit, max_new_tokens=new_tokens,
            do_sample=False,
        )  # fmt: skip
    finally:
        transformers_logging.set_verbosity(level)
        for name, value in kept.items():
            setattr(own, name, value)
    return Generation(whole[0, row.shape[1] :], 0, 0, 0)


def _generated(network: Any, row: Tensor, new_tokens: int, **options: Any) -> Generation:
    whole: Tensor = network.generate(
        row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=new_tokens,
        **options,
    )  # fmt: skip
    return Generation(whole[0, row.shape[1] :][:new_tokens], 0, 0, 0)
