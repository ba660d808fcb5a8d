"""``report.html``: one or several ``density.json`` as one page that needs nothing but a browser.

The page holds the numbers themselves, as JSON, and draws them; what is written out before it is
opened (headline, table, foot) is formatted from the same JSON. Nothing is fetched: a policy in the
page forbids it, and allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from softtrace.density.curve import SIZE_BOUND
from softtrace.evaluation.density_file import Density
from softtrace.files import atomic_path, finite
from softtrace.percent import percent
from softtrace.report.attention import attention_meaning, attention_name, unmasked_note
from softtrace.report.colour_scale import ENDS, shade_bounds
from softtrace.report.drawing import COLOURS, GREY, Runs, check_count
from softtrace.report.phases import curves_of, phases_note, shown_phases
from softtrace.report.plots import binned_medians, scatter_points
from softtrace.report.tables import (
    MEASURES,
    Measure,
    all_held_out,
    change,
    count,
    half_depth_exit,
    interval,
    intervals_meaning,
    lengths_note,
    percent_change,
)

NOTHING = "–"
"""What stands for a number that could not be measured."""

_PAGE = "assets"
_SCRIPTS = ("draw.js", "charts.js", "maps.js", "text.js")
_HEADLINES = {
    "size_at_tv_0.2_easy": ("Edges needed", "median size at TV 0.2, easy tokens"),
    "area_easy": ("Cost of dropping edges", "area under distortion, easy tokens"),
    "early_exit_half_easy": (
        "Early exits that agree",
        "after {half} of {layers} layers, easy tokens",
    ),
    "loss_all": ("{Held_out}", "nats per token, all tokens"),
}
_BY_KEY = {measure.key: measure for measure in MEASURES}


def write_report(runs: Runs, folder: Path | str) -> Path:
    """Write ``report.html`` into an existing folder, atomically.

    Args:
        runs: label and content of each ``density.json`` as
            :func:`softtrace.evaluation.density_file.load_density` reads it, 1 to ``MAX_RUNS`` of
            ``drawing``; changes are against the first. Files without ``samples`` (from before there
            were any) give a page without text.
        folder: gets ``report.html``.

    Returns:
        The path that was written.

    Raises:
        InvalidInputError: no run, or too many.
    """
    check_count(runs)
    path = Path(folder) / "report.html"
    page = render(runs)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def render(runs: Runs) -> str:
    """The page of these runs; see :func:`write_report`."""
    environment = Environment(
        loader=PackageLoader("softtrace.report", _PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "separators": (",", ":"),
        "allow_nan": False,
    }
    environment.filters |= {"percent": percent, "count": count}
    script = "\n".join(_resource(name) for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    densities = [density for _, density in runs]
    first = densities[0]
    return environment.get_template("report.html.j2").render(
        title=_title(runs),
        runs=[{"label": label, "density": density} for label, density in runs],
        first=first,
        held_out=all_held_out(runs),
        lead=_lead(runs),
        headlines=[_headline(key, runs) for key in _HEADLINES],
        measures=[_row(measure, runs) for measure in MEASURES],
        data=_data(runs),
        intervals=intervals_meaning(first),
        lengths=lengths_note(first),
        attention=attention_name(densities),
        unmasked=unmasked_note(densities),
        attention_meaning=attention_meaning(densities),
        phases=shown_phases(curves_of(densities)),
        phases_note=phases_note(curves_of(densities)),
        colours=COLOURS,
        # JSON escapes what HTML would read; a digest of the script is all that may run.
        script=Markup(script),
        style=Markup(_resource("report.css")),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        nothing=NOTHING,
    )


def _resource(name: str) -> str:
    return (files("softtrace.report") / _PAGE / name).read_text(encoding="utf-8")


def _data(runs: Runs) -> dict[str, Any]:
    """What the page draws: every run whole, and the medians that the plots show."""
    points, floor = scatter_points(runs)
    medians = [[part.tolist() for part in binned_medians(*pair)] for pair in points]
    densities = [density for _, density in runs]
    sizes = [size for density in densities for size in density["scatter"]["size_at_tv_0.2"]]
    counted = [density["topology"]["shares"] for density in densities if density["topology"]]
    shares = [share for run in counted for size in run for depth in size for share in depth]
    data = {
        "runs": [
            {"label": label, "density": density, "medians": line, "phases": _phases([density])}
            for (label, density), line in zip(runs, medians, strict=True)
        ],
        "size_bounds": shade_bounds(sizes),  # one scale for all runs, so that colours compare
        "share_bounds": shade_bounds(shares),
        "scale_ends": ENDS,
        "floor": floor,
        "bound": SIZE_BOUND,
        "phases": _phases(densities),
        "grey": GREY,
    }
    whole: dict[str, Any] = finite(data)
    return whole


def _phases(densities: Sequence[Density]) -> list[dict[str, Any]]:
    shown = shown_phases(curves_of(densities))
    return [{"name": name, "from": low, "to": high} for name, (low, high) in shown.items()]


def _title(runs: Runs) -> str:
    first, *others = [label for label, _ in runs]
    if not others:
        return first
    return f"{' and '.join(others) if len(others) < 3 else f'{len(others)} runs'} against {first}"


def _lead(runs: Runs) -> str:
    """The first number as a sentence; with several runs the sparsest against the first."""
    measure = _BY_KEY["size_at_tv_0.2_easy"]
    sizes = [(size, label) for label, d in runs if (size := measure.read(d)) is not None]
    if not sizes:
        return "How many edges an easy token needs could not be measured on this text."
    least, label = min(sizes, key=lambda found: found[0])
    lead = f"Half of the easy tokens need no more than {measure.format(least)} of the edges"
    if len(runs) == 1:
        return f"{lead} to come close to the full prediction."
    base = measure.read(runs[0][1])
    if label == runs[0][0] or base is None:
        return f"{lead} in {label}, which needs the fewest."
    return f"{lead} in {label}; in {runs[0][0]} it was {measure.format(base)}."


def _headline(key: str, runs: Runs) -> dict[str, Any]:
    title, note = _HEADLINES[key]
    first: Density = runs[0][1]
    words = {
        "half": half_depth_exit(first),
        "layers": len(first["early_exit"]["layers"]),
        "Held_out": "Held-out loss" if all_held_out(runs) else "Loss",
    }
    row = _row(_BY_KEY[key], runs)
    return {**row, "title": title.format(**words), "note": note.format(**words)}


def _row(measure: Measure, runs: Runs) -> dict[str, Any]:
    """One measure of every run, each with its change against the first and what that means."""
    base = measure.read(runs[0][1])
    cells: list[Mapping[str, Any]] = []
    for number, (label, density) in enumerate(runs):
        value = measure.read(density)
        changed = change(measure, value, base) if number else ""
        bounds = interval(density, measure.key)
        cells.append(
            {
                "label": label,
                "value": value,
                "shown": NOTHING if value is None else measure.format(value),
                "interval": bounds and " to ".join(measure.format(end) for end in bounds),
                "change": changed.replace("n/a", NOTHING).replace("-", "\N{MINUS SIGN}"),
                "verdict": _verdict(measure, value, base) if number else "",
            }
        )
    return {"key": measure.key, "name": measure.name, "better": measure.better, "cells": cells}


def _verdict(measure: Measure, value: float | None, base: float | None) -> str:
    changed = percent_change(measure, value, base)
    if not measure.better or changed is None:
        return ""
    if changed == 0:
        return "same"
    return "better" if (changed < 0) == (measure.better == "lower") else "worse"
