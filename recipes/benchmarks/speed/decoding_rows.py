"""What ``compiled_decoding.py`` measures, row by row, and which rows a result holds already."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.benchmarks.speed.decoded_models import WITHOUT_MAP, exits_of, folders_of, has_map

LOOPS: dict[str, dict[str, Any]] = {
    "eager": {},
    "static cache, compiled": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 8},
    "assisted": {},
}
"""transformers' own, by options of ``generate``; the last drafts by an early exit."""


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is to be measured, what matters most first."""
    folders = [*map(str, folders_of(args.trained, args.names, args.seeds))]
    exits = dict.fromkeys(args.models, args.exits)
    exits |= {name: exits_of(Path(name), args.exits) for name in folders}
    named = {
        "sizes": args.models if "sizes" in args.parts else [],
        "trained": folders if "trained" in args.parts else [],
    }
    batches = {"sizes": args.batches, "trained": args.trained_batches or args.batches[:1]}
    every = dict.fromkeys([*args.batches, *batches["trained"]])
    for batch, backend, part in itertools.product(every, args.backends, named):
        for name in named[part] if batch in batches[part] else ():
            common = {"model": name, "batch": batch, "backend": backend}
            for draft, guesses in itertools.product(args.drafts, args.draft_tokens):
                if draft != "exit" and part == "sizes":
                    continue  # nothing is found in texts that mean nothing
                if draft == WITHOUT_MAP and not has_map(Path(name)):
                    continue
                for share in exits[name][:1] if draft == "lookup" else exits[name]:
                    yield {**common, "draft": draft, "draft_tokens": guesses, "share": share}
    alone = {"batch": 1, "backend": "none"}
    for name in folders if "early" in args.parts else ():
        for share, agreement in itertools.product(exits[name], args.agreements):
            yield {"model": name, **alone, "agreement_asked": agreement, "share": share}
    if "stock" in args.parts:
        for name, loop in itertools.product([*named["sizes"], *folders], args.loops):
            depth = {"share": exits[name][0]} if loop == "assisted" else {}
            yield {"model": name, **alone, "loop": loop, **depth}


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as results say it: without the folders of a machine."""
    return {**row, "model": Path(row["model"]).name}


def said(row: dict[str, Any], found: dict[str, Any]) -> str:
    """One line on a measurement."""
    where = ", ".join(f"{name} {value}" for name, value in shown(row).items())
    if "failed" in found:
        return f"{where}: failed, {found['failed'][:300]}"
    if "loop" in row:
        return f"{where}: {found['tokens_per_second']['median']:.0f} tokens a second"
    if "agreement_asked" in row:
        return f"{where}: {found['left_out'] or found}"
    return (
        f"{where}, exit {found['exit_layer']} of {found['layers']}, acceptance "
        f"{found['given_acceptance']}: {found['speedup']['median']:.2f} times plain decoding's "
        f"{found['plain_tokens_per_second']['median']:.0f} tokens a second"
    )


def record_in(file: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All results, and in them the record of measurements with these settings, new or begun."""
    result = json.loads(file.read_text("utf-8")) if file.exists() else {"measurements": []}
    for record in result["measurements"]:
        if all(record.get(name) == value for name, value in settings.items()):
            return result, record
    record = {**settings, "found": []}
    result["measurements"].append(record)
    return result, record


def is_of(found: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a result is of a row."""
    return all(found.get(name) == value for name, value in shown(row).items()) and (
        ("loop" in found) == ("loop" in row)
    )
