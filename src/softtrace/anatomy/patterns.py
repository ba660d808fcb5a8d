"""Residual patterns: what tells them apart, and their names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    """What tells the patterns apart.

    Attributes:
        parallel: attention and MLP read the same node and add into the same node.
        before: a norm stands before the sub-blocks.
        after: a norm stands between attention's projection and the sum.
        multiplied: the sub-blocks' outputs are multiplied by a constant.
        inside: a sub-block adds the residual itself.
        bare: the MLP is no module of its own, its parts are children of the layer.
    """

    parallel: bool
    before: bool
    after: bool
    multiplied: bool
    inside: bool
    bare: bool


@dataclass(frozen=True)
class Pattern:
    """A name for evidence: every field that is not None has to agree."""

    name: str
    parallel: bool | None = None
    before: bool | None = None
    after: bool | None = None
    multiplied: bool | None = None
    inside: bool | None = None
    bare: bool | None = None

    def agrees(self, evidence: Evidence) -> bool:
        """Whether the evidence shows this pattern."""
        return all(
            wanted is None or wanted == getattr(evidence, name)
            for name, wanted in vars(self).items()
            if name != "name"
        )


#: how the nodes are laid out: the first that agrees
LAYOUTS: tuple[Pattern, ...] = (
    Pattern("parallel residual", parallel=True),
    Pattern("sequential pre-norm", parallel=False, before=True, after=False),
    Pattern("post-norm", parallel=False, before=False, after=True),
    Pattern("sandwich norm", parallel=False, before=True, after=True),
    Pattern("sequential without norms", parallel=False, before=False, after=False),
)
#: what a layout may have besides: all that agree
TRAITS: tuple[Pattern, ...] = (
    Pattern("residual multiplier", multiplied=True),
    Pattern("residual added inside the sub-module", inside=True),
    Pattern("no MLP module", bare=True),
)


def name_of(evidence: Evidence) -> str:
    """The layout's name, then the traits'."""
    layout = next(pattern.name for pattern in LAYOUTS if pattern.agrees(evidence))
    return ", ".join([layout, *(trait.name for trait in TRAITS if trait.agrees(evidence))])
