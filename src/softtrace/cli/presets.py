"""What a preset sets, in the options of ``softtrace fit``."""

from __future__ import annotations

from typing import Any

from softtrace.loss.options import PRESETS, DensityOptions


def fill_preset(penalty: Any, options: DensityOptions) -> str | None:
    """Write the numbers of a preset into a run's options, and say where it sets none of them.

    So it is with the fit.yaml of another run, which has all of them, and a preset beside it.

    Args:
        penalty: options by name as they were given, None where they were not.
        options: what they come to.

    Returns:
        What is to be said; None where the preset sets anything.
    """
    own = PRESETS[options.preset]
    given = {name: getattr(options, name) for name in own}
    others = {name: value for name, value in given.items() if _plain(value) != own[name]}
    all_given = all(penalty[name] is not None for name in own)
    for name, value in given.items():
        penalty[name] = value
    if not (all_given and others):
        return None
    found = ", ".join(f"{name} {value!r} for {own[name]!r}" for name, value in others.items())
    return (
        f"penalty.preset: {options.preset!r} sets nothing, for all that it sets is given, as in a "
        f"fit.yaml: {found}. Delete from it what the preset shall set"
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
