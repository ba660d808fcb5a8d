"""``softtrace evaluate``: density.json against literal statistics, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import softtrace
from softtrace.cli.evaluate import evaluate
from softtrace.data import pack, read_documents, split_by_file
from softtrace.data.text_source import TextSource
from softtrace.errors import (
    DataError,
    InvalidInputError,
    ModelDirectoryError,
    NonFiniteError,
    OutputExistsError,
)
from softtrace.evaluation.density_file import load_density
from softtrace.model.loading import load_model, load_tokenizer
from softtrace.report.tables import MEASURES
from tests.support.calls import CPU, changed
from tests.support.corpus import write_model, write_tree

OPTIONS: dict[str, Any] = {"block_size": 16, "blocks": 6, "batch_size": 4, "run": CPU}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TextSource]:
    root = tmp_path_factory.mktemp("sources")
    return str(write_model(root / "model")), TextSource(str(write_tree(root / "text")))


@pytest.fixture(scope="module")
def density(
    sources: tuple[str, TextSource], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("evaluated")
    evaluate(*sources, str(out), extra_blocks=2, **OPTIONS)
    assert len(list(out.glob("*.png"))) == 4
    return load_density(out)


def test_equals_statistics_computed_by_hand(
    density: dict[str, Any], sources: tuple[str, TextSource]
) -> None:
    model = load_model(sources[0]).eval()
    blocks = pack(read_documents(sources[1].data), load_tokenizer(sources[0]), 16)
    chosen = blocks[torch.linspace(0, len(blocks) - 1, 6).long()]
    explained = slice(8, 15)
    curve = softtrace.density_curve(model, chosen, attention="recomputed")
    entropy = curve.entropy[:, explained].flatten().double()
    with torch.no_grad():
        logs = model(input_ids=chosen).logits.log_softmax(-1)
    targets = chosen[:, 1:, None]
    loss = -logs[:, :-1].gather(-1, targets)[:, explained, 0].flatten()
    easy, hard = entropy <= entropy.quantile(0.25), entropy >= entropy.quantile(0.75)
    area, size = (v[:, explained].flatten() for v in (curve.area(), curve.size_at(0.2)))
    assert density["tokens"] == 6 * 7 == len(entropy)
    for name, rows in (("all", entropy >= 0), ("easy", easy), ("hard", hard)):
        assert density["loss_nats"][name] == pytest.approx(float(loss[rows].mean()), rel=1e-5)
        assert density["area"][name] == pytest.approx(float(area[rows].mean()), rel=1e-4)
        expected = float(size[rows].median())
        assert density["size_at_tv_0.2"][name] == pytest.approx(expected, rel=1e-3)
    rank = torch.corrcoef(torch.stack((_ranks(area), _ranks(entropy))))[0, 1]
    assert density["entropy_spearman"]["area"] == pytest.approx(float(rank), abs=1e-3)


def test_numbers_lie_inside_their_intervals(density: dict[str, Any]) -> None:
    assert len(density["intervals"]) == len(MEASURES) - 1
    for measure in MEASURES:
        if measure.key in density["intervals"]:
            low, high = density["intervals"][measure.key]
            value = measure.read(density)
            assert value is not None
            assert low <= value <= high, measure.key


def _ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


def test_curves_shares_and_agreement_are_consistent(density: dict[str, Any]) -> None:
    curve = density["curve"]
    assert len(curve["sizes"]) == 26
    assert curve["sizes"][0] == pytest.approx(1e-4)
    assert curve["sizes"][-1] == pytest.approx(1.0)
    assert curve["all"]["mean"][-1] == 0.0  # the full graph
    assert curve["baseline_tokens"] == 2 * 7  # two blocks
    for kind in ("random_connected", "inverse"):
        for values in curve["baselines"][kind].values():
            assert values[-1] == 0.0
            assert all(0 <= value <= 1 for value in values)
    for shares in density["topology"]["shares"]:
        total = sum(sum(row) for row in shares)
        assert total == pytest.approx(1.0) or total == 0.0
    agreement = density["early_exit"]["agreement"]
    assert agreement["all"][-1] == agreement["easy"][-1] == 1.0
    assert density["nucleus_recovery"]["recovered"][-1] == [1.0] * 8
    assert density["model"] | {"path": ""} == {
        "path": "",
        "type": "llama",
        "parameters": density["model"]["parameters"],
        "layers": 3,
        "heads": 4,
        "pattern": "sequential pre-norm",
    }


@pytest.mark.thorough
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("batch_size", [1, 6])
def test_batch_size_changes_no_number(
    density: dict[str, Any], sources: tuple[str, TextSource], tmp_path: Path, batch_size: int
) -> None:
    options = {**OPTIONS, "batch_size": batch_size}
    other = evaluate(*sources, str(tmp_path / "out"), extra_blocks=0, **options)
    for key in ("loss_nats", "area", "size_at_tv_0.2"):
        assert other[key] == pytest.approx(density[key], rel=1e-4)
    assert other["data"]["sha256"] == density["data"]["sha256"]
    assert other["curve"]["baselines"] is None
    assert other["nucleus_recovery"] is None


@pytest.mark.thorough
@pytest.mark.usefixtures("undrawn")
def test_measures_the_files_that_training_held_out(
    sources: tuple[str, TextSource], tmp_path: Path
) -> None:
    model, text = sources
    half = replace(text, held_out_share=0.5, salt="x")
    found = evaluate(model, half, str(tmp_path / "out"), extra_blocks=0, **OPTIONS)
    held_out = split_by_file(read_documents(text.data), 0.5, "x")[1]
    assert found["data"]["documents"] == len(held_out) < 40
    assert found["data"]["split"] == "held out, share 0.5"


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_it_says_the_number_format_and_refuses_a_base_of_another(
    sources: tuple[str, TextSource], tmp_path: Path, dtype: str
) -> None:
    model, source = sources
    load_model(model, dtype="bfloat16").save_pretrained(tmp_path / "model")
    load_tokenizer(model).save_pretrained(tmp_path / "model")
    words = {**OPTIONS, "blocks": 2, "extra_blocks": 0}
    own = {**words, "run": replace(CPU, dtype=dtype)}
    evaluate(str(tmp_path / "model"), source, str(tmp_path / "own"), **own)
    base = str(tmp_path / "base")
    evaluate(model, source, base, **words)
    found = [load_density(each)["dtype"] for each in (tmp_path / "own", base)]
    assert found == ["bfloat16", "float32"]
    with pytest.raises(InvalidInputError, match=r"number format .* float32 in .* bfloat16 in this"):
        evaluate(str(tmp_path / "model"), source, str(tmp_path / "other"), base=base, **own)
    assert not (tmp_path / "other" / "evaluate-parts").exists()  # before anything was measured


def test_an_interrupted_run_leaves_no_density(
    sources: tuple[str, TextSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("softtrace.cli.evaluate.measure", fail)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*sources, str(tmp_path / "out"), **OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "{root}/none"}, ModelDirectoryError, "no such directory"),
        ({"data": "{root}/none"}, DataError, "no such file or folder"),
        ({"out": "{root}"}, OutputExistsError, "expected a new or empty folder"),
        ({"block_size": 3}, InvalidInputError, "block_size: found 3, allowed are integers from 4"),
        ({"blocks": 0}, InvalidInputError, "blocks: found 0, allowed"),
        ({"batch_size": 0}, InvalidInputError, "batch_size: found 0, allowed are integers from 1"),
        ({"extra_blocks": -1}, InvalidInputError, "extra_blocks: found -1, allowed .* from 0"),
        ({"device": "abacus"}, InvalidInputError, "device: found 'abacus', which .* cannot use"),
        ({"device": "xpu"}, InvalidInputError, "device: found 'xpu', which this machine cannot"),
        ({"dtype": "int3"}, ModelDirectoryError, "dtype: found 'int3'"),
        (
            {"held_out_share": 1e-9},
            DataError,
            "no file is held out at a share of 1e-09; give more files, another share or salt",
        ),
    ],
)
def test_refusals(
    sources: tuple[str, TextSource],
    tmp_path: Path,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    (tmp_path / "file").write_text("x")
    words = {
        key: value.format(root=tmp_path) if isinstance(value, str) else value
        for key, value in change.items()
    }
    where = {"model": sources[0], "source": sources[1], "out": str(tmp_path / "out")}
    with pytest.raises(error, match=message):
        evaluate(**changed({**where, **OPTIONS}, words))
    assert not (tmp_path / "out").exists()


def test_non_finite_weights_are_named(sources: tuple[str, TextSource], tmp_path: Path) -> None:
    model = load_model(sources[0])
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(sources[0]).save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteError, match="logits of the model on a tiny batch"):
        evaluate(str(tmp_path / "model"), sources[1], str(tmp_path / "out"), **OPTIONS)


@pytest.mark.thorough
@pytest.mark.usefixtures("undrawn")
def test_the_file_is_strict_json(sources: tuple[str, TextSource], tmp_path: Path) -> None:
    evaluate(*sources, str(tmp_path / "out"), extra_blocks=0, **OPTIONS)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (tmp_path / "out" / "density.json").read_text()
    found = json.loads(text, parse_constant=refuse)
    assert {"created", "versions", "hardware", "command", "seconds"} <= set(found)


@pytest.mark.thorough
@pytest.mark.usefixtures("undrawn")
def test_chosen_positions_are_the_last_ones_of_each_block(
    density: dict[str, Any], sources: tuple[str, TextSource], tmp_path: Path
) -> None:
    """Their numbers are those that they have among all; the seven of the second half are all."""
    options = {**OPTIONS, "extra_blocks": 2, "per_token": True}
    evaluate(*sources, str(tmp_path / "seven"), positions=7, **options)
    evaluate(*sources, str(tmp_path / "three"), positions=3, **options)
    seven, three = (load_density(tmp_path / name) for name in ("seven", "three"))
    assert seven["min_context"] == density["min_context"] == 8
    assert seven["area"] == density["area"]
    assert three["min_context"] == 12
    assert three["tokens"] == 6 * 3
    assert len(three["samples"]["texts"][0]["tokens"]) == 3
    lines = {
        name: [json.loads(x) for x in (tmp_path / name / "tokens.jsonl").read_text().splitlines()]
        for name in ("seven", "three")
    }
    last = [line for line in lines["seven"] if line["position"] >= 12]
    assert len(lines["three"]) == len(last) == 18
    for one, other in zip(lines["three"], last, strict=True):
        assert one["size_at_tv_0.2"] == pytest.approx(other["size_at_tv_0.2"], rel=1e-4)
        assert one["area"] == pytest.approx(other["area"], abs=1e-5)


@pytest.mark.parametrize("positions", [0, 16, -1, 1.5, True])
def test_more_positions_than_have_a_target_are_refused(
    sources: tuple[str, TextSource], tmp_path: Path, positions: Any
) -> None:
    with pytest.raises(InvalidInputError, match="positions: found"):
        evaluate(*sources, str(tmp_path / "out"), positions=positions, **OPTIONS)


@pytest.mark.thorough
@pytest.mark.usefixtures("undrawn")
def test_the_progress_bar_ends_where_it_said(
    sources: tuple[str, TextSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks with baselines take several times as long, and samples take time too."""
    bars: list[tuple[int, list[int]]] = []

    class Bar:
        def __init__(self, total: int, **_: Any) -> None:
            bars.append((total, []))

        def update(self, runs: int) -> None:
            bars[-1][1].append(runs)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("softtrace.cli.evaluate.tqdm", Bar)
    evaluate(*sources, str(tmp_path / "out"), extra_blocks=2, **OPTIONS)
    ((total, runs),) = bars
    assert sum(runs) == total
    assert len(runs) >= 3


@pytest.mark.thorough
def test_the_page_of_blocks_of_1024_tokens(tmp_path: Path) -> None:
    """Samples and their maps are of real blocks too, and the page does not grow with the square."""
    length, small = 1024, {"num_hidden_layers": 2, "num_attention_heads": 2}
    folder = write_model(
        tmp_path / "model", max_position_embeddings=length, num_key_value_heads=1, **small
    )
    source = TextSource(str(write_tree(tmp_path / "text", files=20, lines=8)))
    options = {**OPTIONS, "block_size": length, "blocks": 1, "batch_size": 1}
    evaluate(str(folder), source, str(tmp_path / "out"), positions=8, extra_blocks=0, **options)
    found = load_density(tmp_path / "out")
    assert (found["data"]["block_size"], found["min_context"], found["tokens"]) == (length, 1015, 8)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert len(page) < 5_000_000  # whatever the square of the length is
    assert "blocks of 1,024 tokens with 1,015 of context" in page
    (text,) = found["samples"]["texts"]
    assert len(text["tokens"]) == 8
    assert all(each["traces"][-1]["tv"] < 0.5 for each in text["tokens"])
    assert json.dumps(text["tokens"][0]["traces"][0]["size"]) in page  # what the slider shows
