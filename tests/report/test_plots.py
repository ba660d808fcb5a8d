"""Plots: which files, which size, what they show, and nothing half-written."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from softtrace.density.curve import PHASES
from softtrace.errors import InvalidInputError
from softtrace.files import atomic_path
from softtrace.report import plots
from softtrace.report.drawing import lighter, printable, style
from tests.support.densities import LAYERS, synthetic_density

pytestmark = pytest.mark.thorough

NAMES = [
    "tv_over_size.png",
    "size_against_entropy.png",
    "edges_over_size.png",
    "early_exit_agreement.png",
]
Runs = list[tuple[str, dict[str, Any]]]


def several(count: int) -> Runs:
    return [(f"run {i}", synthetic_density(factor=1 - i / 10)) for i in range(count)]


def drawn(draw: Callable[[Runs], Figure | None], runs: Runs) -> Figure:
    with style():
        figure = draw(runs)
    assert figure is not None
    return figure


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts() if text.get_text().strip()]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_writes_four_png_of_a_thousand_pixels(tmp_path: Path, count: int) -> None:
    written = plots.write_plots(several(count), tmp_path)
    assert written == [tmp_path / name for name in NAMES]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    for path in written:
        width, height = png_size(path)
        assert width == 1000
        assert 400 <= height <= 1300


def test_same_numbers_give_the_same_bytes_whatever_the_users_style(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = plots.write_plots(several(2), tmp_path / "a")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 50}):
        second = plots.write_plots(several(2), tmp_path / "b")
        assert matplotlib.rcParams["font.size"] == 30  # and the user's style is put back
    for left, right in zip(first, second, strict=True):
        assert left.read_bytes() == right.read_bytes()


@pytest.mark.parametrize("count", [0, 9])
def test_refuses_no_run_and_more_runs_than_colours(tmp_path: Path, count: int) -> None:
    with pytest.raises(InvalidInputError, match=f"found {count}, allowed are 1 to 8"):
        plots.write_plots([("run", synthetic_density())] * count, tmp_path)
    assert not list(tmp_path.iterdir())


def test_failed_saving_leaves_old_plot_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAMES[0]).write_bytes(b"old")

    def fail(self: Figure, path: Path, **_: Any) -> None:
        path.write_bytes(b"\x89PNG half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        plots.write_plots(several(1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[0]]
    assert (tmp_path / NAMES[0]).read_bytes() == b"old"


def test_labels_that_are_no_plain_words_do_not_warn(tmp_path: Path) -> None:
    labels = ["_hidden", "a$b$c", "名\n前", "x" * 200, r"\frac{"]
    plots.write_plots([(label, synthetic_density()) for label in labels], tmp_path)
    assert printable("名\n前 é") == "? ? é"


def test_tv_plot_shows_both_groups_band_baselines_and_phases() -> None:
    figure = drawn(plots._tv_over_size, several(1))
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert axes.get_xlim() == (1e-4, 1)
    lines = axes.get_lines()
    assert len(lines) == 4 + 2
    dashed = [line for line in lines if line.is_dashed()]
    assert len(dashed) == 4
    np.testing.assert_allclose(lines[-1].get_ydata(), [1 - step / 25 for step in range(26)])
    assert [text.get_text() for text in axes.texts] == list(PHASES)
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    np.testing.assert_allclose(spans, list(PHASES.values()))
    assert legend(figure) == [
        "easy tokens (lowest entropy)",
        "all tokens",
        "middle half of the tokens",
        "random connected edges, residual kept",
        "random connected edges, residual not kept",
        "least important first, residual kept",
        "least important first, residual not kept",
    ]


def test_tv_plot_shades_no_phases_that_its_curves_lack() -> None:
    runs = several(2)
    flat = [0.9] * 25 + [0.0]
    runs[1][1]["curve"]["all"] = {**runs[1][1]["curve"]["all"], "mean": flat}
    axes = drawn(plots._tv_over_size, runs).axes[0]
    assert not axes.patches
    (note,) = (text.get_text() for text in axes.texts)
    assert note == ("no phases shaded: 0 % to 50 % of the fall of TV comes below 1 % of the edges")


@pytest.mark.parametrize("draw", plots._PLOTS.values())
@pytest.mark.parametrize("kind", ["recorded", "recomputed", "kept"])
def test_every_plot_names_its_kind_of_attention(
    draw: Callable[[Runs], Figure | None], kind: str
) -> None:
    figure = drawn(draw, [(name, {**density, "attention": kind}) for name, density in several(2)])
    title = figure.legends[0].get_title().get_text()
    assert title.startswith(f"attention {kind}")
    unmasked = draw in (plots._edges_over_size, plots._early_exit_agreement)
    assert title.endswith("nothing is masked") == unmasked


def test_tv_plot_of_several_runs_names_each_and_draws_one_set_of_baselines() -> None:
    runs = several(3)
    runs[0][1]["curve"]["baselines"] = None  # those of the second run are taken
    figure = drawn(plots._tv_over_size, runs)
    assert len(figure.axes[0].get_lines()) == 4 + 2 * 3
    assert legend(figure)[:3] == ["run 0", "run 1", "run 2"]


def test_tv_plot_without_baselines_has_no_baseline_in_its_legend() -> None:
    runs = several(1)
    runs[0][1]["curve"]["baselines"] = None
    figure = drawn(plots._tv_over_size, runs)
    assert len(figure.axes[0].get_lines()) == 2
    assert not any("residual" in text for text in legend(figure))


def test_scatter_has_a_panel_a_run_with_the_first_runs_medians_in_the_others() -> None:
    runs = several(2)
    figure = drawn(plots._size_against_entropy, runs)
    assert [axes.get_title("left") for axes in figure.axes] == ["run 0", "run 1"]
    points = np.asarray(figure.axes[1].collections[0].get_offsets())
    np.testing.assert_allclose(points[:, 1], runs[1][1]["scatter"]["size_at_tv_0.2"])
    # 60 points in 12 bins: the median of the first bin is its third point.
    dashed = [line for line in figure.axes[1].get_lines() if line.get_linestyle() == "--"]
    assert np.asarray(dashed[0].get_ydata())[0] == runs[0][1]["scatter"]["size_at_tv_0.2"][2]
    assert "rank correlation +0.70" in [text.get_text() for text in figure.axes[0].texts]


def test_scatter_keeps_empty_traces_on_the_log_axis(tmp_path: Path) -> None:
    runs = several(1)
    runs[0][1]["scatter"]["size_at_tv_0.2"][0] = 0.0
    axes = drawn(plots._size_against_entropy, runs).axes[0]
    sizes = np.asarray(axes.collections[0].get_offsets())[:, 1]
    assert sizes.min() > 0
    runs[0][1]["scatter"]["size_at_tv_0.2"] = [0.0] * 60
    plots.write_plots(runs, tmp_path)


def test_edges_are_stacked_to_a_hundred_per_cent_by_kind_and_depth() -> None:
    figure = drawn(plots._edges_over_size, several(1))
    axes = figure.axes[0]
    areas = axes.collections
    assert len(areas) == 16
    top = areas[-1].get_datalim(axes.transData).y1
    assert top == pytest.approx(100)
    assert [area.get_hatch() for area in areas[::4]] == ["", "///", "...", "xxx"]
    # Within a kind, later layers are lighter, so that the plot reads without colour.
    shades = [np.mean(lighter("#0072B2", by)) for by in plots._DEPTHS.values()]
    assert shades == sorted(shades)


def test_edges_plot_follows_the_order_of_kinds_in_the_file() -> None:
    runs = several(1)
    only_mlp = [[[0.0, 0.0, 0.25, 0.0]] * 4] * 26
    runs[0][1]["topology"] = {**runs[0][1]["topology"], "shares": only_mlp}
    axes = drawn(plots._edges_over_size, runs).axes[0]
    boundaries = [np.asarray(line.get_ydata())[0] for line in axes.get_lines()]
    assert boundaries == [0, 100, 100, 100]  # attention, MLP, both residuals


def test_no_edges_plot_without_counted_edges(tmp_path: Path) -> None:
    runs = several(1)
    runs[0][1]["topology"] = None
    assert [path.name for path in plots.write_plots(runs, tmp_path)] == [*NAMES[:2], NAMES[3]]


def test_exit_plot_is_in_per_cent_over_layers() -> None:
    figure = drawn(plots._early_exit_agreement, several(2))
    lines = figure.axes[0].get_lines()
    assert len(lines) == 4
    assert list(lines[1].get_xdata()) == list(range(1, LAYERS + 1))
    assert list(lines[1].get_ydata()) == pytest.approx([40, 80, 90, 100])
    assert legend(figure)[:2] == ["run 0", "run 1"]


def test_models_of_one_layer_and_one_point_can_be_drawn(tmp_path: Path) -> None:
    density = synthetic_density(points=1)
    density["early_exit"] = {
        "layers": [1],
        "agreement": {g: [1.0] for g in ("all", "easy", "hard")},
    }
    assert len(plots.write_plots([("one", density)], tmp_path)) == 4


def test_missing_values_are_gaps(tmp_path: Path) -> None:
    density = synthetic_density()
    density["curve"] = {
        **density["curve"],
        "easy": {k: [None] * 26 for k in ("mean", "q25", "q75")},
    }
    density["entropy_spearman"]["size_at_tv_0.2"] = None
    assert len(plots.write_plots([("run", density)], tmp_path)) == 4


def test_atomic_path_refuses_to_replace_by_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), atomic_path(target):
        pass
    assert target.read_bytes() == b"old"
