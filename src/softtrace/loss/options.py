"""The dials of the density loss, in one place for every integration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

import torch

from softtrace.checks import check_choice, check_least, check_range
from softtrace.density.easiness import easiness
from softtrace.errors import InvalidInputError, UnknownOptionError
from softtrace.loss.budget import check_budget
from softtrace.loss.schedule import StrengthSchedule

MaskKind = Literal["straight", "soft"]
Family = Literal["both", "sparse", "shallow"]
MaskedAttention = Literal["recorded", "recomputed"]
Distance = Literal["kl", "tv"]
OnNonFinite = Literal["raise", "skip"]
Preset = Literal["balanced", "sparse", "decode", "soft"]

_BALANCED: dict[str, Any] = {
    "strength": 0.35, "masks": "straight", "temperature": 0.5, "exits": 0.2, "exit_tokens": 0.25,
    "exit_quantile": 0.35, "exit_depths": (0.5, 0.5), "exit_map": True,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "balanced": _BALANCED,
    "sparse": {**_BALANCED, "exits": 0.0, "exit_map": False},
    "decode": {**_BALANCED, "strength": 0.1, "exits": 2.0, "exit_quantile": 1.0},
    "soft": {**_BALANCED, "masks": "soft", "temperature": 0.1},
}
"""What each :data:`Preset` sets; what it does and costs is in the method card, ``recipes``."""


@dataclass(frozen=True)
class DensityOptions:
    """Options of the density loss; plain numbers and strings, so that YAML can hold them.

    Args:
        strength: Weight of the term, >= 0; 0 runs nothing and changes nothing. None: the preset's.
        preset: What the term is for. ``"balanced"``: a sparse and early graph, by ``strength``
            0.35, hard ``masks``, ``exits`` 0.2, ``exit_tokens`` 0.25, ``exit_quantile`` 0.35,
            ``exit_depths`` (0.5, 0.5) and ``exit_map``. ``"sparse"``: no exits, for a little less
            held-out loss and time. ``"decode"``: exits that draft, by ``strength`` 0.1, ``exits`` 2
            and ``exit_quantile`` 1. ``"soft"``: soft masks of ``temperature`` 0.1, for more time
            and memory. An option that is given beside it takes precedence.
        start_step: First global step with the term.
        warmup_steps: Steps over which the strength rises linearly.
        every: Masked runs come at every k-th step only, with k times the strength: fewer and larger
            ones, which is what a GPU is fast at. Exits have ``exit_every``. None: 1 on a CPU, 2
            on CUDA, 8 on other accelerators, with ``cuda_graph=False`` and where weights are
            sharded. A model that turns out not to be capturable, and float16, keep 2.
        masks: Kind of masks: ``"straight"`` (hard ones, held constant) or ``"soft"``
            (differentiable through the importances; the recording run then needs gradients). None:
            the preset's.
        temperature: Temperature of soft masks in nats of importance, > 0. None: the preset's.
        family: Kind of subgraph: ``"both"`` (sparse in the first E layers, only residual edges
            above), ``"sparse"`` (E = L) or ``"shallow"`` (every edge of the first E layers).
        thresholds: Bounds of τ in (0, 1), which is drawn log-uniformly for every window.
        depths: Bounds of E as shares of the layers in (0, 1], drawn uniformly for every token.
        attention: Attention probabilities of masked runs: ``"recorded"`` (the full run's, as the
            measure has them; cheaper) or ``"recomputed"`` (the masked run's own, so that gradients
            of the term also reach queries and keys).
        distance: Distance of the masked prediction from the full one: ``"tv"`` (the measure itself,
            in [0, 1]; bounded, so that hopeless tokens do not take over), ``"kl"`` (nats), or a
            callable ``(full logits [N,V], masked logits [N,V]) -> distances [N]``.
        easiness: What makes a token easy: ``"entropy"``, ``"loss"``, ``"margin"``, or a callable
            ``(logits [B,T,V], targets [B,T]) -> scores [B,T]``, low where easy. A callable depends
            on its arguments alone, here and above, or ``cuda_graph`` is off.
        easy_quantile: Share of the tokens that are easy, in (0, 1].
        easy_width: Smoothness of the step at the quantile, standard deviations of the score, >= 0.
        share: Share of the batch's windows that the term looks at, in (0, 1]; at least one. This is
            the dial of the cost. None: 0.125, 0.15 and 0.3 where ``every`` is 1, 2 and 8 by itself.
        crop: Tokens of a window: every sequence is cut into as many as fit, and the term sees each
            as a sequence of its own. None for whole sequences.
        exits: Weight of early exits, >= 0; None: the preset's. Adds ``exits · KL(full ‖ early
            exit)`` (nats) inside the term. Some tokens of the training forward itself are read
            early. That forward has to be watched, see :meth:`softtrace.DensityLoss.watching`;
            Lightning's callback does.
        exit_tokens: Share of the batch's tokens that are looked at for exits, in (0, 1]; None: the
            preset's.
        exit_quantile: Share of those tokens, the easiest, whose exits are read, in (0, 1]; 1 for
            all of them. None: the preset's.
        exit_depths: Bounds of the layers after which they are read, as shares of all in [0, 1],
            from the first layer to the last but one; equal ones for a single exit. None: the
            preset's.
        exit_every: Exits are read at every k-th step only, with k times their weight, and between
            masked runs where these come as often.
        exit_map: Read exits through a linear map in front of the final norm, learned by itself, see
            :mod:`softtrace.model.exit_maps`: exits agree more often, and the model has to change
            less for them. With ``exits=0`` the model does not change for them at all. What reads
            exits without the map, as transformers' ``assistant_early_exit`` does, gains nothing.
            None: the preset's, or False where ``exits=0`` is given.
        size_weight: Weight of a size term, >= 0: adds ``size_weight · soft size`` inside the term,
            differentiable through the importances. Never without the distortion: alone it is gamed
            by rescaling.
        cuda_graph: On CUDA, capture the masked runs of a shape once and replay them, and exits at a
            single depth: launches are most of what they cost. A graph holds gradients of the
            weights, and all graphs together the memory that the largest works in. Models that
            cannot be captured, and float16, run as elsewhere, after a warning.
        fuse: Compile what is captured (``torch.compile``), which fuses its many small operations:
            cheaper steps, after compiling once for every shape, seconds for exits and a minute or
            two for masked runs. None: exits, and masked runs where the model is compiled.
        on_nonfinite: What to do at a step whose logits are not finite: ``"raise"``, or ``"skip"``
            its term.
        seed: Seed of the random draws, which are a function of (seed, step, rank) alone.
        budget: Share by which the held-out loss may lie above plain fine-tuning's, > 0: the
            strength then follows the held-out loss that is measured in training, see
            :class:`softtrace.loss.budget.LossBudget`. Needs ``reference``. None: it does not.
        reference: Held-out losses of plain fine-tuning, a run with strength 0 on the same data and
            held-out text: nats by global step, or the folder (or log file) of that run, see
            :func:`softtrace.loss.reference.read_losses`.
        monitor: Name that the held-out loss is logged under, here and in the reference; None:
            ``loss/held_out`` in Lightning, ``eval_loss`` in transformers.

    Raises:
        InvalidInputError: A value is outside its range, or a name is unknown.
    """

    strength: float = None  # type: ignore[assignment]  # a number once it is made
    preset: Preset = "balanced"
    start_step: int = 0
    warmup_steps: int = 0
    every: int | None = None
    masks: MaskKind = None  # type: ignore[assignment]
    temperature: float = None  # type: ignore[assignment]
    family: Family = "both"
    thresholds: tuple[float, float] = (0.02, 0.5)
    depths: tuple[float, float] = (0.5, 1.0)
    attention: MaskedAttention = "recorded"
    distance: Distance | Callable[[Any, Any], Any] = "tv"
    easiness: str | Callable[[Any, Any], Any] = "entropy"
    easy_quantile: float = 0.35
    easy_width: float = 0.1
    share: float | None = None
    crop: int | None = 64
    exits: float = None  # type: ignore[assignment]
    exit_tokens: float = None  # type: ignore[assignment]
    exit_quantile: float = None  # type: ignore[assignment]
    exit_depths: tuple[float, float] = None  # type: ignore[assignment]
    exit_every: int = 1
    exit_map: bool = None  # type: ignore[assignment]
    size_weight: float = 0.0
    cuda_graph: bool = True
    fuse: bool | None = None
    on_nonfinite: OnNonFinite = "raise"
    seed: int = 0
    budget: float | None = None
    reference: str | dict[int, float] | None = None
    monitor: str | None = None

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, get_args(Preset))
        if self.strength in get_args(Preset):  # as in DensityPenalty("sparse")
            raise InvalidInputError(
                f"strength: found {self.strength!r}, allowed are numbers from 0; name the preset, "
                f"preset={self.strength!r}"
            )
        if self.exits == 0 and self.exit_map is None:  # who asks for none wants no map either
            object.__setattr__(self, "exit_map", False)
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_least("exit_every", self.exit_every, 1)
        self._schedule(1 if self.every is None else self.every)
        easiness(self.easiness)
        check_choice("masks", self.masks, get_args(MaskKind))
        check_choice("family", self.family, get_args(Family))
        if not callable(self.distance):
            check_choice("distance", self.distance, get_args(Distance))
        check_choice("attention", self.attention, get_args(MaskedAttention))
        check_choice("on_nonfinite", self.on_nonfinite, get_args(OnNonFinite))
        infinity = float("inf")
        check_range("temperature", self.temperature, 0, infinity, open_low=True, open_high=True)
        check_range("easy_quantile", self.easy_quantile, 0, 1, open_low=True)
        check_range("easy_width", self.easy_width, 0, infinity, open_high=True)
        if self.share is not None:
            check_range("share", self.share, 0, 1, open_low=True)
        check_range("exits", self.exits, 0, infinity, open_high=True)
        check_range("exit_tokens", self.exit_tokens, 0, 1, open_low=True)
        check_range("exit_quantile", self.exit_quantile, 0, 1, open_low=True)
        check_range("size_weight", self.size_weight, 0, infinity, open_high=True)
        _pair("thresholds", self.thresholds, open_high=True)
        _pair("depths", self.depths)
        _pair("exit_depths", self.exit_depths, open_low=False)
        check_least("crop", self.crop, 1, optional=True)
        for name in ("cuda_graph", "exit_map"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(
                    f"{name}: found {getattr(self, name)!r}, allowed are booleans"
                )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InvalidInputError(f"seed: found {self.seed!r}, allowed are integers")
        if self.fuse is not None and not isinstance(self.fuse, bool):
            raise InvalidInputError(f"fuse: found {self.fuse!r}, allowed are booleans and None")
        check_budget(self.budget, self.reference, self.monitor)
        if self.size_weight > 0 and self.family == "shallow":
            raise InvalidInputError(
                "size_weight: the family 'shallow' has no threshold and so no trace size; "
                "use family 'both' or 'sparse'"
            )

    def on(self, device: torch.device) -> DensityOptions:
        """The same options with ``every`` and ``share`` as they are on this device.

        A masked run is many small operations: on an accelerator their number is what it costs,
        unless they are captured, on a CPU their size.
        """
        every, share = 8, 0.3
        if device.type == "cpu":
            every, share = 1, 0.125
        elif device.type == "cuda" and self.cuda_graph:
            every, share = 2, 0.15
        return replace(
            self,
            every=every if self.every is None else self.every,
            share=share if self.share is None else self.share,
        )

    @property
    def schedule(self) -> StrengthSchedule:
        """Strength of the masked runs as a function of the global step.

        Raises:
            ValueError: ``every`` depends on the device; ask what :meth:`on` gives.
        """
        if self.every is None:
            raise ValueError("every is None: take options.on(device).schedule")
        return self._schedule(self.every)

    @classmethod
    def of(cls, given: DensityOptions | Mapping[str, Any] | None) -> DensityOptions:
        """Options as they are, those that a mapping names, or for None the defaults.

        Raises:
            InvalidInputError: something else was given, or there is no option of a name.
        """
        if isinstance(given, DensityOptions):
            return given
        if not isinstance(given, Mapping | None):
            raise InvalidInputError(
                f"density: found {given!r}, allowed are a mapping of options, such as "
                "{'preset': 'sparse'}, DensityOptions, None"
            )
        found = {} if given is None else dict(given)
        check_names("density", found)
        return cls(**found)

    @classmethod
    def changed(cls, given: DensityOptions | None, changes: Mapping[str, Any]) -> DensityOptions:
        """Ready options with some of them changed; for None those that the changes name.

        Raises:
            InvalidInputError: something else was given, a preset beside ready options, or there is
                no option of a name.
        """
        check_names("DensityLoss", changes)
        if given is None:
            return cls(**changes)
        if not isinstance(given, DensityOptions):
            raise InvalidInputError(
                f"options: found {given!r}, allowed are DensityOptions, None; give single options "
                "by name, as in DensityLoss(model, preset='sparse')"
            )
        if "preset" in changes:
            raise InvalidInputError(
                "preset: found one beside ready options, which have theirs already; give the "
                "options as keywords, or DensityOptions(preset=...)"
            )
        return replace(given, **changes)

    @property
    def window_share(self) -> float:
        """``share`` as a number.

        Raises:
            ValueError: It depends on the device; ask what :meth:`on` gives.
        """
        if self.share is None:
            raise ValueError("share is None: take options.on(device).window_share")
        return self.share

    def _schedule(self, every: int) -> StrengthSchedule:
        return StrengthSchedule(self.strength, self.start_step, self.warmup_steps, every)

    @property
    def exit_schedule(self) -> StrengthSchedule:
        """Strength times ``exits``, the weight of early exits, likewise."""
        weight, every = self.strength * self.exits, self.exit_every
        return StrengthSchedule(weight, self.start_step, self.warmup_steps, every, every - 1)

    @property
    def reads_exits(self) -> bool:
        """Whether exits are read at all, for the model or for their map."""
        return self.strength > 0 and (self.exits > 0 or self.exit_map)

    @property
    def through_importances(self) -> bool:
        """Whether gradients flow through the importances, so that the recording run needs them."""
        return (self.masks == "soft" and self.family != "shallow") or self.size_weight > 0

    def depth_bounds(self, layers: int) -> tuple[int, int]:
        """Smallest and largest E for a model of this many layers."""
        if self.family == "sparse":
            return layers, layers
        low, high = (min(layers, max(1, round(share * layers))) for share in self.depths)
        return low, high

    def exit_bounds(self, layers: int) -> tuple[int, int]:
        """Smallest and largest number of layers before an exit, for a model of 2 or more."""
        low, high = (min(layers - 1, max(1, round(share * layers))) for share in self.exit_depths)
        return low, high


def check_names(where: str, names: Iterable[str]) -> None:
    """Raise :class:`UnknownOptionError` for a name that no option has; ``where`` it was given."""
    known = [field.name for field in fields(DensityOptions)]
    for name in names:
        if name not in known:
            close = get_close_matches(str(name), known, 1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            raise UnknownOptionError(
                f"{where}: found {name!r}{meant}, allowed are {', '.join(known)}"
            )


def _pair(
    name: str, value: tuple[float, float], *, open_low: bool = True, open_high: bool = False
) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2 or value[0] > value[1]:
        raise InvalidInputError(f"{name}: found {value!r}, expected (low, high) with low <= high")
    for bound in value:
        check_range(name, bound, 0, 1, open_low=open_low, open_high=open_high)
