"""Batches in which no token has a target: one is normal, a training of nothing else a mistake."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

NO_TARGET = "no token of the batch has a target"
MANY = 50


class NoTargets:
    """Says once that so many batches in a row had nothing that the term could learn from."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._said = False

    def note(self, counts: bool) -> None:
        """Take in the next batch that the term looked at: whether any token of it counts."""
        self._in_a_row = 0 if counts else self._in_a_row + 1
        if self._in_a_row < MANY or self._said:
            return
        self._said = True
        logger.warning(
            "labels: in %d batches in a row that the density term looked at, no token has a "
            "target: each label is -100, or its token padding. So neither the term nor the task "
            "loss trains anything. Look at what makes the labels (an answer that is cut off "
            "because its prompt fills max_length, or a template by which no token is an "
            "answer's), and at the attention_mask",
            MANY,
        )
