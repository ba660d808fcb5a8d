"""What the attach-time proof found: of each check the largest mismatch, and what was allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from softtrace.errors import UnsupportedModelError


@dataclass(frozen=True)
class Verification:
    """What was checked on the tiny batch, with the largest relative mismatch of each check.

    Attributes:
        errors: check to the largest mismatch that was found, in the order of the checks.
        allowed: check to the mismatch that would have been accepted.
    """

    errors: Mapping[str, float]
    allowed: Mapping[str, float]

    @property
    def largest(self) -> float:
        """The largest mismatch of all checks."""
        return max(self.errors.values(), default=0.0)


class Checks:
    """The checks of a proof while it runs."""

    def __init__(self) -> None:
        self._errors: dict[str, float] = {}
        self._allowed: dict[str, float] = {}

    def require(self, check: str, error: float, allowed: float, failure: str) -> None:
        """Note a mismatch; raise :class:`UnsupportedModelError` with ``failure`` if too large."""
        self._errors[check] = max(error, self._errors.get(check, 0.0))
        self._allowed[check] = allowed
        if not error <= allowed:
            raise UnsupportedModelError(failure)

    def verification(self) -> Verification:
        """What was found so far; nothing is added to it later."""
        return Verification(
            MappingProxyType(dict(self._errors)), MappingProxyType(dict(self._allowed))
        )
