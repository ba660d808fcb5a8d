"""What softtrace says in a model's README.md: how it was fine-tuned, and how dense it is.

Two sections of their own, each replaced and never added twice; what people wrote stays as it is.
Uploading is left to the user (``model.push_to_hub``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from torch import Tensor
from transformers import PreTrainedModel

from softtrace.errors import DataError, ModelDirectoryError
from softtrace.evaluation.bootstrap import Median, Statistic, intervals, mean
from softtrace.evaluation.compare import check_comparable, load_density
from softtrace.evaluation.files import atomic_path
from softtrace.evaluation.measure import Measurements, measure, summarise
from softtrace.evaluation.provenance import provenance
from softtrace.evaluation.sections import with_section
from softtrace.evaluation.table import MEASURES, Density, Measure
from softtrace.exits import EXIT_FIELD
from softtrace.metrics.functional import entropy_groups

_HOME = "https://arxiv.org/abs/2605.27033"
_SHOWN = tuple(m for m in MEASURES if m.unit != "correlation" and not m.key.endswith("_hard"))
_RESAMPLED, _RESAMPLES = 2, 1000  # sequences that can be resampled at least, and how often they are
_LEAST = 4  # tokens in a block: half is context, and the last one's target is not known

#: of a fit's options, what says how the model was made; paths stay private
_SETTINGS = {
    "model": ("learning_rate", "weight_decay", "betas", "warmup_steps", "dtype", "lora"),
    "data": ("block_size", "batch_size", "held_out_share", "salt"),
    "trainer": (
        *("max_steps", "max_epochs", "max_time", "precision", "devices", "num_nodes"),
        *("accumulate_grad_batches", "gradient_clip_val"),
    ),
}


def write_density(folder: Path | str, density: Density, base: Density | None = None) -> None:
    """Put what was measured into the README.md of a model.

    Args:
        folder: the model's directory.
        density: of this model, as in ``density.json``; ``intervals``, where there are any, hold
            the bounds of each measure by its key.
        base: of the model that it was fine-tuned from, measured on the same tokens.

    Raises:
        DataError: the README cannot be read, or its section is damaged.
    """
    runs = [density] if base is None else [base, density]
    heads = ["this model"] if base is None else ["before", "this model"]
    lines = [f"| | better | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    lines += [
        f"| {measure.name} | {measure.better} | {' | '.join(_cell(measure, r) for r in runs)} |"
        for measure in _SHOWN
    ]
    data = density["data"]
    bounds = "; in brackets 95 % of 1,000 bootstrap samples of the blocks"
    body = "\n".join((
        "## Computation density",
        "",
        "How much of the model's computation graph its predictions need, by the",
        f"[s-Trace]({_HOME}):",
        "",
        *lines,
        "",
        f"{density['tokens']:,} tokens ({data['split']}) in {data['blocks']:,} blocks of "
        f"{data['block_size']}{bounds if density.get('intervals') else ''}. Easy: the quarter of "
        "the tokens with the lowest entropy of the model's own prediction. Sizes depend on the "
        "length: compare at equal length only.",
    ))  # fmt: skip
    _update(Path(folder), "softtrace-density", body, None)


def _cell(measure: Measure, density: Density) -> str:
    cell = measure.format(measure.read(density))
    bounds = density.get("intervals", {}).get(measure.key)
    if bounds is None:
        return cell
    return f"{cell} ({measure.format(bounds[0])} to {measure.format(bounds[1])})"


def write_settings(folder: Path | str, options: Mapping[str, Any]) -> None:
    """Put how a model was fine-tuned, and how to decode it early, into its README.md.

    Args:
        folder: the model's directory.
        options: of ``softtrace fit``, as in its ``fit.yaml``.

    Raises:
        DataError: the README cannot be read, or its section is damaged.
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
    name = f"`{Path(base).name}`" if local else f"[{base}](https://huggingface.co/{base})"
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
    return (
        f"Early exit: after {layer} of {layers} layers (`{EXIT_FIELD}` in `config.json`), as in",
        f"`model.generate(**inputs, do_sample=False, assistant_early_exit={layer})`, which writes "
        "what",
        "plain greedy decoding writes.",
        "",
    )


