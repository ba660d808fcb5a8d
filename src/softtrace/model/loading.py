"""Models and tokenizers from a directory or the hub: safetensors only, clear errors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from softtrace.checks import refuse_empty
from softtrace.errors import ModelDirectoryError
from softtrace.libraries import first_line, from_library, one_line
from softtrace.model.devices import device_map_options
from softtrace.model.exit_maps import EXIT_MAPS_FILE, load_exit_maps

_NO_CODE = {"trust_remote_code": False}  # left open, transformers asks at the terminal
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_OTHERS = ("*.gguf", "*.h5", "*.msgpack", "*.onnx")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_BESIDE = {"adapter_model.safetensors", EXIT_MAPS_FILE}  # of no model's weights
_INDEX = "model.safetensors.index.json"
# What a file of a clone begins with whose content is elsewhere.
_POINTER = b"version https://git-lfs"


def load_model(
    name_or_path: str | Path, *, dtype: str = "float32", **options: Any
) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained`` restricted to safetensors weights.

    Args:
        name_or_path: a directory, or a name on the hub.
        dtype: of the weights in memory: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"auto"``.
        **options: passed on (``revision``, ``attn_implementation``, ...).

    Raises:
        ModelDirectoryError: no such directory and no such model on the hub, no config, no weights
            or not all of them, pickle weights only, a file that cannot be read, a type that
            transformers has no causal language model for, a model with code of its own, or options
            and packages that cannot be had here, such as an attention kernel.
    """
    check_model_directory(name_or_path)
    allowed = ("float32", "bfloat16", "float16", "auto")
    if dtype not in allowed:
        raise ModelDirectoryError(f"dtype: found {dtype!r}, allowed are {', '.join(allowed)}")
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    with _named(name_or_path, options):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(name_or_path), dtype=wanted, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **{**_NO_CODE, **options},
        )  # fmt: skip
    model: PreTrainedModel
    model, report = loaded
    _check_complete(name_or_path, model, report)
    load_exit_maps(model, name_or_path)
    return model


@contextmanager
def placed_model(
    name_or_path: str,
    dtype: str,
    device: torch.device,
    device_map: str | None,
    max_memory: Mapping[str, str] | None,
) -> Iterator[PreTrainedModel]:
    """A model in eval mode on a device, or spread out as a device map says, to be measured inside.

    Args:
        name_or_path, dtype: see :func:`load_model`.
        device: that computes.
        device_map, max_memory: see :func:`softtrace.model.devices.device_map_options`.

    Raises:
        ModelDirectoryError: see :func:`load_model`.
        InvalidInputError: a limit for an accelerator where the CPU computes.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # for weights on disk
        options = device_map_options(device_map, max_memory, device, folder)
        network = load_model(name_or_path, dtype=dtype, **options)
        network.eval()  # type: ignore[no-untyped-call]
        if device_map is None:
            network.to(device)  # type: ignore[arg-type]
        yield network


def _check_complete(name_or_path: str | Path, model: PreTrainedModel, report: Any) -> None:
    """transformers draws weights that it does not find at random, and warns."""
    weights = {name for name, _ in model.named_parameters()}
    lacking = sorted(weights & set(report["missing_keys"]))
    if lacking:
        raise ModelDirectoryError(
            f"{name_or_path}: its safetensors lack {len(lacking)} of the {len(weights)} weights of "
            f"the {type(model).__name__} that config.json describes, among them {lacking[0]}; give "
            "a causal language model with all of its weights"
        )
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise ModelDirectoryError(
            f"{name_or_path}: {name} has the shape {list(stored)} in its safetensors, and "
            f"{list(wanted)} by config.json; give the config.json that belongs to these weights"
        )


def load_config(name_or_path: str | Path) -> PretrainedConfig:
    """``AutoConfig.from_pretrained``.

    Raises:
        ModelDirectoryError: there is none, or it needs code of its own.
    """
    with _named(name_or_path):
        config: PretrainedConfig = AutoConfig.from_pretrained(str(name_or_path), **_NO_CODE)
    return config


def dtype_name(dtype: torch.dtype | str) -> str:
    """A number format as options have it, such as ``float32``; configs hold either."""
    return str(dtype).removeprefix("torch.")


def saved_dtype(name_or_path: str | Path) -> str | None:
    """The number format that a config says its weights were saved in; None where it does not.

    Raises:
        ModelDirectoryError: see :func:`load_config`.
    """
    found = load_config(name_or_path).dtype
    return None if found is None else dtype_name(found)


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
    for file in _files(path, _TOKENIZER):
        _check_content(name_or_path, file)
    with _named(name_or_path):
        return AutoTokenizer.from_pretrained(str(name_or_path), **_NO_CODE)


@contextmanager
def _named(name_or_path: str | Path, options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Say in one line what transformers says in a page, or by a bare ``KeyError``."""
    try:
        yield
    except Exception as error:
        if not from_library(error):
            raise
        raise ModelDirectoryError(
            f"{name_or_path}: {_said(name_or_path, error, options)}"
        ) from error


