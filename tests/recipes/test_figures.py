"""README's figures are those of the result files beside the scripts that made them."""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

import pytest
import torch

from recipes.benchmarks.pages import write_pages
from recipes.benchmarks.places import RESULTS, ROOT
from softtrace import DensityOptions
from softtrace.lightning.support import LIGHTNING
from tests.support.cut_fits import FAULTS, PARTS
from tests.support.mutations import MUTATIONS
from tests.support.zoo import REFUSED_NEWEST, VERIFIED_NEWEST


def read(name: str) -> Any:
    """A result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_pages_say_what_the_result_files_say() -> None:
    for page in write_pages.PAGES:
        assert write_pages.filled(page) == (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", write_pages.PAGES)
def test_what_pages_link_to_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_results_say_when_and_with_what_they_were_made() -> None:
    # What pretrain.py wrote of its models has other keys.
    paths = [path for path in RESULTS.rglob("*.json") if not path.name.startswith("pysource-")]
    measured = []
    for path in paths:
        if path.parent.name != "quickstart":
            result = json.loads(path.read_text(encoding="utf-8"))
            measured += result.get("measurements", [result])
    assert len(measured) >= 15 + 27  # none was lost: 15 of the cost of a step, and the other files
    for result in measured:
        assert {"created", "versions", "hardware", "command"} <= set(result)
        assert result["versions"]["torch"]


def test_results_name_no_folder_of_the_machine_that_made_them() -> None:
    for path in RESULTS.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"[\s\"=]/(?:home|mnt|opt|root|tmp|usr|var|work)/", text) == [], path


def test_results_are_named_by_what_they_hold() -> None:
    for path in RESULTS.rglob("*.*"):
        words = set(re.split(r"[-_]", path.stem))
        assert not words & {"again", "first", "longer", "shorter", "quiet", "noisy"}, path.name


def test_the_default_penalty_keeps_its_promise_in_the_recorded_result() -> None:
    result = read("effect")
    assert result["arms"]["penalty"]["options"] == {}  # the defaults
    ratio = result["ratio_to_plain"]["penalty"]
    assert len(ratio["loss"]["values"]) >= 3
    assert ratio["loss"]["mean"] <= 1.01
    assert ratio["size_easy"]["mean"] <= 0.45
    assert ratio["area_easy"]["mean"] <= 0.7
    assert result["arms"]["penalty"]["exit_easy"]["mean"] >= 0.9


def costs(model: str, neighbours: bool | None) -> list[dict[str, Any]]:
    """Of the default, in all measurements of one model; None: whether there were was not noted."""
    return [
        each["cost"]["softtrace"]
        for each in read("cost")["measurements"]
        if (each["model"], each["neighbours"]) == (model, neighbours)
    ]


@pytest.mark.parametrize("neighbours", [False, None])
def test_the_default_penalty_stays_within_its_budget_in_the_recorded_results(
    neighbours: bool | None,
) -> None:
    cost = max(costs("pystdlib-4m", neighbours), key=lambda each: int(each["rounds"]))
    assert cost["time"]["median"] <= 1.25
    assert cost["memory"] <= 1.25


def three(name: str, method: str, strength: float, key: str) -> list[float]:
    """A number of the three seeds of a method at a strength, from a result file of ``peers.py``."""
    runs = {(run["method"], run["strength"], run["seed"]): run for run in read(name)["runs"]}
    return [runs[method, strength, seed][key] for seed in range(3)]


def over_plain(name: str, method: str, strength: float, key: str) -> float:
    """Mean of its ratios to plain fine-tuning's, seed by seed."""
    pairs = zip(three(name, method, strength, key), three(name, "plain", 0.0, key), strict=True)
    return statistics.mean(own / plain for own, plain in pairs)


def test_a_cpus_default_keeps_the_effect_of_the_whole_batch_in_the_recorded_search() -> None:
    options = DensityOptions().on(torch.device("cpu"))
    assert (options.every, options.share, options.strength) == (1, 0.125, 0.35)  # "every step"
    for key in ("area_easy", "size_easy", "exit_easy"):
        own = over_plain("log/search-seldom", "every step", 0.35, key)
        whole = over_plain("log/search-seldom", "whole batch", 0.35, key)
        assert (own - 1) / (whole - 1) >= 0.85, key


def test_the_larger_model_keeps_the_promise_in_the_recorded_comparison() -> None:
    for method in ("softtrace", "softtrace, whole batch"):
        assert min(three("peers-107m", method, 0.35, "exit_easy")) >= 0.9
    assert over_plain("peers-107m", "softtrace", 0.35, "loss") <= 1.01
    assert over_plain("peers-107m", "softtrace", 0.35, "size_easy") <= 0.25
    assert over_plain("peers-107m", "softtrace", 0.35, "area_easy") <= 0.7
    for key in ("area_easy", "size_easy", "exit_easy"):  # of the full-batch term's effect
        own = over_plain("peers-107m", "softtrace", 0.35, key)
        whole = over_plain("peers-107m", "softtrace, whole batch", 0.35, key)
        assert (own - 1) / (whole - 1) >= 0.85, key


