"""``report.html`` as a file: its numbers, its safety, its size."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import tomllib
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from softtrace.cli.compare import compare
from softtrace.cli.evaluate import evaluate
from softtrace.data.text_source import TextSource
from softtrace.errors import DataError, InvalidInputError, ModelDirectoryError
from softtrace.evaluation.density_file import load_density
from softtrace.evaluation.samples import MOST_TOKENS
from softtrace.report import html_page
from softtrace.report.attention import MEANINGS
from softtrace.report.html_page import write_report
from softtrace.report.tables import MEASURES
from tests.support.calls import CPU
from tests.support.corpus import write_model, write_tree
from tests.support.densities import LAYERS, synthetic_density, synthetic_samples, write_run

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"block_size": 16, "blocks": 3, "extra_blocks": 0, "run": CPU}


class Page(HTMLParser):
    """What a browser would read: scripts, texts, and the values that elements say they show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.values: dict[tuple[str, int], list[tuple[Any, str]]] = {}
        self.policy = ""
        self._key, self._run, self._value = "", 0, None
        self._open: dict[str, str | None] | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [str(found[name]) for name in ("src", "href") if name in found]
        self._open = found if tag == "script" else None
        if "Content-Security-Policy" in found.values():
            self.policy = str(found["content"])
        self._key = found.get("data-key") or self._key
        self._value = None
        if "data-value" in found:
            self._run, self._value = int(str(found["data-run"])), str(found["data-value"])

    def handle_endtag(self, tag: str) -> None:
        self._value = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.scripts.append((self._open, data))
            self._open = None
            return
        self.text += data
        if self._value is not None:
            shown = self.values.setdefault((self._key, self._run), [])
            shown.append((json.loads(self._value), data))


def page_of(densities: list[dict[str, Any]], folder: Path) -> Page:
    runs = [(Path(density["model"]["path"]).name, density) for density in densities]
    return Page(write_report(runs, folder))


def data_of(page: Page) -> Any:
    return json.loads(next(text for attributes, text in page.scripts if "id" in attributes))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_measure_is_written_out_as_it_is_in_the_file(tmp_path: Path, count: int) -> None:
    densities = [synthetic_density(f"run{n}", 1 - 0.1 * n) for n in range(count)]
    page = page_of(densities, tmp_path)
    for measure in MEASURES:
        for run, density in enumerate(densities):
            value = measure.read(density)
            shown = page.values[measure.key, run]
            assert shown
            assert all(pair == (value, measure.format(value)) for pair in shown)
    found = data_of(page)
    assert [run["density"] for run in found["runs"]] == densities
    if count > 1:
        assert "\N{MINUS SIGN}10.0 %" in page.text


