"""``softtrace decode-bench``: what a model's early exits are worth in decoding, measured.

Source of the method: LayerSkip (arXiv 2404.16710), section 4.3; confidence gating: CALM
(arXiv 2207.07061), here as agreement against layers used, without its state propagation.
"""

from __future__ import annotations

import itertools
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from softtrace.anatomy.discovery import learned_positions
from softtrace.data.documents import evenly, pack
from softtrace.data.text_source import TextSource
from softtrace.decoding.exit_checks import (
    ProvenExit,
    check_cache,
    check_early_exit,
    check_exit_layer,
)
from softtrace.decoding.recommend import GATES, gated_exits, guesses_of
from softtrace.decoding.replay import LONGEST, Drafting, Guesses, best_drafting, check_costs
from softtrace.decoding.speculative import Generation, generate, greedy, speculate
from softtrace.decoding.split_model import first_layers, forget
from softtrace.errors import OutputExistsError
from softtrace.evaluation.processes import device_of
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.run_options import DEFAULT_RUN, RunOptions
from softtrace.files import OVERWRITE, check_output, prepare_output, write_json
from softtrace.graph.batch import check_counts, check_least, check_length, check_range
from softtrace.model.loading import check_model_directory, load_model, load_tokenizer
from softtrace.report.decoding_table import decoding_table
from softtrace.tracing.attach import attach

_NEVER = -1  # no token: both loops write as many tokens as were asked for
_REPEATS = 15


