"""The options of ``softtrace fit`` that are its own, and how its help reads."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser

#: options of the trainer that a machine or an installation may not be able to give
_MAY_LACK = (
    "accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks",
    "plugins", "profiler",
)  # fmt: skip

#: options of the trainer that --help shows; the others are in --help_all
_COMMON = (
    "max_steps", "max_epochs", "max_time", "accelerator", "devices", "strategy", "precision",
    "accumulate_grad_batches", "val_check_interval", "enable_progress_bar",
)  # fmt: skip

_MARKUP = re.compile(r"(?::\w+:`~?|``)([^`]+)``?")
# One paragraph: argparse joins the lines of a description.
DESCRIPTION = """Fine-tune a causal language model with the density penalty, as in: softtrace fit
--model.path MODEL --data.path TEXT --out OUT. The folder OUT gets the model, its tokenizer and its
card (what `softtrace evaluate --model OUT` reads), fit.yaml (this run's options, for --config),
trained_on.json (hashes of its training texts, which no command then measures as held out), logs/
with metrics.csv, and checkpoints/, unless it ends before the first. --penalty.strength 0 is plain
fine-tuning. Without max_steps, max_epochs or max_time it goes over the text once."""


def add_own_options(parser: ArgumentParser) -> None:
    """Add the options of the run as a whole."""
    parser.add_argument(
        "--help_all",
        action=_HelpAll,
        help="Show this help with all options of Lightning's Trainer, and exit.",
    )
    parser.add_argument(
        "--out",
        type=str,
        required=True,
        help="Folder that results are written to. It must be new or empty.",
    )
    parser.add_argument(
        "--resume", type=bool, default=False, help="Resume from OUT's last checkpoint."
    )
    parser.add_argument(
        "--checkpoint_every",
        type=int,
        default=100,
        help="Number of optimiser steps between checkpoints; 0 turns them off.",
    )
    parser.add_argument(
        "--monitor_every",
        type=int,
        default=0,
        help="Number of optimiser steps between measurements of density, and between validations "
        "unless trainer.val_check_interval is given; 0 turns them off. Measured are 16 held-out "
        "blocks, of each 64 tokens at most, and the numbers go to the logger.",
    )
    parser.add_argument(
        "--card_blocks",
        type=int,
        default=16,
        help="Number of held-out blocks (64 tokens of each at most) on which the densities of the "
        "model card are measured, before and after training; 0 gives a card without them.",
    )
    parser.add_argument(
        "--push_to_hub",
        type=str | None,
        default=None,
        help="Upload model, tokenizer and card at the end to this repository of the Hugging Face "
        "hub (OWNER/NAME, or NAME for one of yours). A new one is private.",
    )


class _HelpAll(argparse.Action):
    """Show all options, and end."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, 0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.print_help()
        parser.exit()


def tidy_help(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Put what this command is about first, the Trainer's options last; no markup.

    Args:
        parser: of ``softtrace fit``.
        words: the command line; with ``--help`` Lightning's less common options are left out.
    """
    groups: Any = parser._action_groups
    groups.sort(key=lambda group: (group.title or "").startswith("Customize every aspect"))
    short = bool({"-h", "--help"} & set(words))
    for action in parser._actions:  # a terminal shows the markup of docstrings as it is
        action.help = action.help and _MARKUP.sub(r"\1", action.help)
        group, _, name = action.dest.partition(".")
        if short and group == "trainer" and name not in _COMMON:
            action.help = argparse.SUPPRESS
    if short:
        parser.epilog = "Lightning's Trainer has more options: softtrace fit --help_all."


def advice(options: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """What may be changed where a trainer cannot be had.

    Args:
        options, usual: of the trainer, as given and as they are by default.
    """
    asked = (name for name in _MAY_LACK if options[name] != usual[name])
    given = ", ".join(f"--trainer.{name}" for name in asked)
    if not given:
        return ""
    return f" (asked for by {given}; change one of these, or install what it needs)"


def as_list(given: Any) -> list[Any]:
    """An option that may be one thing, several or none, as a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, list) else [given]