@pytest.mark.parametrize("size", ["107m", "157m", "270m"])
def test_the_default_penalty_stays_within_its_budget_on_a_gpu_in_the_recorded_results(
    size: str,
) -> None:
    (cost,) = costs(f"random-{size}", False)
    assert cost["rounds"] >= 7
    assert cost["time"]["median"] <= 1.25
    assert cost["memory"] <= 1.25


def test_what_a_step_took_beyond_the_budget_is_in_the_recorded_results() -> None:
    medians = {
        (model, neighbours): {f"{cost['time']['median']:.2f}" for cost in costs(model, neighbours)}
        for model in ("pystdlib-4m", "random-107m")
        for neighbours in (True, None)
    }
    assert medians["pystdlib-4m", None] == {"1.24", "1.26", "1.30", "1.35"}
    assert medians["pystdlib-4m", True] == {"1.33"}
    assert medians["random-107m", True] == {"1.29", "1.37"}


@pytest.mark.parametrize(
    ("name", "peer"),
    [("peers-157m", ("exit distillation", 0.3)), ("peers-157m-layerskip", ("layerskip", 1.0))],
)
def test_one_model_has_all_three_aims_in_the_recorded_comparison(
    name: str, peer: tuple[str, float]
) -> None:
    first = ("softtrace, exits first", 0.15)
    for key, most in (("loss", 1.01), ("size_easy", 0.25), ("area_easy", 0.7)):
        assert over_plain(name, *first, key) <= most, key
    assert over_plain(name, *first, "loss") <= over_plain(name, *peer, "loss")
    for key in ("area_easy", "size_easy"):
        assert over_plain(name, *first, key) < over_plain(name, *peer, key), key
    assert statistics.mean(three(name, *first, "exit_easy")) >= 0.9
    for key in ("exit_easy", "exit_all"):
        own, other = (statistics.mean(three(name, *way, key)) for way in (first, peer))
        assert own >= other, key


def test_exits_first_are_level_with_a_distillation_at_the_budget_in_the_recorded_comparison() -> (
    None
):
    result = read("peers-157m")
    at_budget = result["at_budget"]
    for key in ("exit_easy", "exit_all", "accepted"):
        row = at_budget["softtrace, exits first"]
        assert row[key] >= at_budget["exit distillation"][key], key


def test_no_peer_gets_as_sparse_at_equal_loss_in_the_recorded_comparison() -> None:
    for name, seeds in (("peers", 3), ("log/peers-large", 2), ("peers-107m", 3)):
        result = read(name)
        ways = {method for method in result["at_budget"] if method.startswith("softtrace")}
        own = result["at_budget"]["softtrace"]
        assert len(result["at_budget"]) > len(ways) + 2
        for method, peer in result["at_budget"].items():
            if method in ways:
                continue
            assert own["area_easy"] < 0.75 * peer["area_easy"], method
            assert own["size_easy"] < 0.5 * peer["size_easy"], method
            runs = [run for run in result["runs"] if run["method"] == method]
            assert len({run["seed"] for run in runs}) >= seeds


def frozen(name: str) -> tuple[dict[str, dict[str, str]], str]:
    """A table of the log that is kept as text: its cells by row and column, and its caption."""
    log = (ROOT / "recipes" / "benchmarks" / "LOG.md").read_text(encoding="utf-8")
    (section,) = re.findall(f"<!-- frozen: {name} -->\n(.*?)<!-- /frozen: {name} -->", log, re.S)
    table, _, caption = section.partition("\n\n")
    head, _, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines())
    of_gpu = [column.removesuffix(", GPU") for column in head]
    names = [f"{of_gpu[n - 1]}, {each}" if each == "CPU" else each for n, each in enumerate(head)]
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}, caption


def speeds_in(name: str, kind: str) -> dict[str, float]:
    """Gains over plain decoding, by what a model was fine-tuned with."""
    rows, _ = frozen(name)
    return {
        row: float(cells[f"tokens/s over plain decoding, {kind}"].split()[0])
        for row, cells in rows.items()
    }


def test_drafting_pays_at_the_larger_size_in_the_recorded_result() -> None:
    speeds = speeds_in("decoding_large", "GPU")
    assert "100 % of the texts are identical to plain decoding's" in frozen("decoding_large")[1]
    for name in ("softtrace, default", "drafting exits 1", "drafting exits 3"):
        assert speeds[name] > 1.15 * speeds["nothing added"]
    assert speeds["drafting exits 3"] >= 1.5


