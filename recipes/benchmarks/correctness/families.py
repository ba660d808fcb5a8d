"""Which causal-LM types of the installed transformers are verified, and which are refused and why.

    python -m recipes.benchmarks.correctness.families

Builds a tiny random model of every case of ``tests/support/zoo.py``, attaches to it and, where it
is accepted, compares importances and a masked run with a literal reference
(``tests/support/reference.py``) on a padded batch. Writes ``families.json`` and ``families.md`` in
``results/``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import softtrace
from recipes.benchmarks.places import RESULTS
from softtrace.decoding import check_cache, check_early_exit
from softtrace.errors import UnsupportedModelError
from softtrace.evaluation.provenance import provenance
from softtrace.files import atomic_path, write_json
from tests.support.matrix import literal_errors, padded
from tests.support.zoo import REFUSED, VERIFIED, tiny


def verified(case: str) -> dict[str, Any]:
    """Attach and compare; a case of the zoo that fails either raises."""
    kind, changes = VERIFIED[case]
    model = tiny(kind, **changes)
    instrument = softtrace.attach(model)
    return {
        "case": case,
        "type": kind,
        "verdict": "verified",
        "pattern": instrument.anatomy.pattern,
        "attention": instrument.anatomy.route,
        "proof": instrument.verification.largest,
        **literal_errors(case, model),
        "early_exit": exits(model),
        **{
            str(dtype).removeprefix("torch."): half_difference(model, dtype)
            for dtype in (torch.bfloat16, torch.float16)
        },
    }


def exits(model: Any) -> bool:
    """Whether the model's early exits were proven, so that it can draft for itself."""
    try:
        check_cache(check_early_exit(model))
    except UnsupportedModelError:
        return False
    return True


@torch.no_grad()
def half_difference(model: Any, dtype: torch.dtype) -> float:
    """Mean difference of an importance between a half-precision model and float32's.

    Both have the same weights, those that half precision rounds to.
    """
    ids, mask = padded()
    rounded = copy.deepcopy(model).to(dtype)
    found = softtrace.edge_importance(rounded, ids, mask)
    expected = softtrace.edge_importance(copy.deepcopy(rounded).float(), ids, mask)
    pairs = zip(found.layers, expected.layers, strict=True)
    differences = [(a - b).abs().flatten() for x, y in pairs for a, b in zip(x, y, strict=True)]
    return float(torch.cat(differences).mean())


def refused(case: str) -> dict[str, Any]:
    """The reason why a type is refused."""
    kind, changes, _ = REFUSED[case]
    try:
        softtrace.attach(tiny(kind, **changes))
    except UnsupportedModelError as error:
        return {"case": case, "type": kind, "verdict": "refused", "reason": str(error)}
    raise AssertionError(f"{case} was accepted")


def main() -> None:
    """Run the matrix and write both files."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    transformers.logging.set_verbosity_error()
    accepted = [verified(case) for case in tqdm(sorted(VERIFIED), desc="verified")]
    denied = [refused(case) for case in tqdm(sorted(REFUSED), desc="refused")]
    tried = {row["type"] for row in accepted + denied}
    untried = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - tried)
    result = {
        "types_verified": len({row["type"] for row in accepted}),
        "types_of_transformers": len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "verified": accepted,
        "refused": denied,
        "untried": untried,
        **provenance(torch.device("cpu")),
    }
    write_json(RESULTS / "families.json", result)
    with atomic_path(RESULTS / "families.md") as path:
        path.write_text("\n".join(page(result)) + "\n", encoding="utf-8")
    print(f"{result['types_verified']} types verified, {len(denied)} cases refused")


def page(result: dict[str, Any]) -> Iterator[str]:
    """The tables in Markdown."""
    versions = result["versions"]
    yield "# Model families"
    yield ""
    yield (
        f"{result['types_verified']} of the {result['types_of_transformers']} causal-LM types of "
        f"transformers {versions['transformers']} are verified, as tiny random models built from "
        f"their configs (torch {versions['torch']}, {result['created'][:10]}, float32). Written by "
        "`make families`; tested by `tests/anatomy/test_zoo.py`."
    )
    yield ""
    yield (
        "*proof*: the largest relative mismatch of the checks at attach time. *importance*, "
        "*masked*: the largest difference of an importance (a share of 1) and of a logit of a run "
        "with random edges masked from a literal reference that materialises every edge, on a "
        "padded batch. *attention*: through transformers' interface, or caught at the softmax of "
        "the model's own code (interception). *bf16*, *fp16*: the mean difference of an importance "
        "from float32 with the same weights (mixtures of experts may send a token elsewhere). "
        "*exits*: whether `softtrace.decoding` can draft with the first layers; the others ignore "
        "an early exit, or need a cache of their own, and are refused."
    )
    yield ""
    yield (
        "| type | pattern | attention | verdict | proof | importance | masked | bf16 | fp16 "
        "| exits |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in result["verified"]:
        yield (
            f"| {row['case']} | {row['pattern']} | {row['attention']} | verified "
            f"| {row['proof']:.0e} | {row['importance']:.0e} | {row['masked']:.0e} "
            f"| {row['bfloat16']:.0e} | {row['float16']:.0e} "
            f"| {'yes' if row['early_exit'] else 'no'} |"
        )
    yield ""
    yield "## Refused, with the reason that is given"
    yield ""
    yield "| type | reason |"
    yield "|---|---|"
    for row in result["refused"]:
        yield f"| {row['case']} | {row['reason'].replace('|', chr(92) + '|')} |"
    yield ""
    yield "## Not tried"
    yield ""
    yield (
        "These have no tiny config here (most also take images or audio); the proof decides when "
        f"one is attached: {', '.join(result['untried'])}."
    )


if __name__ == "__main__":
    main()
