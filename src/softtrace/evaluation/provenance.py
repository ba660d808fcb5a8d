"""When, with what and on what a result was made: every result file carries it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device) -> dict[str, Any]:
    """When, with what and on what a result was made."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "versions": versions(),
        "hardware": hardware(device),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers come from."""
    packages = ("softtrace", "torch", "transformers", "lightning")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def hardware(device: torch.device) -> str:
    """The name of an accelerator, or the processor and its threads in use."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        plural = "s" if threads > 1 else ""
        return f"{platform.machine()} CPU, {threads} thread{plural} of {os.cpu_count()}"
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return named(device) if named else device.type


def _command() -> str:
    program = Path(sys.argv[0]).name
    return shlex.join(["softtrace" if program == "__main__.py" else program, *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