def measured(model: PreTrainedModel, blocks: Tensor, split: str, batch_size: int = 8) -> Density:
    """What a card says of a model, measured on a few blocks, with intervals.

    Args:
        model: a causal language model.
        blocks: ``[N, T]`` ids; the first half of each is context.
        split: what the blocks are of.
        batch_size: blocks a forward.

    Raises:
        DataError: blocks of fewer than 4 tokens.
        UnsupportedModelError, NonFiniteError: see :func:`softtrace.density_curve`.
    """
    if blocks.shape[1] < _LEAST:
        raise DataError(f"blocks of {blocks.shape[1]} tokens: {_LEAST} at least are needed")
    found = measure(
        model,
        blocks,
        min_context=blocks.shape[1] // 2,
        batch_size=batch_size,
        extra_blocks=0,
        progress=lambda _: None,
    )
    return {
        **summarise(found),
        "data": {"blocks": len(blocks), "block_size": blocks.shape[1], "split": split},
        "intervals": _intervals(found, len(blocks)),
    }


def _intervals(found: Measurements, blocks: int) -> dict[str, tuple[float, float]]:
    """Bounds of what the card shows, by key; none from a single block."""
    if blocks < _RESAMPLED:
        return {}
    agreement = torch.cat(found.agreement, dim=1)
    half = agreement[max(1, len(agreement) // 2) - 1]
    values = {
        "loss": torch.cat(found.loss),
        "size_at_tv_0.2": torch.cat(found.size),
        "area": torch.cat(found.area),
        "early_exit_half": half,
    }
    statistics: dict[str, Statistic] = {}
    for group, rows in entropy_groups(torch.cat(found.entropy)).items():
        there = rows.reshape(blocks, -1)
        for name, flat in values.items():
            each = flat.double().reshape(blocks, -1)
            statistics[f"{name}_{group}"] = (
                Median(each.masked_fill(~there, torch.nan))
                if name == "size_at_tv_0.2"
                else mean(each, there)
            )
    bounds = intervals(statistics, _RESAMPLES, seed=0)
    return {key: (float(bound.low), float(bound.high)) for key, bound in bounds.items()}


def card(model: str, density: str, base: str | None = None) -> None:
    """Put the numbers of density.json into the README.md of a model; the rest of it stays.

    Args:
        model: the model's directory.
        density: density.json of this model, or its folder.
        base: density.json of the model that it was fine-tuned from, or its folder; measured on the
            same text.

    Raises:
        ModelDirectoryError: no such directory.
        DataError: a file cannot be read.
        InvalidInputError: the two were measured on other tokens.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise ModelDirectoryError(f"{model}: no such directory; expected a model directory")
    own, other = load_density(density), None if base is None else load_density(base)
    if other is not None:
        check_comparable([str(density), str(base)], [own, other])
    write_density(folder, own, other)
    print(f"written to {folder / 'README.md'}")


def _update(folder: Path, name: str, body: str, base_model: str | None) -> None:
    """Replace a section of the card, and say in its metadata what is not said yet."""
    path = folder / "README.md"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except FileNotFoundError:
        text = f"# {folder.resolve().name}\n"
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    bare = "---\n\n---\n" if REGEX_YAML_BLOCK.search(text) is None else ""
    try:
        page = ModelCard(bare + text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: its front matter is no model card's ({error})") from error
    data: Any = page.data
    before = data.to_dict()
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    data.tags = list(dict.fromkeys([*(data.tags or []), "softtrace"]))
    if base_model is not None:
        data.base_model = data.base_model or base_model
    try:
        page.text = with_section(page.text, name, body)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if data.to_dict() == before:  # as people wrote it, comments and all
        whole = text[: len(text) - len(ModelCard(text).text)] + page.text
    else:
        whole = page.content
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(whole)