def _said(name_or_path: str | Path, error: Exception, options: Mapping[str, Any] | None) -> str:
    said = one_line(error)
    if "trust_remote_code" in said and isinstance(error, ValueError):
        return (
            "it needs code of its own, which softtrace does not run. Where you trust it, load it "
            "yourself (AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)) and hand "
            "it to softtrace.attach, DensityLoss or DensityPenalty"
        )
    if "Unrecognized configuration class" in said:  # and then the names of two hundred others
        kind = said.partition("<class '")[2].partition("'")[0].rpartition(".")[2]
        return (
            f"transformers has no causal language model for its {kind}; expected a decoder, such "
            "as Llama or GPT-2"
        )
    if isinstance(error, OSError):
        first = first_line(error)
        if Path(name_or_path).is_dir():
            return first
        return (
            "found neither a directory of this name nor, on the hub or in its cache, a model that "
            f"can be read ({first})"
        )
    given = ", ".join(f"{name}={value!r}" for name, value in (options or {}).items())
    asked = f" with {given}" if given else ""
    kind = "" if isinstance(error, ImportError | ValueError) else f"{type(error).__name__}: "
    return f"it cannot be loaded{asked} by this installation of transformers ({kind}{said})"


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of a directory that match, sorted; none for the name of a model on the hub."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def _check_content(name_or_path: str | Path, file: Path) -> None:
    """Refuse a file that is empty, or only says where its content is."""
    try:
        with file.open("rb") as opened:
            begin = opened.read(len(_POINTER))
    except OSError as error:
        raise ModelDirectoryError(
            f"{name_or_path}: {file.name} cannot be read ({error.strerror}); check its permissions"
        ) from error
    if not begin:
        raise ModelDirectoryError(
            f"{name_or_path}: {file.name} is empty (0 bytes); copy or download it again"
        )
    if begin == _POINTER:
        raise ModelDirectoryError(
            f"{name_or_path}: {file.name} is a pointer of git-lfs and not the file itself; run git "
            "lfs pull where it was cloned, or download it again"
        )


