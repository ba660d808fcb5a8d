"""density.json: what is in it, which files are comparable, and how runs are named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from softtrace.errors import DataError, InvalidInputError
from softtrace.tracing.attach import attach

Density = Mapping[str, Any]
"""The content of a ``density.json``."""

DENSITY_VERSION = 1

_NUMBER = (int, float, type(None))  # NaN was written as null
_NUMBERS = [_NUMBER]
_GROUPS = dict.fromkeys(("all", "easy", "hard"), _NUMBER)
_SPREAD = {"mean": _NUMBERS, "q25": _NUMBERS, "q75": _NUMBERS}
_BASELINE = {"residual_kept": _NUMBERS, "residual_not_kept": _NUMBERS}
_EXPECTED: dict[str, Any] = {
    "model": {"path": str, "type": str, "parameters": int, "layers": int},
    "data": {"sha256": str, "split": str, "block_size": int, "blocks": int},
    "tokens": int,
    "min_context": int,
    "attention": str,
    "easy": {"entropy_bound": (int, float)},
    "hard": {"entropy_bound": (int, float)},
    "loss_nats": _GROUPS,
    "area": _GROUPS,
    "size_at_tv_0.2": _GROUPS,
    "entropy_spearman": {"size_at_tv_0.2": _NUMBER},
    "curve": {
        "sizes": _NUMBERS,
        **dict.fromkeys(_GROUPS, _SPREAD),
        "baselines": (None, dict.fromkeys(("random_connected", "inverse"), _BASELINE)),
    },
    "topology": (None, {"sizes": _NUMBERS, "kinds": [str], "shares": [[_NUMBERS]]}),
    "early_exit": {"layers": [int], "agreement": dict.fromkeys(_GROUPS, _NUMBERS)},
    "scatter": {"entropy": _NUMBERS, "size_at_tv_0.2": _NUMBERS},
}
"""What tables and plots read: keys of objects, types, [type] for non-empty lists, (None, this)."""

_LIKELY = [[(int, float)]]
_TOKEN = {
    **dict.fromkeys(("token", "exit_layer", "edges"), int),
    **dict.fromkeys(("entropy", "loss", "area", "size"), _NUMBER),
    "full": _LIKELY,
    "traces": [{"size": _NUMBER, "tv": _NUMBER, "top": _LIKELY}],
}
_SAMPLES = {
    "sizes": [(int, float)],
    "vocabulary": [str],
    "texts": [{"block": int, "context": [int], "tokens": [_TOKEN]}],
}
"""The text of the report, which older files lack."""

_MUST_AGREE = (
    (("data", "block_size"), "block_size", "block_size; sizes depend on the length"),
    (("min_context",), "min_context", "block_size and --positions; sizes depend on both"),
    (("tokens",), "the number of explained tokens", "text and number of blocks"),
    (("data", "sha256"), "the measured tokens (data sha256)", "text, tokenizer and split"),
    (("attention",), "the attention of masked runs", "--attention"),
    (("dtype",), "the number format of the weights", "--dtype; sizes depend on rounding"),
)
"""What runs have to have in common, with the name of each and how to make it so.

Compared in this order: blocks of another length or number are other tokens too, of the same text.
"""


def load_density(path: Path | str) -> dict[str, Any]:
    """Read a ``density.json`` and check that it has what tables and plots need.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        DataError: missing, not readable, not JSON, of another version, or without a needed value.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "density.json"
    try:
        density = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: found no such file, expected a density.json (or its folder) as written by "
            "softtrace evaluate"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give a density.json, or its folder, that "
            "this user may read"
        ) from error
    except ValueError as error:  # also not UTF-8
        raise DataError(
            f"{path}: found no JSON ({error}), expected a density.json as written by softtrace "
            "evaluate; was the file cut off?"
        ) from error
    if not isinstance(density, dict) or "version" not in density:
        raise DataError(
            f'{path}: found no "version", expected a density.json as written by softtrace evaluate'
        )
    if density["version"] != DENSITY_VERSION:
        raise DataError(
            f"{path}: found version {density['version']!r}, this softtrace reads version "
            f"{DENSITY_VERSION}; evaluate the model again"
        )
    density.setdefault("attention", "recorded")  # what files before this choice were measured with
    density.setdefault("dtype")  # not known of files before it was written
    problem = _problem(density, _EXPECTED, "")
    problem = problem or _problem(density.get("samples"), (None, _SAMPLES), "samples")
    if problem := problem or _interval_problem(density.get("intervals")):
        raise DataError(f"{path}: {problem}; evaluate the model again")
    return density


def check_comparable(names: Sequence[str], densities: Sequence[Density]) -> None:
    """Refuse runs that were not measured on the same tokens, at the same length and in one format.

    Args:
        names: what the error calls each run.
        densities: their content; what says which tokens were measured is enough.

    Raises:
        InvalidInputError: naming the two runs, what differs and what to do.
    """
    for keys, what, remedy in _MUST_AGREE:
        values: list[Any] = [reduce(getitem, keys, density) for density in densities]
        known = [pair for pair in zip(names, values, strict=True) if pair[1] is not None]
        for name, value in known[1:]:
            first, wanted = known[0]
            if value != wanted:
                raise InvalidInputError(
                    f"these runs cannot be compared: {what} differs, {_brief(wanted)} in "
                    f"{first} and {_brief(value)} in {name}; evaluate all with the same {remedy}"
                )


def _brief(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)


def run_labels(paths: Sequence[Path], densities: Sequence[Density]) -> list[str]:
    """The models' names; where two share one, their folders' names; numbered as a last resort."""
    models = [Path(density["model"]["path"]).name for density in densities]
    labels = models
    if len(set(models)) < len(models):
        # resolve: "." and ".." have no name of their own
        folders = [(path if path.is_dir() else path.parent).resolve().name for path in paths]
        labels = folders
    count = Counter(labels)
    return [
        label if label and count[label] == 1 else f"{label} ({number})".strip()
        for number, label in enumerate(labels, 1)
    ]


def _interval_problem(found: Any) -> str | None:
    """What is wrong with the intervals, which older files lack and single blocks have none of."""
    keys = found if isinstance(found, dict) else ()
    if problem := _problem(found, (None, dict.fromkeys(keys, _NUMBERS)), "intervals"):
        return problem
    return next(
        (
            f"found {len(found[key])} numbers for 'intervals/{key}', expected 2"
            for key in keys
            if len(found[key]) != 2
        ),
        None,
    )


def _problem(found: Any, expected: Any, where: str) -> str | None:
    """What is wrong with ``found``, or None."""
    if isinstance(expected, tuple) and expected[0] is None:
        return None if found is None else _problem(found, expected[1], where)
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return f"found {type(found).__name__} for {where!r}, expected an object"
        for key, part in expected.items():
            name = f"{where}/{key}" if where else key
            if key not in found:
                return f"found no {name!r}"
            if problem := _problem(found[key], part, name):
                return problem
        return None
    if isinstance(expected, list):
        if not isinstance(found, list) or not found:
            return f"found {type(found).__name__} for {where!r}, expected a list that is not empty"
        return next(
            (problem for part in found if (problem := _problem(part, expected[0], where))), None
        )
    if not isinstance(found, expected):
        return f"found {found!r} for {where!r}, which has another type there"
    return None


def describe(network: PreTrainedModel, path: str) -> dict[str, Any]:
    """The "model" of density.json."""
    config, anatomy = network.config, attach(network).anatomy
    return {
        "path": path,
        "type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "layers": len(anatomy.layers),
        "heads": anatomy.heads,
        "pattern": anatomy.pattern,
    }