@pytest.mark.parametrize(
    ("key", "value", "verdict"),
    [
        ("loss_all", 2.0, "better"),
        ("loss_all", 30_000.0, "worse"),
        ("loss_all", 3.0009, "same"),  # as far as the page shows it
        ("loss_all", None, ""),
        ("early_exit_half_easy", 0.9, "better"),
        ("early_exit_half_easy", 0.1, "worse"),
        ("entropy_spearman_size", 0.1, ""),
    ],
)
def test_a_change_is_better_or_worse_by_its_number(
    key: str, value: float | None, verdict: str
) -> None:
    measure = next(each for each in MEASURES if each.key == key)
    other = synthetic_density()
    if key == "loss_all":
        other["loss_nats"]["all"] = value
    elif key == "early_exit_half_easy":
        other["early_exit"]["agreement"]["easy"][LAYERS // 2 - 1] = value
    else:
        other["entropy_spearman"]["size_at_tv_0.2"] = value
    first, second = html_page._row(measure, [("a", synthetic_density()), ("b", other)])["cells"]
    assert (first["verdict"], second["verdict"]) == ("", verdict)


@pytest.mark.parametrize("kind", ["recorded", "recomputed", "kept"])
def test_every_figure_names_its_kind_of_attention(tmp_path: Path, kind: str) -> None:
    density = synthetic_density() | {"attention": kind}
    page = page_of([density, density], tmp_path)
    # The text, curves and dots; exits and edges, which mask nothing; and what it means.
    assert page.text.count(f"Attention {kind}.") == 3
    assert page.text.count(f"Attention {kind}, which does not matter here") == 2
    assert MEANINGS[kind] in page.text


def test_it_is_said_which_numbers_compare_at_other_lengths(tmp_path: Path) -> None:
    density = synthetic_density() | {"min_context": 1024}
    density["data"]["block_size"] = 2048
    text = page_of([density], tmp_path).text
    assert "blocks of 2,048, each with at least 1,024 tokens of context" in " ".join(text.split())
    assert "Blocks of another lengthSizes, areas and what traces are made of compare only" in text


def test_colours_are_of_all_runs_together_and_follow_them(tmp_path: Path) -> None:
    plain, dense = synthetic_density(), synthetic_density("dense")
    dense["scatter"]["size_at_tv_0.2"] = [0.3 + 0.005 * step for step in range(60)]
    alone = [data_of(page_of([run], tmp_path))["size_bounds"] for run in (plain, dense)]
    together = data_of(page_of([plain, dense], tmp_path))["size_bounds"]
    assert alone[0][-1] < 0.01 < 0.3 <= alone[1][0]
    assert together[0] < 0.01 < 0.3 < together[-1]
    assert together == data_of(page_of([dense, plain], tmp_path))["size_bounds"]


def test_a_page_shades_phases_only_where_all_its_runs_have_them(tmp_path: Path) -> None:
    plain, dense = synthetic_density(), synthetic_density("dense")
    dense["curve"]["all"] = {**dense["curve"]["all"], "mean": [0.9] * 25 + [0.0]}
    page = page_of([plain], tmp_path)
    assert [phase["name"] for phase in data_of(page)["phases"]] == ["construction", "refinement"]
    assert "(construction); the rest of the graph refines it" in page.text
    page = page_of([plain, dense], tmp_path)
    assert data_of(page)["phases"] == []
    assert [len(run["phases"]) for run in data_of(page)["runs"]] == [2, 0]  # of the heat maps
    assert "No phases are shaded: 0 % to 50 % of the fall of TV" in page.text
    assert "(construction)" not in page.text


def test_intervals_stand_beside_their_numbers(tmp_path: Path) -> None:
    plain = page_of([synthetic_density()], tmp_path)
    assert "brackets" not in plain.text
    density = synthetic_density("new", 0.5)
    density["intervals"] = {"size_at_tv_0.2_easy": [0.003, 0.005], "area_easy": [None, None]}
    page = page_of([synthetic_density(), density], tmp_path)
    assert "0.40 % (0.30 % to 0.50 %)" in page.text
    assert page.text.count(" to 0.50 %") == 1
    assert "In brackets95 % of 1,000 bootstrap samples of the blocks" in page.text
    assert "too narrow" not in page.text
    density["data"]["blocks"] = 4
    assert (
        "4 blocks are too few for it: these intervals are too narrow"
        in page_of([density], tmp_path).text
    )


def test_nothing_is_fetched_and_no_other_script_may_run(tmp_path: Path) -> None:
    page = page_of([synthetic_density()], tmp_path)
    assert all(link.startswith("#") for link in page.links)
    (script,) = (text for attributes, text in page.scripts if "id" not in attributes)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    outside = set(re.findall(r"https?://[^\s\"']+", script)) - {"http://www.w3.org/2000/svg"}
    assert not outside
    assert "@import" not in page.text
    assert "url(" not in page.text


def test_tokens_labels_and_paths_are_text_wherever_they_stand(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    density = synthetic_density(evil)
    density["samples"] = synthetic_samples()
    density["command"] = density["data"]["path"] = density["hardware"] = evil
    page = Page(write_report([(evil, density)], tmp_path))
    assert "img" not in page.tags
    assert page.tags.count("script") == 2
    (run,) = data_of(page)["runs"]
    assert (run["label"], run["density"]) == (evil, density)
    assert page.text.count(evil) >= 4


@pytest.mark.thorough
def test_a_file_from_before_there_was_text_is_read(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, synthetic_density(name)) for name in ("old", "new")]
    density = load_density(paths[1])
    density["samples"] = synthetic_samples()
    write_run(tmp_path / "new", density)
    compare(paths, tmp_path / "out")
    found = data_of(Page(tmp_path / "out" / "report.html"))
    assert "samples" not in found["runs"][0]["density"]
    assert found["runs"][1]["density"]["samples"] == density["samples"]


@pytest.mark.parametrize(
    "missing", ["command", "versions", "hardware", "created", "seconds", "data/path", "samples"]
)
def test_a_file_that_does_not_say_how_it_was_made_is_shown(tmp_path: Path, missing: str) -> None:
    density = {**synthetic_density(), "samples": synthetic_samples(), "seconds": 3.0}
    *outer, key = missing.split("/")
    del (density[outer[0]] if outer else density)[key]
    path = write_run(tmp_path / "run", density)
    page = page_of([load_density(path)], tmp_path)
    assert "How it was made" in page.text
    assert "Undefined" not in page.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "'samples/texts', expected a list that is not empty"),
        ({"vocabulary": [1]}, "found 1 for 'samples/vocabulary'"),
        ({"texts": [{"block": 0, "context": [0]}]}, "found no 'samples/texts/tokens'"),
    ],
)
def test_damaged_text_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    density = {**synthetic_density(), "samples": {**synthetic_samples(), **change}}
    with pytest.raises(DataError, match=message):
        load_density(write_run(tmp_path, density))


