"""What the attach-time proof found: of each check the largest mismatch, and what was allowed."""

from __future__ import annotations

from dataclasses import dataclass, field

from softtrace.errors import UnsupportedModelError


@dataclass
class Verification:
    """What was checked on the tiny batch, with the largest relative mismatch of each check.

    Attributes:
        errors: check to the largest mismatch that was found, in the order of the checks.
        allowed: check to the mismatch that would have been accepted.
    """

    errors: dict[str, float] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)

    @property
    def largest(self) -> float:
        """Over all checks."""
        return max(self.errors.values(), default=0.0)

    def require(self, check: str, error: float, allowed: float, failure: str) -> None:
        """Note a mismatch; raise :class:`UnsupportedModelError` with ``failure`` if too large."""
        self.errors[check] = max(error, self.errors.get(check, 0.0))
        self.allowed[check] = allowed
        if not error <= allowed:
            raise UnsupportedModelError(failure)
