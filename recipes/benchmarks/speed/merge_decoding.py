"""Put what ``compiled_decoding.py`` measured into the results that pages are made of.

    python -m recipes.benchmarks.speed.merge_decoding OF_SEED_0 OF_SEED_1 OF_SEED_2

What is there of the same kind is replaced, not pooled: of one size; of all models that were trained
from one on one text; of transformers' loops on these; on one kind of machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.benchmarks.places import RESULTS
from softtrace.files import write_json

Kind = tuple[str, str, str]
_NAMED_BY = (
    "model", "batch", "backend", "draft", "draft_tokens", "share", "given_acceptance", "loop",
    "agreement_asked",
)  # fmt: skip


def kind_of(record: dict[str, Any], row: dict[str, Any]) -> Kind:
    """What a row is replaced together with: a machine, a model and its text, and a way."""
    model = str(row["model"])
    if "-seed-" in model:  # smollm2-135m-prose-...
        model = "-".join(model.split("-")[:3])
    way = next((name for name in ("loop", "agreement_asked") if name in row), "drafts")
    return str(record["hardware"]), model, way


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Old records without what is new, then the new ones without what failed.

    Raises:
        SystemExit: two new records hold the same row, which would count twice.
    """
    new = [
        {**record, "found": [row for row in record["found"] if "failed" not in row]}
        for record in new
    ]
    seen = set()
    for record in new:
        for row in record["found"]:
            named = record["hardware"], *(row.get(name) for name in _NAMED_BY)
            if named in seen:
                raise SystemExit(f"measured twice: {named}; leave one of the files out")
            seen.add(named)
    replaced = {kind_of(record, row) for record in new for row in record["found"]}
    kept = [
        {**record, "found": [r for r in record["found"] if kind_of(record, r) not in replaced]}
        for record in old
    ]
    return [record for record in (*kept, *new) if record["found"]]


def main(given: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, default=RESULTS / "compiled_decoding.json")
    args = parser.parse_args(given)

    def records(file: Path) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["measurements"]
        return found

    old = records(args.into) if args.into.exists() else []
    new = [record for file in args.files for record in records(file)]
    write_json(args.into, {"measurements": merged(old, new)})


if __name__ == "__main__":
    main()