def _read_json(name_or_path: str | Path, file: Path) -> dict[str, Any]:
    _check_content(name_or_path, file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelDirectoryError(
            f"{name_or_path}: {file.name} is not a valid JSON file ({error}); copy or download it "
            "again"
        ) from error
    if not isinstance(found, dict):
        raise ModelDirectoryError(
            f"{name_or_path}: {file.name} holds a JSON {type(found).__name__}, expected an object, "
            "as model.save_pretrained(directory) writes it"
        )
    return found


def check_model_directory(name_or_path: str | Path) -> None:
    """Explain what is wrong with a local model directory before transformers meets it.

    A name that is no existing path and looks like a hub name (``owner/name``) passes.

    Raises:
        ModelDirectoryError: see :func:`load_model`.
    """
    expected = "a model directory or a hub name"
    refuse_empty("model", name_or_path, expected, ModelDirectoryError)
    path = Path(name_or_path)
    if not path.exists():
        looks_local = str(name_or_path).startswith((".", "/", "~")) or len(path.parts) > 2
        if looks_local:
            raise ModelDirectoryError(f"{name_or_path}: no such directory; expected {expected}")
        return
    if not path.is_dir():
        raise ModelDirectoryError(f"{name_or_path}: is a file; expected a model directory")
    _refuse_parts(path)
    weights = {file.name for file in path.glob("*.safetensors")} - _BESIDE
    if (path / "adapter_config.json").is_file() and not weights:
        raise ModelDirectoryError(
            f"{name_or_path}: holds a PEFT adapter and no model. {_merge(path)}"
        )
    if not (path / "config.json").is_file():
        alone = any(path.glob("tokenizer*")) and not any(path.glob("*.safetensors"))
        what = "; it is the directory of a tokenizer alone, give that of a model" if alone else ""
        if inside := _newest_with(path, "config.json"):
            what = f"; expected a model directory, such as {inside} (the newest in it)"
        elif adapter := _newest_with(path, "adapter_config.json"):
            what = f". {adapter} holds a PEFT adapter and no model. {_merge(adapter)}"
        raise ModelDirectoryError(f"{name_or_path}: found no config.json in it{what}")
    if "model_type" not in _read_json(path, path / "config.json"):
        raise ModelDirectoryError(
            f"{name_or_path}: config.json names no model_type; expected the one that "
            "model.save_pretrained(directory) writes"
        )
    _check_weights(path)


def _newest_with(path: Path, name: str) -> Path | None:
    """The directory inside this one that got its file of this name last."""
    found = max(path.glob(f"*/{name}"), key=lambda each: each.stat().st_mtime, default=None)
    return None if found is None else found.parent


def _merge(path: Path) -> str:
    """How to make one model of an adapter and its base model."""
    maps = f", and copy {EXIT_MAPS_FILE} into it" if (path / EXIT_MAPS_FILE).is_file() else ""
    return (
        "Merge it into its base model first: peft.AutoPeftModelForCausalLM.from_pretrained(adapter)"
        f".merge_and_unload().save_pretrained(directory), save the tokenizer there too{maps}"
    )


def refuse_adapter(name_or_path: str | Path, model: PreTrainedModel) -> None:
    """Refuse a model that transformers loaded with the adapter that lay beside it, to be trained.

    Raises:
        ModelDirectoryError: its weights are frozen, and only the adapter would be saved.
    """
    if getattr(model, "peft_config", None):
        raise ModelDirectoryError(
            f"{name_or_path}: holds a PEFT adapter beside its model; expected a model alone, for "
            f"what is trained. {_merge(Path(name_or_path))}"
        )


def _refuse_parts(path: Path) -> None:
    """Refuse a checkpoint of a training whose processes wrote a part each."""
    whole = "then put config.json and the tokenizer beside it. softtrace fit saves whole models"
    parts = sorted((*path.glob("*.distcp"), *path.glob("*/*.distcp")))
    if any(path.glob("*.safetensors")):
        return
    if parts:  # the optimiser's come first
        raise ModelDirectoryError(
            f"{path}: holds weights in parts, one of each process ({parts[-1].name}); expected a "
            f"whole model. Make one first: accelerate merge-weights {parts[-1].parent} OUT, {whole}"
        )
    if (path / "zero_to_fp32.py").is_file():
        raise ModelDirectoryError(
            f"{path}: holds weights in parts, as DeepSpeed saves them; expected a whole model. "
            f"Make one first: python zero_to_fp32.py . OUT --safe_serialization, {whole}"
        )


def _check_weights(path: Path) -> None:
    """Refuse a directory whose safetensors are not there, or not whole."""
    for file in _files(path, ("*.safetensors",)):
        _check_content(path, file)
        try:
            with safe_open(file, framework="pt"):
                pass  # it reads what is where, and compares that with the size of the file
        except (SafetensorError, OSError) as error:
            raise ModelDirectoryError(
                f"{path}: its safetensors cannot be read ({file.name}: {error}); was a copy cut "
                "short?"
            ) from error
    if (path / _INDEX).is_file():
        shards = _read_json(path, path / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelDirectoryError(
                f"{path}: {_INDEX} has no weight_map; copy or download it again"
            )
        missing = sorted(name for name in set(shards.values()) if not (path / name).is_file())
        if missing:
            raise ModelDirectoryError(
                f"{path}: {len(missing)} of {len(set(shards.values()))} files of weights that "
                f"{_INDEX} names are not there, the first is {missing[0]}; copy or download them"
            )
    if any(path.glob("*.safetensors")):
        return
    pickles = _files(path, _PICKLES)
    for file in pickles:
        _check_content(path, file)
    if pickles:
        raise ModelDirectoryError(
            f"{path}: found only pickle weights ({', '.join(file.name for file in pickles)}), "
            "which can run code when loaded; allowed are safetensors. Convert them where you trust "
            "them: model.save_pretrained(directory)"
        )
    others = _files(path, _OTHERS)
    held = f" but {', '.join(file.name for file in others)}" if others else ""
    raise ModelDirectoryError(
        f"{path}: found no *.safetensors weights in it{held}; expected those that "
        "model.save_pretrained(directory) writes"
    )
