"""Parts of an evaluation: what was cut resumes to the same numbers, foreign parts are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from softtrace.cli import evaluate as evaluation
from softtrace.data.text_source import TextSource
from softtrace.errors import CheckpointError, OutputExistsError
from softtrace.evaluation.measure import Measurements
from softtrace.evaluation.parts import FOLDER, Part, Parts, plan
from softtrace.model.loading import load_model
from tests.support.calls import CPU, changed
from tests.support.corpus import write_model, write_tree

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("undrawn")]

OPTIONS: dict[str, Any] = {
    "block_size": 8, "blocks": 7, "batch_size": 2, "extra_blocks": 3, "run": CPU,
    "per_token": True,
}  # fmt: skip
CHANGING = {"created", "seconds", "command", "processes"}


def contents(out: Path) -> tuple[str, str]:
    """density.json but for what differs between any two runs, and tokens.jsonl."""
    density = json.loads((out / "density.json").read_text("utf-8"))
    kept = {key: value for key, value in density.items() if key not in CHANGING}
    return json.dumps(kept), (out / "tokens.jsonl").read_text("utf-8")


def assert_same(one: Path, other: Path) -> None:
    """Equal but for the rounding of MKL, which depends on where memory lies; bits: processes."""
    first, second = (
        [re.split(r"(-?[0-9.]+(?:e-?[0-9]+)?)", text) for text in contents(out)]
        for out in (one, other)
    )
    for words, others in zip(first, second, strict=True):
        assert words[::2] == others[::2]
        # a version is no number, but the same
        differing = [pair for pair in zip(words, others, strict=True) if len(set(pair)) > 1]
        assert [float(word) for word, _ in differing] == pytest.approx(
            [float(other) for _, other in differing], rel=1e-4, abs=1e-6
        )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TextSource]:
    root = tmp_path_factory.mktemp("sources")
    return str(write_model(root / "model")), TextSource(str(write_tree(root / "text")))


@pytest.fixture(scope="module")
def straight(sources: tuple[str, TextSource], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight")
    evaluation.evaluate(*sources, str(out), **OPTIONS)
    written = sorted(file.suffix for file in out.iterdir())
    assert written == [".html", ".json", ".jsonl", *[".png"] * 4]
    return out


@pytest.fixture(scope="module")
def interrupted(sources: tuple[str, TextSource], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a run that was interrupted in its third of four parts."""
    out = tmp_path_factory.mktemp("interrupted")
    measure: Callable[..., Measurements] = evaluation.measure
    calls: list[int] = []

    def until_the_third(*args: Any, **kwargs: Any) -> Measurements:
        calls.append(kwargs["first"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "measure", until_the_third)
        with pytest.raises(KeyboardInterrupt):
            evaluation.evaluate(*sources, str(out), **OPTIONS)
    assert calls == [0, 2, 4]
    return out


@pytest.fixture
def cut(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(interrupted, tmp_path / "out"))


def test_an_interrupted_run_goes_on_to_the_same_numbers(
    sources: tuple[str, TextSource], straight: Path, cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [path.name for path in cut.iterdir()] == [FOLDER]
    (cut / FOLDER / ".part-000000004-000000006.safetensors.1-ab.tmp").write_bytes(b"half")
    measure, measured = evaluation.measure, []

    def counting(*args: Any, **kwargs: Any) -> Measurements:
        measured.append(kwargs["first"])
        return measure(*args, **kwargs)

    monkeypatch.setattr(evaluation, "measure", counting)
    evaluation.evaluate(*sources, str(cut), resume=True, **OPTIONS)
    assert measured == [4, 6]
    assert_same(cut, straight)
    assert not (cut / FOLDER).exists()


def test_parts_are_not_overwritten_unasked(sources: tuple[str, TextSource], cut: Path) -> None:
    with pytest.raises(OutputExistsError, match=r"pass --resume true .* or overwrite=True"):
        evaluation.evaluate(*sources, str(cut), **OPTIONS)
    assert len(list((cut / FOLDER).iterdir())) == 2


def test_starting_anew_measures_all_parts(
    sources: tuple[str, TextSource], straight: Path, cut: Path
) -> None:
    for path in (cut / FOLDER).iterdir():
        path.write_bytes(b"not read")
    anew = {**OPTIONS, "run": replace(CPU, overwrite=True)}
    evaluation.evaluate(*sources, str(cut), **anew)
    assert_same(cut, straight)
    assert (cut / "tokens.jsonl").is_file()
    without = {**anew, "per_token": False, "blocks": 2}
    evaluation.evaluate(*sources, str(cut), **without)
    assert not (cut / "tokens.jsonl").exists()  # those were of other numbers


def test_a_finished_run_is_not_resumed(sources: tuple[str, TextSource], straight: Path) -> None:
    with pytest.raises(OutputExistsError, match="expected a new or empty folder"):
        evaluation.evaluate(*sources, str(straight), resume=True, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 4}, r"batch_size 2 \(now 4\)"),
        ({"extra_blocks": 0}, r"extra_blocks 3 \(now 0\)"),
        ({"dtype": "bfloat16"}, r"dtype 'float32' \(now 'bfloat16'\)"),
        (
            {"block_size": 10},
            r"blocks of another text, share, number or block_size, min_context 4 \(now 5\)",
        ),
        ({"data": "more text"}, r"settings: blocks of another text, [^']*\. Resume"),
        ({"model": "other weights"}, r"settings: a model of other weights\. Resume"),
    ],
)
def test_parts_of_other_settings_are_refused(
    sources: tuple[str, TextSource], cut: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    change = dict(change)
    if "data" in change:
        change["data"] = str(write_tree(tmp_path / "text", lines=7))
    words = changed({"model": sources[0], "source": sources[1], **OPTIONS}, change)
    if "model" in change:
        words["model"] = str(write_model(tmp_path / "model"))
        other = load_model(words["model"])
        with torch.no_grad():
            other.lm_head.weight[0, 0] += 1
        other.save_pretrained(words["model"])
    with pytest.raises(CheckpointError, match=rf"measured with other .*{named}"):
        evaluation.evaluate(out=str(cut), resume=True, **words)
    assert len(list((cut / FOLDER).iterdir())) == 2


def test_a_damaged_part_is_named(
    sources: tuple[str, TextSource], straight: Path, cut: Path
) -> None:
    damaged = sorted((cut / FOLDER).iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"part-0+-0+2\.safetensors: cannot be read"):
        evaluation.evaluate(*sources, str(cut), resume=True, **OPTIONS)
    damaged.unlink()  # what the error says
    evaluation.evaluate(*sources, str(cut), resume=True, **OPTIONS)
    assert_same(cut, straight)


@pytest.mark.parametrize(("blocks", "batch_size"), [(7, 2), (1, 16), (64, 16), (16_001, 4)])
def test_a_plan_covers_every_block_once(blocks: int, batch_size: int) -> None:
    parts = plan(blocks, batch_size)
    assert [block for part in parts for block in range(*part)] == list(range(blocks))
    assert len(parts) <= 1000
    assert all(part.first % batch_size == 0 for part in parts)


def test_another_file_by_the_name_of_a_part(tmp_path: Path) -> None:
    parts = Parts(tmp_path, {})
    parts.folder.mkdir()
    save_file({"x": torch.ones(1)}, parts.folder / Part(0, 2).name)
    with pytest.raises(CheckpointError, match="is no part of an evaluation"):
        parts.finished([Part(0, 2)])


def test_parts_are_mapped_not_read(interrupted: Path) -> None:
    folder = interrupted / FOLDER
    planned = [Part(0, 2), Part(2, 4)]
    parts = Parts(interrupted, {})
    held = [parts.read_part(part) for part in planned]
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(folder / part.name) in mapped for part in planned)
    assert len(held) == 2


def test_parts_that_are_elsewhere_are_missed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="2 of 2 parts are not there; OUT has to be"):
        Parts(tmp_path, {}).read([Part(0, 2), Part(2, 4)])
