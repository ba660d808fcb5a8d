"""Models and tokenizers from a directory or the hub: safetensors only, clear errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from softtrace.errors import ModelDirectoryError

_NO_CODE = {"trust_remote_code": False}  # left open, transformers asks at the terminal
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_model(
    name_or_path: str | Path, *, dtype: str = "float32", **options: Any
) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained`` restricted to safetensors weights.

    Args:
        name_or_path: a directory, or a name on the hub.
        dtype: of the weights in memory: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"auto"``.
        **options: passed on (``revision``, ``attn_implementation``, ...).

    Raises:
        ModelDirectoryError: no such directory and no such model on the hub, no config, no weights,
            pickle weights only, a file that cannot be read, or a model with code of its own.
    """
    check_model_directory(name_or_path)
    allowed = ("float32", "bfloat16", "float16", "auto")
    if dtype not in allowed:
        raise ModelDirectoryError(f"dtype: found {dtype!r}, allowed are {', '.join(allowed)}")
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    with _named(name_or_path):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(name_or_path), dtype=wanted, use_safetensors=True, **{**_NO_CODE, **options}
        )
    return model


def load_config(name_or_path: str | Path) -> PretrainedConfig:
    """``AutoConfig.from_pretrained``.

    Raises:
        ModelDirectoryError: there is none, or it needs code of its own.
    """
    with _named(name_or_path):
        config: PretrainedConfig = AutoConfig.from_pretrained(str(name_or_path), **_NO_CODE)
    return config


def load_tokenizer(name_or_path: str | Path) -> Any:
    """``AutoTokenizer.from_pretrained``.

    Raises:
        ModelDirectoryError: the directory holds no tokenizer.
    """
    path = Path(name_or_path)
    if path.is_dir() and not any(path.glob("tokenizer*")):
        raise ModelDirectoryError(
            f"{name_or_path}: found no tokenizer files; save the tokenizer next to the model "
            "(tokenizer.save_pretrained(directory))"
        )
    with _named(name_or_path):
        return AutoTokenizer.from_pretrained(str(name_or_path), **_NO_CODE)


@contextmanager
def _named(name_or_path: str | Path) -> Iterator[None]:
    """Say in one line what transformers says in a page."""
    try:
        yield
    except SafetensorError as error:
        raise ModelDirectoryError(
            f"{name_or_path}: its safetensors cannot be read ({error}); was a copy cut short?"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ModelDirectoryError(
            f"{name_or_path}: it needs code of its own, which softtrace does not run. Where you "
            "trust it, load it yourself (AutoModelForCausalLM.from_pretrained(..., "
            "trust_remote_code=True)) and hand it to softtrace.attach, DensityLoss or "
            "DensityPenalty"
        ) from error
    except OSError as error:
        first = str(error).strip().partition("\n")[0]
        if Path(name_or_path).is_dir():
            raise ModelDirectoryError(f"{name_or_path}: {first}") from error
        raise ModelDirectoryError(
            f"{name_or_path}: found neither a directory of this name nor, on the hub or in its "
            f"cache, a model that can be read ({first})"
        ) from error


def check_model_directory(name_or_path: str | Path) -> None:
    """Explain what is wrong with a local model directory before transformers meets it.

    A name that is no existing path and looks like a hub name (``owner/name``) passes.

    Raises:
        ModelDirectoryError: see :func:`load_model`.
    """
    path = Path(name_or_path)
    if not path.exists():
        looks_local = str(name_or_path).startswith((".", "/", "~")) or len(path.parts) > 2
        if looks_local:
            raise ModelDirectoryError(
                f"{name_or_path}: no such directory; expected a model directory or a hub name"
            )
        return
    if not path.is_dir():
        raise ModelDirectoryError(f"{name_or_path}: is a file; expected a model directory")
    if not (path / "config.json").is_file() and (path / "adapter_config.json").is_file():
        raise ModelDirectoryError(
            f"{name_or_path}: holds a PEFT adapter and no model. Merge it into its base model "
            "first: peft.AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()"
            ".save_pretrained(directory), and save the tokenizer there too"
        )
    if not (path / "config.json").is_file():
        raise ModelDirectoryError(f"{name_or_path}: found no config.json in it")
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise ModelDirectoryError(
            f"{name_or_path}: found only pickle weights ({', '.join(pickles)}), which can run code "
            "when loaded; allowed are safetensors. Convert them where you trust them: "
            "model.save_pretrained(directory)"
        )
    raise ModelDirectoryError(f"{name_or_path}: found no *.safetensors weights in it")
