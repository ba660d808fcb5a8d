"""What races between ways to decode rest on: texts of one length, costs of guesses and checks."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from softtrace.decoding.confidence import surest
from softtrace.decoding.greedy_choice import greedy_choice
from softtrace.decoding.recommend import guesses_of
from softtrace.decoding.replay import Guesses
from softtrace.decoding.speculative import greedy
from softtrace.decoding.split_model import first_layers, forget, without_head
from softtrace.model.wrappers import forward_parameters, with_cache
from softtrace.tracing.attach import attach

K = TypeVar("K")

_REPEATS = 15


def is_of(density: Path, model: str) -> bool:
    """Whether a ``density.json`` is of this model, however its path was written."""
    try:
        measured = json.loads(density.read_text(encoding="utf-8"))["model"]["path"]
    except (ValueError, KeyError, TypeError):
        return False
    same: bool = measured == model or Path(measured).resolve() == Path(model).resolve()
    return same


def write_past_ends(network: Any) -> None:
    """Let every text be as long as asked for: nothing in the generation config ends it before.

    And let loops that draft run: over a cache that can be cut, and for tokens alone.
    """
    own = network.generation_config
    for name in ("eos_token_id", "stop_strings", "max_time", "exponential_decay_length_penalty"):
        setattr(own, name, None)
    own.return_dict_in_generate, own.use_cache = False, True
    if "static" in (own.cache_implementation or ""):
        own.cache_implementation = None


@torch.no_grad()
def guesses_on(network: nn.Module, rows: Sequence[Tensor], new_tokens: int) -> list[Guesses]:
    """What exits say about what the model writes, which no end of text may cut short."""
    instrument, texts = attach(network), []
    for row in tqdm(rows, desc="looking at exits", unit="prompt"):
        tokens = greedy(network, row, new_tokens).tokens
        choice = greedy_choice(network, row, new_tokens, ())
        # The last token is nobody's context; its prediction was never asked for.
        whole = torch.cat((row, tokens[None, :-1]), dim=1)
        batch = instrument.batch(whole)
        recording = instrument.record(batch, keep_hidden=True, keep_attention=False)
        explained = slice(row.shape[1] - 1, None)
        texts.append(guesses_of(instrument, recording, explained, tokens[None], choice=choice))
    return texts


def over_plain(kinds: Iterable[K], plain: K, seconds: Callable[[K], float]) -> dict[K, float]:
    """Time of each kind of work over that of the plain one.

    The plain one is timed before and after each; medians of the ratios.

    Args:
        kinds: of work.
        plain: the kind that others are compared with.
        seconds: does work of a kind once, and gives how long it took.
    """
    ratios: dict[K, list[float]] = {kind: [] for kind in kinds}
    for turn in range(_REPEATS):
        before = seconds(plain)
        for kind, found in ratios.items():
            spent = seconds(kind)
            after = seconds(plain)
            if turn:  # the first call of anything is slow
                found.append(2 * spent / (before + after))
            before = after
    return {kind: statistics.median(found) for kind, found in ratios.items()}


@torch.inference_mode()
def costs_of(
    network: nn.Module, row: Tensor, layers: int, longest: int
) -> tuple[dict[int, float], list[float], float]:
    """Costs of guesses by each number of layers, of runs over 1, 2, ... tokens, and of choosing.

    They are times over that of one token through all layers (:func:`over_plain`); a run over
    several tokens counts as no cheaper than one. The work of the loop around the model is in them:
    reading which token was chosen and how sure a guess is, and taking tokens out of the cache again
    after a check. Choosing a token, which is a part of a guess, takes the final norm, the head and
    that reading.
    """
    cache, base = DynamicCache(), without_head(network)
    options = with_cache(forward_parameters(network), cache)
    network(input_ids=row, **options)

    def seconds(kind: tuple[int | None, int]) -> float:
        depth, count = kind
        read = row[:, :1].expand(1, count)
        began = now(row)
        if depth is None:  # one layer, and nothing is chosen
            with first_layers(network, 1):
                base(input_ids=read, **options)
            spent = now(row) - began
            forget(cache.layers[:1], count)
            return spent
        with first_layers(network, depth):
            logits = network(input_ids=read, **options).logits
        best = logits[0].argmax(-1)
        if depth < layers:
            float(surest(logits[0, -1]))
        best.tolist()
        spent = now(row) - began
        forget(cache.layers[:depth], count)
        return spent if count == 1 else now(row) - began

    kinds = [(None, 1), *((depth, 1) for depth in range(1, layers))]
    kinds += [(layers, tokens) for tokens in range(2, longest + 1)]
    middle = over_plain(kinds, (layers, 1), seconds)
    guesses = {depth: middle[depth, 1] for depth in range(1, layers)}
    runs = [1.0, *(max(1.0, middle[layers, n]) for n in range(2, longest + 1))]
    return guesses, runs, max(0.0, middle[1, 1] - middle[None, 1])


def now(like: Tensor) -> float:
    """Seconds, after all that the device of ``like`` was told to do is done."""
    if like.device.type != "cpu":
        torch.accelerator.synchronize(like.device)
    return time.perf_counter()


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of at least one number."""
    if len(values) < 2:
        return {"median": values[0], "q25": values[0], "q75": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high}
