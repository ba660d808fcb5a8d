"""The options of ``softtrace fit`` that are its own, and how its help reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser

#: options of the trainer that a machine or an installation may not be able to give
_MAY_LACK = (
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks"),
    *("plugins", "profiler"),
)

_MARKUP = re.compile(r"(?::\w+:`~?|``)([^`]+)``?")
# One paragraph: argparse joins the lines of a description.
DESCRIPTION = """Fine-tune a causal language model with the density penalty, as in: softtrace fit
--model.path MODEL --data.path TEXT --out OUT. The folder OUT gets the model, its tokenizer and its
card (what `softtrace evaluate --model OUT` reads), fit.yaml (this run's options, for --config),
trained_on.json (hashes of its training texts, which no command then measures as held out), logs/
with metrics.csv, and checkpoints/, unless it ends before the first. --penalty.strength 0 is plain
fine-tuning. Without max_steps, max_epochs or max_time it goes over the text once."""


def add_own_options(parser: ArgumentParser) -> None:
    """Those of the run as a whole."""
    parser.add_argument(
        "--out", type=str, required=True, help="Folder to write to; must be new or empty."
    )
    parser.add_argument(
        "--resume", type=bool, default=False, help="Go on from OUT's last checkpoint."
    )
    parser.add_argument(
        "--checkpoint_every",
        type=int,
        default=100,
        help="Optimiser steps between checkpoints; 0 for none.",
    )
    parser.add_argument(
        "--monitor_every",
        type=int,
        default=0,
        help="Optimiser steps between measurements of density on 16 held-out blocks, of each "
        "64 tokens at most; they go to the logger; 0 for none. Also how often it validates, "
        "unless trainer.val_check_interval is given.",
    )
    parser.add_argument(
        "--card_blocks",
        type=int,
        default=16,
        help="Held-out blocks (64 tokens of each at most) that the model card's densities, "
        "before and after, are measured on; 0 for a card without them.",
    )


def tidy_help(parser: ArgumentParser) -> None:
    """Put what this command is about first, the Trainer's many options last; no markup."""
    groups: Any = parser._action_groups
    groups.sort(key=lambda group: (group.title or "").startswith("Customize every aspect"))
    for action in parser._actions:  # a terminal shows the markup of docstrings as it is
        action.help = action.help and _MARKUP.sub(r"\1", action.help)


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
