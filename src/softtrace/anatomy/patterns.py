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


def name_of(evidence: Evidence) -> str:
    """How the nodes are laid out, then what the layout has besides."""
    if evidence.parallel:
        layout = "parallel residual"
    elif evidence.before:
        layout = "sandwich norm" if evidence.after else "sequential pre-norm"
    else:
        layout = "post-norm" if evidence.after else "sequential without norms"
    traits = {
        "residual multiplier": evidence.multiplied,
        "residual added inside the sub-module": evidence.inside,
        "no MLP module": evidence.bare,
    }
    return ", ".join([layout, *(name for name, has in traits.items() if has)])
