"""How a command runs, whatever it measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """Where a model is run, in which numbers, and what may be written over.

    The attributes are options of every command that runs a model, and this is what ``--help`` says
    of them.

    Attributes:
        device: Device that the model runs on: "cpu", "cuda" or another name that torch knows;
            "auto" takes an accelerator where there is one, and the CPU elsewhere.
        dtype: Number format of the weights: "float32", "bfloat16" or "float16"; "auto" takes the
            one that they were saved in.
        overwrite: Write into a folder that holds files, and replace those of the same name.
    """

    device: str = "auto"
    dtype: str = "float32"
    overwrite: bool = False


DEFAULT_RUN = RunOptions()
"""The best device, float32, and a new or empty folder."""
