"""Models that ``compiled_decoding.py`` decodes with, their prompts, and ways to draft for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from recipes.benchmarks.places import TRAINED
from recipes.benchmarks.speed.steps import CONFIGS, MODELS
from softtrace.data.blocks import evenly, pack
from softtrace.data.text_source import TextSource
from softtrace.decoding import ProvenExit, calibrated_confidence
from softtrace.evaluation.decode_race import write_past_ends
from softtrace.model.exit_maps import name_of, read_exit_maps
from softtrace.model.loading import load_model, load_tokenizer

WITHOUT_MAP, TO_UNSURE = "exit without its map", "exit to the first unsure"
DRAFTS = ("exit", "lookup", "both", WITHOUT_MAP, TO_UNSURE)
"""Ways to make guesses, each measured alone."""


def built(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model by the name of a size, with random weights, or of a folder."""
    if name not in MODELS:
        model = load_model(name, dtype=str(dtype).removeprefix("torch.")).to(device).eval()
    else:
        stem, numbers = MODELS[name]
        config = getattr(transformers, CONFIGS.get(stem, f"{stem}Config"))(**numbers)
        torch.manual_seed(0)
        with torch.device(device):
            model = getattr(transformers, f"{stem}ForCausalLM")(config)
        model = model.to(dtype).eval()
    write_past_ends(model)
    return model


def random_prompts(count: int, tokens: int, model: Any) -> list[Tensor]:
    """``[T]`` each, where weights are random."""
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    found = torch.randint(3, model.config.vocab_size, (count, tokens), generator=draw)
    return [*found.to(device)]


def prompts_of(
    name: str, count: int, tokens: int, data: str, held_out_share: float
) -> tuple[Tensor, Tensor]:
    """Prompts ``[N, T]`` evenly spaced over a text, and as many between them to choose on.

    Args:
        name: folder of a model, whose tokenizer reads the text.
        count: N.
        tokens: T.
        data: the text, or a file of its blocks that ``on_real_models.py`` made, which needs no
            tokenizer.
        held_out_share: of the text.
    """
    if data.endswith(".safetensors"):
        blocks = load_file(data)[str(tokens)].long()
    else:
        blocks = pack(TextSource(data, held_out_share).stream(), load_tokenizer(name), tokens)
    found = evenly(blocks, 2 * count)
    return found[::2], found[1::2]


def folders_of(trained: str | None, names: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Folders of models, all ways to train of the first seed before any of the second.

    Args:
        trained: the folder that they lie in.
        names: a part of their names, one of these; of all if there are none.
        seeds: that their names end in, likewise.
    """
    folders = [
        path.parent
        for path in Path(trained or "").glob("*/config.json")
        if not names or any(name in path.parent.name for name in names)
        if not seeds or any(path.parent.name.endswith(f"-seed-{seed}") for seed in seeds)
    ]
    return sorted(folders, key=lambda path: (path.name.rpartition("-seed-")[2], path.name))


def exits_of(folder: Path, shares: Sequence[float]) -> list[float]:
    """Shares of the layers that draft: those it was trained for, or all where it has no maps."""
    layers = json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"]
    maps = read_exit_maps(folder)
    return [depth / layers for depth in range(1, layers) if name_of(depth) in maps] or [*shares]


def has_map(folder: Path) -> bool:
    """Whether exits of a model are read through maps."""
    return bool(read_exit_maps(folder))


def loss_beside(name: str) -> dict[str, Any]:
    """Held-out loss, nats a token, and the blocks it was trained on, as training left them."""
    if not (file := Path(name) / TRAINED).exists():
        return {}
    trained = json.loads(file.read_text("utf-8"))
    return {"held_out_loss": trained["loss"], "blocks": trained["blocks"]}


def options_of(
    draft: str, model: Any, depth: int, proven: ProvenExit, others: Tensor
) -> dict[str, Any]:
    """What a decoder is told for one of :data:`DRAFTS`.

    A guess costs the exit's share of the layers at least. So a draft that stops at unsure guesses
    continues while they are right more often than that, by other text (``others`` ``[N, T]``).
    """
    if draft == WITHOUT_MAP:
        return {"draft": "exit", "exit_map": _as_it_is}
    if draft == TO_UNSURE:
        bound = calibrated_confidence(
            model, others, exit_layer=depth, agreement=depth / proven.layers, each=True,
            proven_exit=proven,
        )  # fmt: skip
        return {"draft": "exit", "confidence": bound.confidence}
    return {"draft": draft}


def _as_it_is(stream: Tensor) -> Tensor:
    return stream
