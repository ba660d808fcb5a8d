"""What becomes of a step whose term is not finite."""

from __future__ import annotations

import logging

from softtrace.errors import NonFiniteError

logger = logging.getLogger(__name__)


class NonFiniteSteps:
    """Ends the training there, or leaves the term out and says so.

    Args:
        mode: ``on_nonfinite`` of the options, "raise" or "skip".
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._left_out = 0

    def met(self, why: str, error: NonFiniteError) -> None:
        """Raise, or warn at the 1st, 2nd, 4th, ... skipped step: from the start, never a flood.

        Args:
            why: names the step.
            error: that was met there.

        Raises:
            NonFiniteError: with ``why``, where the mode is "raise".
        """
        if self._mode == "raise":
            raise NonFiniteError(why) from error
        self._left_out += 1
        if self._left_out.bit_count() == 1:
            logger.warning(
                "%s The density term was left out; so far %d times.", why, self._left_out
            )
