"""Linear maps in front of the final norm that early exits alone are read through.

An exit reads the residual stream after some layer with the model's own final norm and head, which
expect the stream after the last. A linear map between the two (a tuned lens, Belrose et al., arXiv
2303.08112) lets the exit agree far more often with the full prediction, and the model itself has
to change less for it, or not at all. Maps are no part of the model: its own forward never meets
them, and they lie in a file of their own beside its weights.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softtrace.errors import ModelDirectoryError
from softtrace.files import atomic_path
from softtrace.model.devices import device_of_module
from softtrace.model.wrappers import unwrapped

EXIT_MAPS_FILE = "exit_maps.safetensors"
"""Holds ``after_layer_K`` ``[d_model, d_model]`` for every exit that has a map."""

_NAME = re.compile(r"after_layer_\d+$")
_MAPS: weakref.WeakKeyDictionary[nn.Module, ExitMaps] = weakref.WeakKeyDictionary()


def name_of(depth: int) -> str:
    """Name of the map of the exit after so many layers."""
    return f"after_layer_{depth}"


class ExitMaps(nn.Module):
    """What is added to the stream of an exit: ``h + W_k h`` after layer k, with ``W_k`` 0 at first.

    Args:
        depths: after how many layers the exits are.
        width: d_model.
        dtype: of the weights.
    """

    def __init__(
        self, depths: Iterable[int], width: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {
                # not where a surrounding torch.device says: on "meta" there is nothing to learn
                name_of(depth): torch.zeros(width, width, dtype=dtype, device="cpu")
                for depth in depths
            }
        )

    def weight(self, depth: int) -> Tensor | None:
        """``[d_model, d_model]`` of the exit after so many layers; None without a map for it."""
        found: Tensor | None = self.weights.get(name_of(depth))
        return found

    def forward(self, hidden: Tensor, depth: int, weight: Tensor | None = None) -> Tensor:
        """The stream ``[..., d_model]`` after so many layers as the final norm should read it.

        Args:
            hidden: that stream.
            depth: how many layers.
            weight: in place of the own one.
        """
        weight = self.weight(depth) if weight is None else weight
        if weight is None:
            return hidden
        return hidden + F.linear(hidden, weight.to(hidden.device, hidden.dtype))


def exit_maps_of(model: nn.Module) -> ExitMaps | None:
    """The maps that a model's exits are read through, where the model is; None without any."""
    maps = _MAPS.get(unwrapped(model))
    if maps is not None and (device := device_of_module(model)).type != "meta":
        with torch.inference_mode(False):  # or they could not be trained later
            maps.to(device)  # the model may have been moved since, which no map was told
    return maps


def set_exit_maps(model: nn.Module, maps: ExitMaps | None) -> None:
    """Let a model's exits be read through these maps, or through none."""
    if maps is None:
        _MAPS.pop(unwrapped(model), None)
    else:
        _MAPS[unwrapped(model)] = maps


def save_exit_maps(model: nn.Module, folder: Path | str) -> bool:
    """Write a model's maps beside its weights; False where it has none.

    Then those that lay there are removed: they are of other weights, and would be read with these.
    """
    maps = exit_maps_of(model)
    if maps is None:
        (Path(folder) / EXIT_MAPS_FILE).unlink(missing_ok=True)
        return False
    write_exit_maps({name: each.detach().cpu() for name, each in maps.weights.items()}, folder)
    return True


def write_exit_maps(tensors: Mapping[str, Tensor], folder: Path | str) -> None:
    """Write maps by name, and under dotted names what a resumed training learns on from."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic_path(Path(folder) / EXIT_MAPS_FILE) as path:
        save_file({name: each.contiguous() for name, each in tensors.items()}, path)


def read_exit_maps(folder: Path | str) -> dict[str, Tensor]:
    """What :func:`write_exit_maps` wrote into a folder; empty where it holds none.

    Raises:
        ModelDirectoryError: the file is damaged.
    """
    path = Path(folder) / EXIT_MAPS_FILE
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelDirectoryError(
            f"{path}: cannot be read ({error}); copy it anew, or remove it to read exits directly"
        ) from error


def load_exit_maps(model: nn.Module, folder: Path | str) -> bool:
    """Let a model's exits be read through the maps of a folder; False where it holds none.

    Raises:
        ModelDirectoryError: The file is damaged, or of a model of another width.
    """
    tensors = _of_exits(read_exit_maps(folder))
    if not tensors:
        return False
    width, wanted = next(iter(tensors.values())).shape[0], _width(model)
    if wanted is not None and width != wanted:
        raise ModelDirectoryError(
            f"{folder}: found exit maps of width {width} beside a model of width {wanted}; remove "
            f"{EXIT_MAPS_FILE}, or put it beside the model that it was learned with"
        )
    use_exit_maps(model, tensors)
    return True


def use_exit_maps(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let a model's exits be read through maps by name; dotted names are passed by."""
    device = device_of_module(model)
    maps = ExitMaps((), 0)
    own = {name: each.to(device, copy=True) for name, each in _of_exits(tensors).items()}
    maps.weights = nn.ParameterDict(own)
    set_exit_maps(model, maps)


def _of_exits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each for name, each in tensors.items() if _NAME.match(name)}


def _width(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    found: int | None = getattr(config and config.get_text_config(), "hidden_size", None)
    return found
