"""What softtrace says in a model's README.md: how it was fine-tuned, and how dense it is.

Two sections of their own, each replaced and never added twice; what people wrote stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import yaml

from softtrace.decoding.exit_checks import EXIT_FIELD
from softtrace.errors import DataError
from softtrace.evaluation.density_file import Density
from softtrace.evaluation.provenance import provenance
from softtrace.files import atomic_path
from softtrace.model.exit_maps import EXIT_MAPS_FILE
from softtrace.report.front_matter import with_metadata
from softtrace.report.sections import with_section
from softtrace.report.tables import MEASURES, Measure, interval, intervals_meaning

_HOME = "https://arxiv.org/abs/2605.27033"
_SHOWN = tuple(m for m in MEASURES if m.unit != "correlation" and not m.key.endswith("_hard"))
_BYTE_ORDER = "\ufeff"

#: of a fit's options, what says how the model was made; paths stay private
_SETTINGS = {
    "model": ("learning_rate", "weight_decay", "betas", "warmup_steps", "dtype", "lora"),
    "data": ("block_size", "batch_size", "held_out_share", "salt", "answers_only"),
    "trainer": (
        "max_steps", "max_epochs", "max_time", "precision", "devices", "num_nodes",
        "accumulate_grad_batches", "gradient_clip_val",
    ),
}  # fmt: skip


def write_density(
    folder: Path | str, density: Density, base: Density | None = None, report: Path | None = None
) -> None:
    """Put what was measured into the README.md of a model.

    Args:
        folder: the model's directory.
        density: of this model, as in ``density.json``, with its ``intervals`` if it has any.
        base: of the model that it was fine-tuned from, measured on the same tokens.
        report: a report of the measurement below ``folder``, which the section links to.

    Raises:
        DataError: the README cannot be read, or its section or front matter is damaged.
    """
    runs = [density] if base is None else [base, density]
    heads = ["this model"] if base is None else ["before", "this model"]
    lines = [f"| | better | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    lines += [
        f"| {measure.name} | {measure.better} | {' | '.join(_cell(measure, r) for r in runs)} |"
        for measure in _SHOWN
    ]
    data = density["data"]
    known = any(interval(run, measure.key) for run in runs for measure in _SHOWN)
    brackets = f"; in brackets {intervals_meaning(density)}" if known else ""
    link = ""
    if report is not None:
        link = quote(report.resolve().relative_to(Path(folder).resolve()).as_posix())
    body = "\n".join((
        "## Computation density",
        "",
        "How much of the model's computation graph its predictions need, by the",
        f"[s-Trace]({_HOME}):",
        "",
        *lines,
        "",
        f"{density['tokens']:,} tokens ({data['split']}) in {data['blocks']:,} blocks of "
        f"{data['block_size']}{brackets}; attention of masked runs {density['attention']}. "
        "Easy: the quarter of "
        "the tokens with the lowest entropy of the model's own prediction. Sizes depend on the "
        "length: compare at equal length only.",
        *(("", f"[Report]({link}): curves, and the text token by token.") if link else ()),
    ))  # fmt: skip
    _update(Path(folder), "softtrace-density", body, None)


def _cell(measure: Measure, density: Density) -> str:
    cell = measure.format(measure.read(density))
    bounds = interval(density, measure.key)
    if bounds is None:
        return cell
    return f"{cell} ({measure.format(bounds[0])} to {measure.format(bounds[1])})"


def write_settings(folder: Path | str, options: Mapping[str, Any]) -> None:
    """Put how a model was fine-tuned, and how to decode it early, into its README.md.

    Args:
        folder: the model's directory.
        options: of ``softtrace fit``, as in its ``fit.yaml``.

    Raises:
        DataError: the README cannot be read, or its section or front matter is damaged.
    """
    base, penalty = str(options["model"]["path"]), dict(options["penalty"])
    kept = {
        group: {
            name: options[group][name] for name in names if options[group].get(name) is not None
        }
        for group, names in _SETTINGS.items()
    }
    settings = yaml.safe_dump({"penalty": penalty, **kept}, sort_keys=False).strip()
    local = Path(base).exists()
    name = f"`{Path(base).resolve().name}`" if local else f"[{base}](https://huggingface.co/{base})"
    versions = provenance(torch.device("cpu"))["versions"]
    how = (
        f"with the density penalty (strength {penalty['strength']:g}): the predictions of easy "
        "tokens\nare kept in a sparse, early part of the computation graph"
        if penalty["strength"]
        else "without the density penalty (strength 0)"
    )
    body = "\n".join((
        "## Fine-tuned with softtrace",
        "",
        f"From {name}, {how}.",
        "",
        *_exit_advice(Path(folder)),
        "Settings:",
        "",
        "```yaml",
        settings,
        "```",
        "",
        "Versions: " + ", ".join(f"{key} {value}" for key, value in versions.items() if value),
    ))  # fmt: skip
    _update(Path(folder), "softtrace-fit", body, None if local else base)


def _exit_advice(folder: Path) -> tuple[str, ...]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    layer, layers = config.get(EXIT_FIELD), config.get("num_hidden_layers")
    if layer is None:
        return ("No early exit is recommended for this model.", "")
    by_map = (
        f"That reads the exit without its map (`{EXIT_MAPS_FILE}`), and can guess far worse;",
        "`softtrace.decoding.speculate` reads it through the map, after",
        "`softtrace.load_exit_maps(model, folder)`.",
    )
    return (
        f"Early exit: after {layer} of {layers} layers (`{EXIT_FIELD}` in `config.json`), as in",
        f"`model.generate(**inputs, do_sample=False, assistant_early_exit={layer})`, which writes "
        "what",
        "plain greedy decoding writes.",
        *(by_map if (folder / EXIT_MAPS_FILE).exists() else ()),
        "",
    )


def _update(folder: Path, name: str, body: str, base_model: str | None) -> None:
    """Replace a section of the card, and say in its metadata what is not said yet."""
    path = folder / "README.md"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
    except FileNotFoundError:
        text = f"# {folder.resolve().name}\n"
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); save it as UTF-8, or move it away and get a new one"
        ) from error
    page = text.removeprefix(_BYTE_ORDER)
    metadata = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base_model is not None:
        metadata["base_model"] = base_model
    try:
        head, rest = with_metadata(page, metadata, "softtrace")
        whole = text[: len(text) - len(page)] + head + with_section(rest, name, body)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(whole)
