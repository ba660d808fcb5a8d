"""``softtrace decode-bench``: what a model's early exits are worth in decoding, measured.

Source of the method: LayerSkip (arXiv 2404.16710), section 4.3; confidence gating: CALM
(arXiv 2207.07061), here as agreement against layers used, without its state propagation.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softtrace.anatomy.discovery import learned_positions
from softtrace.checks import check_choice, check_counts, check_least, check_range
from softtrace.data.blocks import evenly, pack
from softtrace.data.prompts import whole_prompts as prompts_of
from softtrace.data.split_record import unseen
from softtrace.data.text_source import TextSource
from softtrace.decoding.exit_checks import (
    check_cache,
    check_early_exit,
    check_exit_layer,
)
from softtrace.decoding.recommend import GATES, gated_exits
from softtrace.decoding.replay import LONGEST, best_drafting, check_costs
from softtrace.errors import OutputExistsError
from softtrace.evaluation.decode_race import costs_of, guesses_on, is_of, write_past_ends
from softtrace.evaluation.decode_ways import race_ways
from softtrace.evaluation.early_race import race_early
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.run_options import DEFAULT_RUN, RunOptions
from softtrace.files import OVERWRITE, check_output, claims_out, prepare_output, write_json
from softtrace.graph.batch import check_length
from softtrace.model.devices import device_of
from softtrace.model.loading import check_model_directory, dtype_name, load_model, load_tokenizer
from softtrace.report.decoding_table import decoding_table


@claims_out
def decode_bench(
    model: str,
    source: TextSource,
    out: str,
    prompts: int = 16,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    whole_prompts: bool = False,
    exit_layer: int | None = None,
    draft_tokens: int | None = None,
    confidence: float | None = None,
    rounds: int = 2,
    backend: str = "auto",
    agreement: float = 0.95,
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
        prompt_tokens: Tokens of each prompt; of whole ones at most.
        new_tokens: Tokens that are written for each prompt; an end-of-text token does not stop
            them.
        whole_prompts: Take every document as one prompt of its own length, up to its first answer
            where it has a completion or is a conversation, and the last tokens of one that is too
            long. Otherwise prompts are cut from the text in a row.
        exit_layer: Number of layers that draft; by default the best one, which is found by
            replaying what each exit said of those texts with the time that was measured for it:
            one for eager loops, and one for steps of fixed shapes.
        draft_tokens: Number of tokens that a check writes at most; the best one by default.
        confidence: A guess with a lower probability than this ends its draft; the best bound by
            default.
        rounds: How often every prompt is timed.
        backend: What compiles the steps of fixed shapes: "inductor" or another backend of
            torch.compile, "none", or "auto": inductor on CUDA, none elsewhere, where compiling
            takes minutes.
        agreement: How often the whole model is to agree to tokens that go out early without a
            check; how sure the exit has to be for that is chosen on the other prompts.
        run: How the model is run.

    Raises:
        ModelDirectoryError: no model there.
        UnsupportedModelError: a model whose early exits are no exits.
        DataError, InvalidInputError: the text (also where the model was trained on what is to be
            held out) or a number.
        OutputExistsError: OUT holds other things, or another run writes to it.
    """
    check_counts(1, prompts=prompts, rounds=rounds)
    check_counts(2, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    check_least("draft_tokens", draft_tokens, 1, optional=True)
    check_choice("backend", backend, ("auto", "none", *torch.compiler.list_backends(None)))
    check_range("agreement", agreement, 0, 1)
    if confidence is not None:
        check_range("confidence", confidence, 0, 1)
    where = device_of(run.device)
    density = Path(out) / "density.json"
    beside = density.is_file() and is_of(density, model)
    if beside and not run.overwrite and (Path(out) / "decoding.json").exists():
        raise OutputExistsError(f"{out}: found a decoding.json; pass {OVERWRITE} to replace it")
    check_output(out, run.overwrite or beside)
    check_model_directory(model)
    tokenizer = load_tokenizer(model)
    documents = list(unseen(source.stream(), [model], source.held_out_share))
    starts: Sequence[Tensor]
    if whole_prompts:
        starts = prompts_of(documents, tokenizer, prompt_tokens, 2 * prompts)
    else:
        blocks = pack(documents, tokenizer, prompt_tokens, option="prompt_tokens")
        starts = [*evenly(blocks, 2 * prompts)]
    network = load_model(model, dtype=run.dtype).to(where).eval()  # type: ignore[arg-type]
    check_length(prompt_tokens + new_tokens, learned_positions(network), "prompt and new tokens")
    proven_exit = check_cache(check_early_exit(network))
    layers = proven_exit.layers
    if exit_layer is not None:
        check_exit_layer(exit_layer, layers)
    rows = [row[None].to(where) for row in starts[::2]]
    chosen_on = [row[None].to(where) for row in starts[1::2]] or rows
    write_past_ends(network)
    texts = guesses_on(network, chosen_on, new_tokens)
    by_exit = zip(*(text.right for text in texts), strict=True)
    gated = [gated_exits(texts, gate) for gate in GATES]
    longest = min(draft_tokens or LONGEST, new_tokens - 1)  # the first comes with the prompt
    costs, whole, head = costs_of(network, rows[0], layers, longest)
    checks = check_costs(costs, whole)
    ways = {
        layer: best_drafting(texts, (layer,), costs, checks, draft_tokens, confidence, head)
        for layer in costs
    }
    way = ways[exit_layer] if exit_layer else max(ways.values(), key=lambda each: each.speedup)
    named = ("inductor" if where.type == "cuda" else "none") if backend == "auto" else backend
    compiler = None if named == "none" else named
    found = {
        "prompts": len(rows),
        "prompts_chosen_on": len(chosen_on),
        "prompt_tokens": prompt_tokens,
        "whole_prompts": whole_prompts,
        "new_tokens": new_tokens,
        "exits": {
            "layers": list(costs),
            "agreement": [statistics.mean(itertools.chain(*right)) for right in by_exit],
            "draft_cost": list(costs.values()),
            "expected_speedup": [each.speedup for each in ways.values()],
        },
        "head_cost": head,
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
        **race_ways(
            network,
            proven_exit,
            rows,
            way,
            new_tokens,
            rounds,
            compiler,
            texts,
            (exit_layer, draft_tokens),
        ),
        "early": race_early(
            network, proven_exit, texts, rows, way.exit_layer, new_tokens, agreement
        ),
        "gated": {
            "confidence": list(GATES),
            "layers_used": [used for used, _ in gated],
            "agreement": [right for _, right in gated],
        },
        "model": model,
        "data": source.data,
        "dtype": dtype_name(network.dtype),
        **provenance(where),
    }
    folder = prepare_output(out, run.overwrite or beside)
    write_json(folder / "decoding.json", found)
    if beside:
        write_json(density, {**json.loads(density.read_text(encoding="utf-8")), "decoding": found})
    print(decoding_table(found))
    print(f"\nwritten to {folder}/: decoding.json{' and density.json' if beside else ''}")
    return found