@pytest.mark.parametrize("count", [0, 9])
def test_no_run_and_too_many_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(InvalidInputError, match=f"runs: found {count}, allowed are 1 to 8"):
        write_report([("a", synthetic_density())] * count, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_eight_runs_of_many_tokens_are_under_three_megabytes(tmp_path: Path) -> None:
    density = synthetic_density(points=2000)
    # Digits as a real run has them, not the short ones of round numbers.
    density["scatter"] = {
        name: [value + 1 / 3 for value in values] for name, values in density["scatter"].items()
    }
    density["samples"] = synthetic_samples(6, MOST_TOKENS // 6)
    for token in (t for text in density["samples"]["texts"] for t in text["tokens"]):
        for trace in token["traces"]:
            trace["size"], trace["tv"] = 0.000123456, 0.123456
            trace["top"] = [[1234, 0.1234]] * 5
    density["tokens"] = 50_000
    write_report([(f"run{n}", density) for n in range(8)], tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


def test_missing_numbers_are_dashes(tmp_path: Path) -> None:
    density = synthetic_density()
    density["size_at_tv_0.2"]["easy"] = density["area"]["easy"] = None
    density["early_exit"]["agreement"]["easy"] = [None] * 4
    page = page_of([density, synthetic_density("other")], tmp_path)
    for key in ("size_at_tv_0.2_easy", "area_easy", "early_exit_half_easy"):
        assert set(page.values[key, 0]) == {(None, "–")}
    assert "n/a" not in page.text
    assert "None" not in page.text
    alone = page_of([density], tmp_path)
    assert "could not be measured" in alone.text


def test_the_parts_of_the_page_are_in_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["softtrace"]
    parts = [part.name for part in (files("softtrace.report") / "assets").iterdir()]
    assert len(parts) >= 6
    for name in parts:
        path = f"report/assets/{name}"
        assert any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sources")
    return write_model(root / "model"), write_tree(root / "text")


@pytest.mark.thorough
@pytest.mark.usefixtures("undrawn")
def test_evaluate_shows_what_changed_against_a_base(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    model, text = str(sources[0]), TextSource(str(sources[1]))
    first = evaluate(model, text, str(tmp_path / "before"), **OPTIONS)
    page = Page(tmp_path / "before" / "report.html")
    assert {run for _, run in page.values} == {0}
    evaluate(model, text, str(tmp_path / "after"), base=str(tmp_path / "before"), **OPTIONS)
    page = Page(tmp_path / "after" / "report.html")
    assert {run for _, run in page.values} == {0, 1}
    assert page.values["loss_all", 0][0][0] == first["loss_nats"]["all"]
    written = load_density(tmp_path / "after")
    assert data_of(page)["runs"][1]["density"] == written
    assert written["samples"]["texts"][0]["tokens"]


def test_a_base_on_other_tokens_is_refused_before_anything_is_measured(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(write_run(tmp_path / "base", synthetic_density()))
    monkeypatch.setattr("softtrace.cli.evaluate.placed_model", lambda *_, **__: 1 / 0)
    model, text = str(sources[0]), TextSource(str(sources[1]))
    with pytest.raises(InvalidInputError, match=r"block_size differs, 64 in .* and 16 in this run"):
        evaluate(model, text, str(tmp_path / "out"), base=base, **OPTIONS)
    with pytest.raises(DataError, match="no such file"):
        evaluate(model, text, str(tmp_path / "out"), base=str(tmp_path / "none"), **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokenizer_is_named(sources: tuple[Path, Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((sources[0] / name).read_bytes())
    with pytest.raises(ModelDirectoryError, match="found no tokenizer files"):
        evaluate(str(bare), TextSource(str(sources[1])), str(tmp_path / "out"), **OPTIONS)
