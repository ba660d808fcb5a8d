"""Loading models larger than one device: weights that do not fit wait in main memory or on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils.modeling import get_max_memory

from softtrace.errors import InvalidInputError


def check_device_map(
    device_map: str | None, max_memory: Mapping[str, str] | None, processes: int
) -> None:
    """Refuse what :func:`device_map_options` cannot give.

    Raises:
        InvalidInputError: another map than "auto", limits without a map, or several processes.
    """
    if device_map not in (None, "auto"):
        raise InvalidInputError(
            f"device_map: found {device_map!r}, allowed are None and 'auto'; what goes where is "
            "decided by max_memory"
        )
    if device_map is None and max_memory is not None:
        raise InvalidInputError("max_memory: found it without device_map; pass device_map 'auto'")
    if device_map is not None and processes > 1:
        raise InvalidInputError(
            f"device_map: found {device_map!r} with {processes} processes, each of which would "
            "offload the model to the same main memory; allowed is one process"
        )


def device_map_options(
    device_map: str | None,
    max_memory: Mapping[str, str] | None,
    device: torch.device,
    folder: str,
) -> dict[str, Any]:
    """Options of ``from_pretrained`` that make one device compute all layers.

    The graph's edges are compared across layers, so they have to be made on one device; the others
    that ``device_map="auto"`` would take are left out.

    Args:
        device_map: "auto", or None for no options.
        max_memory: device (a number, or "cpu") to what it may hold; None for what is free.
        device: that computes.
        folder: for weights that go to disk.

    Raises:
        InvalidInputError: a limit for a device that is neither the computing one nor "cpu".
    """
    if device_map is None:
        return {}
    computing = "cpu" if device.type == "cpu" else str(device.index or 0)
    allowed = {computing, "cpu"}
    if max_memory is not None and (wrong := set(max_memory) - allowed):
        raise InvalidInputError(
            f"max_memory: found {', '.join(sorted(wrong))}, allowed are "
            f"{', '.join(sorted(allowed))}: one device computes all layers, others hold none"
        )
    free = get_max_memory() if max_memory is None else max_memory
    limits = {
        key if key == "cpu" else int(key): value
        for key, value in free.items()
        if str(key) in allowed
    }
    return {"device_map": device_map, "max_memory": limits, "offload_folder": folder}