@pytest.mark.parametrize("kind", ["GPU", "CPU"])
def test_drafting_pays_on_other_prompts_in_the_recorded_results(kind: str) -> None:
    speeds, (rows, caption) = speeds_in("decoding_107m", kind), frozen("decoding_107m")
    assert "all texts are identical to plain decoding's" in caption
    assert "the median of 8 prompts" in caption
    assert "were chosen on 8 others" in caption
    of = ("softtrace, more exits", "softtrace, default", "nothing added")
    assert all(rows[name]["seeds"] == "3" for name in of)
    more, default, plain = (speeds[name] for name in of)
    assert more > default > 1.1 * plain
    assert more > 1.2


def raced(name: str, prompts: int) -> dict[tuple[str, str], list[float]]:
    """Gains over plain decoding by device and model, one a seed; all texts identical."""
    result = read(name)
    gains: dict[tuple[str, str], list[float]] = {}
    for race in result["races"]:
        found = race[race["name"]]
        assert found["prompts_chosen_on"] == found["prompts"] == prompts
        assert all(loop["identical"] == 1.0 for loop in found["loops"].values())
        gain = found["loops"]["direct"]["speedup"]["median"]
        gains.setdefault((race["kind"], race["name"]), []).append(gain)
    return gains


def test_drafting_by_a_deeper_model_is_half_as_fast_again_in_the_recorded_results() -> None:
    gains = raced("decoding-157m", 20)
    assert all(len(of) == 3 for key, of in gains.items() if key != ("gpu", "plain"))
    speeds = {key: statistics.mean(of) for key, of in gains.items()}
    for kind in ("gpu", "cpu"):
        assert speeds[kind, "fifth"] >= 1.5
        assert min(gains[kind, "fifth"]) >= 1.5
        assert speeds[kind, "fifth"] > 1.3 * speeds[kind, "plain"]
    assert speeds["cpu", "first"] > 1.2 * speeds["cpu", "plain"]
    assert over_plain("peers-157m-layerskip", "drafting after 0.21, exits 2", 0.15, "loss") <= 1.01


def test_drafting_paid_before_checks_went_on_from_the_draft_in_the_recorded_results() -> None:
    gains = raced("log/decoding-157m-checks-run-all-layers", 16)
    assert all(len(of) == 3 for of in gains.values())
    speeds = {key: statistics.mean(of) for key, of in gains.items()}
    assert speeds["gpu", "x15"] >= 1.5
    assert speeds["gpu", "first"] >= 1.5
    for kind in ("gpu", "cpu"):
        assert speeds[kind, "x15"] > 1.4 * speeds[kind, "plain"]
    for method in ("drafting after 0.21, exits 1.5", "softtrace, exits first"):
        assert over_plain("peers-157m", method, 0.15, "loss") <= 1.01


def test_the_recorded_exactness_is_exact_and_of_all_that_is_there() -> None:
    result = read("exactness")
    ways = {row.name for row in LIGHTNING if row.refused is None}
    assert set(result["inert"]) == ways | {"Trainer of transformers"}
    assert {name for name, way in result["inert"].items() if way["steps"] < 50} <= {
        "fast_dev_run",
        "fit twice",  # 3 and 2 x 25
    }
    assert all(way["strength 0"] == 0.0 < way["strength 0.6"] for way in result["inert"].values())
    for row in result["resumed"].values():
        assert row["steps"] >= 7
        assert row["largest"] == 0.0 < row["control"]
    assert set(result["cuts"]) == set(PARTS)
    for row in result["cuts"].values():
        assert len(row["cuts"]) == len(FAULTS)
        assert row["largest"] == 0.0 < row["trained"]
    kills = result["kills"]
    assert kills["kills"] >= 30
    assert kills["resumed"] == kills["runs"]
    assert kills["largest"] == 0.0
    for name, value in {**result["parallel"], **result["sharded"]}.items():
        assert value < (1e-3 if "float32" in name else 1e-9), name
    assert len(set(result["memory"]["bytes"].values())) == 1
    assert set(result["mutations"]) == {mutation.name for mutation in MUTATIONS}
    assert all(each["red"] for each in result["mutations"].values())


def test_metrics_do_not_depend_on_how_their_data_come_in_the_recorded_result() -> None:
    result = read("metric_parity")
    for dtype, allowed in (("float32", 1e-6), ("float64", 1e-12)):
        ways = result["largest_difference"][dtype]
        assert {"2 processes", "3 processes", "padding on the left"} < set(ways)
        for way, gaps in ways.items():
            assert len(gaps) == 5
            assert max(gaps.values()) < allowed, (dtype, way)


def test_the_table_of_families_is_that_of_the_zoo() -> None:
    result = read("families")
    assert {row["case"] for row in result["verified"]} == VERIFIED_NEWEST
    assert {row["case"] for row in result["refused"]} == REFUSED_NEWEST
    assert result["types_verified"] >= 60
    assert max(row["importance"] for row in result["verified"]) < 1e-5
    page = (RESULTS / "families.md").read_text(encoding="utf-8")
    assert all(f"| {row['case']} |" in page for row in result["verified"] + result["refused"])
