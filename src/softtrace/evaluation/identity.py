"""What numbers depend on, so that parts of another model, text or setting are never mixed in."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softtrace.data.text_source import TextSource
from softtrace.evaluation.density_file import DENSITY_VERSION
from softtrace.evaluation.provenance import versions
from softtrace.model.loading import load_config


def model_identity(model: str) -> str:
    """SHA-256 of a directory's config and weights; the commit of a model of the hub.

    Args:
        model: directory, or name on the hub whose config is in the cache or can be had.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{getattr(load_config(model), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def blocks_identity(blocks: Tensor) -> str:
    """SHA-256 of ids ``[N, T]``."""
    return hashlib.sha256(blocks.numpy().tobytes()).hexdigest()


def text_identity(source: TextSource, blocks: Tensor, documents: int) -> dict[str, Any]:
    """Which text was measured: the "data" of a result file.

    Args:
        source: what was read.
        blocks: ``[N, T]`` ids that were chosen of it.
        documents: how many were read.
    """
    return {
        "path": source.data,
        "documents": documents,
        "sha256": blocks_identity(blocks),
        "split": source.split,
        "salt": source.salt,
        "block_size": blocks.shape[1],
        "blocks": len(blocks),
    }


def settings_of(model: str, blocks: Tensor, device: torch.device, **options: Any) -> dict[str, Any]:
    """Everything that changes a number of an evaluation, if only by rounding.

    Args:
        model: directory or name.
        blocks: ``[N, T]`` ids that are measured.
        device: that measures.
        **options: of the evaluation.
    """
    packages = {name: version for name, version in versions().items() if name != "lightning"}
    return {
        "density version": DENSITY_VERSION,
        "model": model_identity(model),
        "blocks": blocks_identity(blocks),
        "device": device.type,
        **options,
        **packages,
    }
