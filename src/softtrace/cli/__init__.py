"""The ``softtrace`` command, one module for each of its commands."""

from softtrace.cli.main import main

__all__ = ["main"]
