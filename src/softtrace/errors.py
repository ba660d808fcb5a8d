"""Every error softtrace raises on purpose, each saying what was found, what is allowed, what to do.

All derive from :class:`SofttraceError`; those about arguments also derive from the builtin a caller
would expect (``ValueError``), so ``except ValueError`` keeps working.
"""

from __future__ import annotations


class SofttraceError(Exception):
    """Base class of all errors raised by softtrace."""


class UnsupportedModelError(SofttraceError):
    """The model's layers are not the sum of the graph's edges (see
    ``softtrace.attach``)."""


class InvalidInputError(SofttraceError, ValueError):
    """A batch, an option or a position is outside what the called function accepts."""


class UnknownOptionError(InvalidInputError, TypeError):
    """There is no option of the given name."""


class NonFiniteError(SofttraceError, ArithmeticError):
    """Logits, importances or weights contain NaN or infinity."""


class DataError(SofttraceError, ValueError):
    """Text is missing, empty, binary or not UTF-8, or was trained on and is to be held out."""


class ModelDirectoryError(SofttraceError, ValueError):
    """A model directory lacks a config, safetensors weights or a tokenizer."""


class OutputExistsError(SofttraceError, FileExistsError):
    """An output folder holds files that the run would overwrite, or another run writes to it."""


class OutputNotWritableError(SofttraceError, PermissionError):
    """An output folder, or the one that it would be made in, may not be written to."""


class TrainerSetupError(SofttraceError, RuntimeError):
    """The callback was put into a Trainer or LightningModule it cannot work with."""


class CheckpointError(SofttraceError, RuntimeError):
    """A checkpoint cannot be read (cut short, changed, not one at all), or could not be written."""