def decode_bench(
    model: str,
    source: TextSource,
    out: str,
    prompts: int = 16,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    exit_layer: int | None = None,
    draft_tokens: int | None = None,
    confidence: float | None = None,
    rounds: int = 2,
    run: RunOptions = DEFAULT_RUN,
) -> dict[str, Any]:
    """Measure acceptance and speed of self-speculation, and write them to OUT.

    OUT/decoding.json holds the result. Where OUT/density.json is of the same model, as softtrace
    evaluate wrote it, its section "decoding" is written too, and OUT need not be empty.

    Args:
        model: Model directory (safetensors) or hub name.
        source: The text that prompts are cut from.
        out: Folder that decoding.json is written to. It must be new, empty, or hold a density.json
            of the same model, which gets a section "decoding".
        prompts: Number of prompts that are timed, evenly spaced over the text. As many others,
            between them, are what the way to draft is chosen on. A text that is too short for both
            is shared out, and a single block serves for both.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens that are written for each prompt; an end-of-text token does not stop
            them.
        exit_layer: Number of layers that draft; by default the best one, which is found by
            replaying what each exit said of those texts with the time that was measured for it.
        draft_tokens: Number of guesses before a check at most; the best one by default.
        confidence: A guess with a lower probability than this ends its draft; the best bound by
            default.
        rounds: How often every prompt is timed.
        run: How the model is run.

    Raises:
        ModelDirectoryError: no model there.
        UnsupportedModelError: a model whose early exits are no exits.
        DataError, InvalidInputError: the text or a number.
        OutputExistsError: OUT holds other things.
    """
    check_counts(1, prompts=prompts, rounds=rounds)
    check_counts(2, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    check_least("draft_tokens", draft_tokens, 1, optional=True)
    if confidence is not None:
        check_range("confidence", confidence, 0, 1)
    where = device_of(run.device)
    density = Path(out) / "density.json"
    beside = density.is_file() and _is_of(density, model)
    if beside and not run.overwrite and (Path(out) / "decoding.json").exists():
        raise OutputExistsError(f"{out}: found a decoding.json; pass {OVERWRITE} to replace it")
    check_output(out, run.overwrite or beside)
    check_model_directory(model)
    tokenizer = load_tokenizer(model)
    starts = evenly(pack(source.documents(), tokenizer, prompt_tokens), 2 * prompts)
    network = load_model(model, dtype=run.dtype).to(where).eval()  # type: ignore[arg-type]
    check_length(prompt_tokens + new_tokens, learned_positions(network), "prompt and new tokens")
    proven_exit = check_cache(check_early_exit(network))
    layers = proven_exit.layers
    if exit_layer is not None:
        check_exit_layer(exit_layer, layers)
    rows = [row[None].to(where) for row in starts[::2]]
    chosen_on = [row[None].to(where) for row in starts[1::2]] or rows
    texts = _guesses(network, chosen_on, new_tokens)
    by_exit = zip(*(text.right for text in texts), strict=True)
    gated = [gated_exits(texts, gate) for gate in GATES]
    longest = min(draft_tokens or LONGEST, new_tokens - 1)  # the first comes with the prompt
    costs, whole = _costs(network, rows[0], layers, longest)
    checks = check_costs(costs, whole)
    ways = {
        layer: best_drafting(texts, (layer,), costs, checks, draft_tokens, confidence)
        for layer in costs
    }
    way = ways[exit_layer] if exit_layer else max(ways.values(), key=lambda each: each.speedup)
    found = {
        "prompts": len(rows),
        "prompts_chosen_on": len(chosen_on),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "exits": {
            "layers": list(costs),
            "agreement": [statistics.mean(itertools.chain(*right)) for right in by_exit],
            "draft_cost": list(costs.values()),
            "expected_speedup": [each.speedup for each in ways.values()],
        },
        "whole_cost": whole,
        "check_cost": checks[way.exit_layer],
        "exit_layer": way.exit_layer,
        "draft_tokens": way.draft_tokens,
        "confidence": way.confidence,
        "expected": {
            "speedup": way.speedup,
            "drafted": way.drafted,
            "accepted": way.accepted,
            "checks": way.checks,
        },
        "loops": _race(network, proven_exit, rows, way, new_tokens, rounds),
        "gated": {
            "confidence": list(GATES),
            "layers_used": [used for used, _ in gated],
            "agreement": [right for _, right in gated],
        },
        "model": model,
        "data": source.data,
        "dtype": run.dtype,
        **provenance(where),
    }
    folder = prepare_output(out, run.overwrite or beside)
    write_json(folder / "decoding.json", found)
    if beside:
        write_json(density, {**json.loads(density.read_text(encoding="utf-8")), "decoding": found})
    print(decoding_table(found))
    print(f"\nwritten to {folder}/: decoding.json{' and density.json' if beside else ''}")
    return found


def _is_of(density: Path, model: str) -> bool:
    """Whether a ``density.json`` is of this model, however its path was written."""
    try:
        measured = json.loads(density.read_text(encoding="utf-8"))["model"]["path"]
    except (ValueError, KeyError, TypeError):
        return False
    same: bool = measured == model or Path(measured).resolve() == Path(model).resolve()
    return same


@torch.no_grad()
def _guesses(network: nn.Module, rows: Sequence[Tensor], new_tokens: int) -> list[Guesses]:
    """What exits say about what the model writes."""
    instrument, texts = attach(network), []
    for row in tqdm(rows, desc="looking at exits", unit="prompt"):
        tokens = greedy(network, row, new_tokens, _NEVER).tokens
        # The last token is nobody's context; its prediction was never asked for.
        whole = torch.cat((row, tokens[None, :-1]), dim=1)
        batch = instrument.batch(whole)
        recording = instrument.record(batch, keep_hidden=True, keep_attention=False)
        texts.append(guesses_of(instrument, recording, slice(row.shape[1] - 1, None), tokens[None]))
    return texts


@torch.inference_mode()
def _costs(
    network: nn.Module, row: Tensor, layers: int, longest: int
) -> tuple[dict[int, float], list[float]]:
    """Time of a guess by each number of layers, and of the whole model over 1, 2, ... tokens.

    Both over the time of one token through all layers, which is taken before and after each;
    medians of these ratios, several tokens no cheaper than one. With what the loop does besides
    running the model: reading the choice, and how sure a guess is, and after a check taking tokens
    out of the cache again.
    """
    cache = DynamicCache()
    network(input_ids=row, past_key_values=cache, use_cache=True)

    def seconds(depth: int, count: int) -> float:
        read = row[:, :1].expand(1, count)
        began = _now(row)
        with first_layers(network, depth):
            logits = network(input_ids=read, past_key_values=cache, use_cache=True).logits
        best = logits[0].argmax(-1)
        if depth < layers:
            float(logits[0, -1].float().softmax(-1)[best[-1]])
        best.tolist()
        spent = _now(row) - began
        forget(cache.layers[:depth], count)
        return spent if count == 1 else _now(row) - began

    kinds = [(depth, 1) for depth in range(1, layers)]
    kinds += [(layers, tokens) for tokens in range(2, longest + 1)]
    ratios: dict[tuple[int, int], list[float]] = {kind: [] for kind in kinds}
    for turn in range(_REPEATS):
        before = seconds(layers, 1)
        for kind, found in ratios.items():
            spent = seconds(*kind)
            after = seconds(layers, 1)
            if turn:  # the first call of anything is slow
                found.append(2 * spent / (before + after))
            before = after
    middle = {kind: statistics.median(found) for kind, found in ratios.items()}
    guesses = {depth: middle[depth, 1] for depth in range(1, layers)}
    return guesses, [1.0, *(max(1.0, middle[layers, n]) for n in range(2, longest + 1))]


def _now(like: Tensor) -> float:
    if like.device.type != "cpu":
        torch.accelerator.synchronize(like.device)
    return time.perf_counter()


def _race(
    network: nn.Module,
    proven_exit: ProvenExit,
    rows: Sequence[Tensor],
    way: Drafting,
    new_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """Each loop against plain decoding by the same loop, prompt by prompt in turns."""

    def direct(row: Tensor) -> Generation:
        return speculate(
            network, row, exit_layer=way.exit_layer, max_new_tokens=new_tokens,
            draft_tokens=way.draft_tokens, confidence=way.confidence, eos_token_id=_NEVER,
            proven_exit=proven_exit,
        )  # fmt: skip

    loops: dict[str, tuple[Callable[[Tensor], Generation], Callable[[Tensor], Generation]]] = {
        "direct": (lambda row: greedy(network, row, new_tokens, _NEVER), direct),
        "transformers": (
            lambda row: _stock(network, row, way, new_tokens, None),
            lambda row: _stock(network, row, way, new_tokens, proven_exit),
        ),
    }
    results = {}
    for name, pair in loops.items():
        ratios: list[float] = []
        speeds: tuple[list[float], list[float]] = ([], [])
        same, found = 0, []
        with tqdm(total=rounds * len(rows), desc=f"decoding, {name} loop", unit="prompt") as bar:
            for turn in range(rounds + 1):  # the first one warms up
                for row in rows if turn else rows[:1]:
                    outputs, seconds = [], []
                    for loop in pair:
                        began = _now(row)
                        outputs.append(loop(row))
                        seconds.append(_now(row) - began)
                    if not turn:
                        continue
                    ratios.append(seconds[0] / seconds[1])
                    for speed, spent in zip(speeds, seconds, strict=True):
                        speed.append(new_tokens / spent)
                    same += torch.equal(outputs[0].tokens, outputs[1].tokens)
                    found.append(outputs[1])
                    bar.update()
        results[name] = {
            "plain_tokens_per_second": statistics.median(speeds[0]),
            "tokens_per_second": statistics.median(speeds[1]),
            "speedup": quartiles(ratios),
            "identical": same / len(ratios),
        }
        if name == "direct":
            drafted, accepted = sum(g.drafted for g in found), sum(g.accepted for g in found)
            results[name] |= {
                "drafted": drafted,
                "accepted": accepted,
                "checks": sum(g.checks for g in found),
                "acceptance": accepted / drafted,
            }
    return results


def _stock(
    network: Any, row: Tensor, way: Drafting, new_tokens: int, proven_exit: ProvenExit | None
) -> Generation:
    """transformers' own loop, plain where no exit is given; what it drafts it does not say."""
    own = network.generation_config
    kept = {
        name: getattr(own, name)
        for name in ("eos_token_id", "num_assistant_tokens", "assistant_confidence_threshold")
    }
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        # The loop reads these from the model's own config alone.
        own.num_assistant_tokens = way.draft_tokens
        own.assistant_confidence_threshold = way.confidence
        own.eos_token_id = None
        options = {"max_new_tokens": new_tokens, "do_sample": False}
        if proven_exit is not None:
            whole = generate(network, row, way.exit_layer, proven_exit=proven_exit, **options)
        else:
            mask = torch.ones_like(row)
            whole = network.generate(row, attention_mask=mask, **options)
    finally:
        transformers_logging.set_verbosity(level)
        for name, value in kept.items():
            setattr(own, name, value)
    return Generation(whole[0, row.shape[1] :], 0, 0, 0)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of at least one number."""
    if len(values) < 2:
        return {"median": values[0], "q25": values[0], "q75": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high}
