"""What a preset sets, in the options of ``softtrace fit``."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from softtrace.loss.options import PRESETS, DensityOptions

logger = logging.getLogger(__name__)


def fill_preset(penalty: Any, options: DensityOptions) -> None:
    """Write the numbers of a preset into a run's options, and say where it sets none of them.

    So it is with the fit.yaml of another run, which has all of them, and a preset beside it.

    Args:
        penalty: options by name as they were given, None where they were not.
        options: what they come to.
    """
    own = PRESETS[options.preset]
    if all(penalty[name] is not None for name in own):
        given = {name: getattr(options, name) for name in own}
        others = {name: value for name, value in given.items() if _plain(value) != own[name]}
        if others:
            _say(options.preset, others)
    for name in own:
        penalty[name] = getattr(options, name)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@rank_zero_only
def _say(preset: str, others: dict[str, Any]) -> None:
    found = ", ".join(
        f"{name} {value!r} for {PRESETS[preset][name]!r}" for name, value in others.items()
    )
    logger.warning(
        "penalty.preset: %r sets nothing, for all that it sets is given, as in a fit.yaml: %s. "
        "Delete from it what the preset shall set",
        preset, found,
    )  # fmt: skip
