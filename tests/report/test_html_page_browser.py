"""``report.html`` in headless Chromium, as a person would use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from softtrace.cli.evaluate import evaluate
from softtrace.data.text_source import TextSource
from softtrace.percent import percent
from softtrace.report import phases
from softtrace.report.html_page import write_report
from softtrace.report.tables import MEASURES
from tests.support.browser import Browser, chromium
from tests.support.calls import CPU
from tests.support.corpus import write_model, write_tree
from tests.support.densities import LAYERS, PIECES, SIZES, synthetic_density, synthetic_samples

pytestmark = pytest.mark.browser

_VISIBLE = str.maketrans({"\n": "⏎", " ": "␣", "\u2028": "⟨U+2028⟩"})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


def densities(count: int) -> list[dict[str, Any]]:
    found = []
    for number in range(count):
        density = synthetic_density(f"run{number}", 1 - 0.1 * number)
        density["samples"] = synthetic_samples()
        for share, group in ((0.9, "all"), (0.8, "hard")):
            spread = density["curve"]["easy"]
            density["curve"][group] = {k: [share * v for v in spread[k]] for k in spread}
        density["topology"]["kinds"] = ["mlp", "attention", "mlp_residual", "attention_residual"]
        density["topology"]["shares"] = [
            [[(1 + step + 3 * depth + 7 * kind + number) / 500 for kind in range(4)]
             for depth in range(4)] for step in range(26)
        ]  # fmt: skip
        found.append(density)
    return found


def opened(browser: Browser, folder: Path, runs: list[dict[str, Any]], **how: Any) -> Any:
    path = write_report([(f"run{number}", run) for number, run in enumerate(runs)], folder)
    browser.open(path, **how)
    return browser.driver


def details(browser: Browser) -> dict[str, str]:
    found: dict[str, str] = browser.run(
        "return Object.fromEntries([...document.querySelectorAll('[data-detail]')]"
        ".map((cell) => [cell.dataset.detail, cell.textContent]))"
    )
    return found


def said(browser: Browser, which: str) -> list[list[str]]:
    found: list[list[str]] = browser.run(
        "return [...document.querySelectorAll(`[data-said=${arguments[0]}] li`)]"
        ".map((row) => [...row.children].slice(0, 2).map((part) => part.textContent))",
        which,
    )
    return found


def option(browser: Browser, token: int) -> Any:
    return browser.driver.find_element(By.CSS_SELECTOR, f"[role=option][data-token='{token}']")


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize(
    ("width", "dark", "media"),
    [(1200, False, ""), (400, True, ""), (400, False, ""), (800, False, "print")],
)
def test_loads_without_a_complaint_and_fits(
    browser: Browser, tmp_path: Path, count: int, width: int, dark: bool, media: str
) -> None:
    opened(browser, tmp_path, densities(count), width=width, dark=dark, media=media)
    assert browser.complaints() == []
    wide = browser.run("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    drawn = browser.run("return document.querySelectorAll('figure svg.chart').length")
    assert drawn == 2 + 2 * count  # curves and exits; scatter and heat map of each run
    assert browser.run("return document.querySelectorAll('[role=option]').length") == (
        10 * min(count, 2)
    )


def test_phases_are_drawn_where_they_are_said_to_be(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the four decades is the first's, then half of them."""
    monkeypatch.setattr(phases, "CONSTRUCTION_SHARE", 0.2)
    for change, share in ((1e-3, 0.25), (1e-2, 0.5)):
        monkeypatch.setattr(phases, "PHASES", {"construction": (1e-4, change),
                                            "refinement": (change, 1.0)})  # fmt: skip
        opened(browser, tmp_path, densities(1))
        widths = browser.run(
            "return ['construction', 'refinement'].map((name) => "
            "Number(document.querySelector(`#tv rect.${name}`).getAttribute('width')))"
        )
        assert widths[0] / sum(widths) == pytest.approx(share)
        boundary = browser.run(
            "const box = (name) => document.querySelector(`#tv ${name}`).getBBox();"
            "return box('path.boundary').x - box('rect.refinement').x"
        )
        assert boundary == pytest.approx(0, abs=0.1)


def test_phases_that_a_run_lacks_are_drawn_nowhere(browser: Browser, tmp_path: Path) -> None:
    runs = densities(2)
    runs[1]["curve"]["all"]["mean"] = [0.9] * 25 + [0.0]
    opened(browser, tmp_path, runs)
    assert browser.complaints() == []
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.run(count, "#tv rect.construction, #tv rect.refinement, #tv .boundary") == 0
    # A heat map is of one run, and the first one has the phases.
    assert browser.run(count, "#heat .panel:nth-child(1) .boundary") == 1
    assert browser.run(count, "#heat .panel:nth-child(2) .boundary") == 0


def shades(browser: Browser) -> list[list[str]]:
    """The shade of each token, a list a column."""
    found: list[list[str]] = browser.run(
        "return ['0', '1'].map((pane) => [...document.querySelectorAll("
        "`.passage .token[data-pane='${pane}']`)].map((token) => token.className.match(/\\d/)[0]))"
    )
    return found


def test_colours_follow_the_sizes_and_are_the_same_for_both_runs(
    browser: Browser, tmp_path: Path
) -> None:
    """Two runs of a model that needs 20 % to 65 % of its edges, the second a little less."""
    runs = densities(2)
    for number, run in enumerate(runs):
        sizes = [(0.2 + 0.05 * step) * (1 - 0.3 * number) for step in range(10)]
        run["scatter"]["size_at_tv_0.2"] = sizes * 6
        tokens = [token for text in run["samples"]["texts"] for token in text["tokens"]]
        for token, size in zip(tokens, sizes, strict=True):
            token["size"] = size
    driver = opened(browser, tmp_path, runs)
    bounds = browser.run("return DATA.size_bounds")
    assert len(bounds) == 6
    found = shades(browser)
    for run, column in zip(runs, found, strict=True):
        tokens = [token for text in run["samples"]["texts"] for token in text["tokens"]]
        assert column == [str(sum(t["size"] > bound for bound in bounds)) for t in tokens]
    assert all(len(set(column)) >= 5 for column in found)
    words = driver.find_element(By.CSS_SELECTOR, ".keys").text
    for bound in bounds:
        assert f"{100 * bound:g} %" in words
    assert "10 % and 90 % quantiles" in driver.find_element(By.ID, "text").text


@pytest.mark.parametrize(("bounds", "names"), [
    ([], ["of the edges"]),
    ([0.3], ["to 30 %", "over 30 % of the edges"]),
    ([0.3, 0.31], ["to 30 %", "30 % to 31 %", "over 31 % of the edges"]),
])  # fmt: skip
def test_a_legend_of_few_bounds_names_each_shade_in_use(
    browser: Browser, tmp_path: Path, bounds: list[float], names: list[str]
) -> None:
    opened(browser, tmp_path, densities(1))
    found = browser.run("return shadeNames(arguments[0], 'of the edges')", bounds)
    assert [name for name in found if name] == names
    between = {0: [0.2], 1: [0.2, 0.5], 2: [0.2, 0.305, 0.5]}[len(bounds)]
    for value, name in zip(between, names, strict=True):
        shade = browser.run("return shadeOf(arguments[0], arguments[1])", value, bounds)
        assert found[shade] == name


@pytest.mark.parametrize(("low", "high", "ticks"), [
    (0.0878, 0.65, [0.05, 0.1, 0.2, 0.5, 1]),
    (1e-4, 0.3, [1e-4, 1e-3, 1e-2, 0.1, 1]),
    (3e-3, 3e-3, [2e-3, 5e-3]),
    (0.01, 0.01, [0.01, 0.02]),
])  # fmt: skip
def test_a_log_axis_ends_beside_its_values(
    browser: Browser, tmp_path: Path, low: float, high: float, ticks: list[float]
) -> None:
    opened(browser, tmp_path, densities(1))
    found = browser.run("return logTicks(arguments[0], arguments[1])", low, high)
    assert found == pytest.approx(ticks)


def test_dark_pages_are_dark_and_printed_ones_are_not(browser: Browser, tmp_path: Path) -> None:
    shades = {}
    for name, dark, media in (("light", False, ""), ("dark", True, ""), ("print", True, "print")):
        opened(browser, tmp_path, densities(1), dark=dark, media=media)
        colours = browser.run(
            "const style = getComputedStyle(document.body);"
            "return [style.backgroundColor, style.color]"
            ".map((colour) => colour.match(/\\d+/g).slice(0, 3).map(Number))"
        )
        shades[name] = [sum(colour) / 3 for colour in colours]
    assert shades["dark"][0] < 60 < 200 < shades["dark"][1]
    for name in ("light", "print"):
        assert shades[name][1] < 60 < 200 < shades[name][0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_number_equals_the_file(browser: Browser, tmp_path: Path, count: int) -> None:
    runs = densities(count)
    opened(browser, tmp_path, runs)
    held = browser.run("return JSON.parse(document.getElementById('data').textContent)")
    assert [run["density"] for run in held["runs"]] == runs
    cells = browser.run(
        "return [...document.querySelectorAll('[data-value]')].map((cell) => ["
        "cell.closest('[data-key]').dataset.key, Number(cell.dataset.run),"
        "JSON.parse(cell.dataset.value), cell.textContent])"
    )
    by_key = {measure.key: measure for measure in MEASURES}
    assert len(cells) >= count * (len(MEASURES) + 4)
    for key, run, value, shown in cells:
        assert value == by_key[key].read(runs[run])
        assert shown == by_key[key].format(value)
    for fold in browser.driver.find_elements(By.TAG_NAME, "summary"):
        browser.run("arguments[0].click()", fold)
    tables = {}
    for figure in ("tv", "agreement", "heat"):
        browser.wait_for(f"#{figure} .fold table")  # made when it is opened
        tables[figure] = browser.run(
            "return [...document.querySelectorAll(`#${arguments[0]} .fold tbody tr`)]"
            ".map((row) => [...row.children].map((cell) => cell.textContent))",
            figure,
        )
    for step, row in enumerate(tables["tv"]):
        curves = [run["curve"][g]["mean"][step] for run in runs for g in ("easy", "all", "hard")]
        drawn = runs[0]["curve"]["baselines"]
        baselines = [drawn[k][r][step] for k in ("random_connected", "inverse")
                     for r in ("residual_kept", "residual_not_kept")]  # fmt: skip
        assert row == [percent(SIZES[step]), *(f"{value:.3f}" for value in curves + baselines)]
    for layer, row in enumerate(tables["agreement"]):
        exits = [run["early_exit"]["agreement"] for run in runs]
        shares = [percent(e[group][layer]) for e in exits for group in ("easy", "all", "hard")]
        assert row == [str(layer + 1), *shares]
    for line, row in enumerate(tables["heat"]):
        kind, depth = (
            ("attention", "mlp", "attention_residual", "mlp_residual")[line // 4],
            line % 4,
        )
        found = [run["topology"] for run in runs]
        assert row[1:] == [
            percent(topology["shares"][step][depth][topology["kinds"].index(kind)])
            for topology in found for step in range(0, 26, 5)
        ]  # fmt: skip
    assert len(tables["heat"]) == 16


def test_numbers_are_written_as_the_tables_write_them(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, densities(1))
    shares = [0.0, 1e-6, 9.12e-5, 0.00123, 0.0999, 0.1, 0.123456, 0.5, 0.99951, 1.0]
    assert browser.run("return arguments[0].map(percent)", shares) == [percent(s) for s in shares]
    assert browser.run("return [percent(null), fixed(null)]") == ["–", "–"]


def test_the_slider_shows_what_a_trace_of_that_size_predicts(
    browser: Browser, tmp_path: Path
) -> None:
    (density,) = runs = densities(1)
    opened(browser, tmp_path, runs)
    option(browser, 3).click()
    token = density["samples"]["texts"][0]["tokens"][3]
    slider = browser.driver.find_element(By.ID, "size-slider")
    slider.send_keys(Keys.HOME)
    seen = []
    for step in range(9):
        trace = token["traces"][step]
        likely = [[PIECES[int(i)].translate(_VISIBLE), f"{100 * p:.1f} %"] for i, p in trace["top"]]
        assert said(browser, "trace") == likely
        full = [[PIECES[int(i)].translate(_VISIBLE), f"{100 * p:.1f} %"] for i, p in token["full"]]
        assert said(browser, "full") == full
        words = browser.driver.find_element(By.CSS_SELECTOR, "[data-said=trace]").text
        assert f"Trace of {percent(trace['size'])}" in words
        assert f"{round(trace['size'] * 12345):,} of 12,345 edges" in words
        spoken = slider.get_attribute("aria-valuetext")
        assert spoken == f"traces of about {percent(SIZES[3 * step])} of the edges"
        seen.append(likely)
        slider.send_keys(Keys.ARROW_RIGHT)
    assert len({str(rows) for rows in seen}) > 5
    assert browser.complaints() == []


def shown(token: dict[str, Any]) -> dict[str, str]:
    easy = ", easy" if token["entropy"] <= 1.5 else ", hard" if token["entropy"] >= 4.5 else ""
    return {
        "entropy": f"{token['entropy']:.2f} nats{easy}",
        "loss": f"{token['loss']:.2f} nats",
        "size at TV 0.2": percent(token["size"]),
        "area": f"{token['area']:.3f}",
        "exit layer": f"{token['exit_layer']} of {LAYERS}",
    }


def test_pointing_shows_a_token_and_leaving_brings_the_chosen_one_back(
    browser: Browser, tmp_path: Path
) -> None:
    runs = densities(1)
    driver = opened(browser, tmp_path, runs)
    tokens = [token for text in runs[0]["samples"]["texts"] for token in text["tokens"]]
    option(browser, 1).click()
    assert details(browser) == shown(tokens[1])
    ActionChains(driver).move_to_element(option(browser, 4)).perform()
    assert details(browser) == shown(tokens[4])
    ActionChains(driver).move_to_element(driver.find_element(By.TAG_NAME, "h1")).perform()
    assert details(browser) == shown(tokens[1])


def test_arrow_keys_walk_through_the_tokens_of_all_passages(
    browser: Browser, tmp_path: Path
) -> None:
    runs = densities(2)
    driver = opened(browser, tmp_path, runs)
    tokens = [token for text in runs[1]["samples"]["texts"] for token in text["tokens"]]
    tabbable = browser.run(
        "return [...document.querySelectorAll('[role=option]')].filter((o) => o.tabIndex === 0)"
        ".length"
    )
    assert tabbable == 2  # one in each column
    option(browser, 0).click()
    for number in range(1, len(tokens)):
        driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        assert driver.switch_to.active_element.get_attribute("data-token") == str(number)
        assert details(browser) == shown(tokens[number])  # of the right column, the last one
    outline = browser.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    driver.switch_to.active_element.send_keys(Keys.HOME)
    selected = driver.find_elements(By.CSS_SELECTOR, "[aria-selected=true]")
    assert [found.get_attribute("data-token") for found in selected] == ["0", "0"]


def test_colours_go_by_size_or_by_exit_layer(browser: Browser, tmp_path: Path) -> None:
    (density,) = runs = densities(1)
    density["samples"]["texts"][0]["tokens"][0] |= {"size": 0.5, "exit_layer": 1}
    driver = opened(browser, tmp_path, runs)
    assert "shade-6" in option(browser, 0).get_attribute("class")
    assert "50.0 %" in option(browser, 0).get_attribute("aria-label")
    driver.find_element(By.CSS_SELECTOR, "[name=mode][value=exit]").click()
    assert "shade-0" in option(browser, 0).get_attribute("class")
    assert option(browser, 0).get_attribute("aria-label").endswith("exit layer 1")
    # Not by colour alone: the bar below grows with the shade.
    bars = browser.run(
        "return [...document.querySelectorAll('.passage .token')].slice(0, 4)"
        ".map((token) => parseFloat(getComputedStyle(token).borderBottomWidth))"
    )
    assert bars == sorted(bars)
    assert bars[0] < bars[-1]


def test_text_of_tokens_is_never_markup(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, densities(1))
    words = browser.run(
        "return [...document.querySelectorAll('[role=option]')].map((o) => o.textContent)"
    )
    assert words == [piece.replace("\u2028", "⟨U+2028⟩") for piece in PIECES[:5]] * 2
    assert browser.run("return document.querySelectorAll('#reader script').length") == 0


def test_every_part_of_a_character_can_be_seen_and_pointed_at(
    browser: Browser, tmp_path: Path
) -> None:
    """の as two tokens, a joiner, the end of a line as Windows writes it, a character cut off."""
    (density,) = densities(1)
    samples = density["samples"]
    pieces = ["⟨E381⟩", "⟨AE⟩", "\u200d", "\r\n", "⟨E3⟩", "", "の", "\ufffd"]
    samples["vocabulary"] = [*PIECES, *pieces]
    place = {piece: len(PIECES) + number for number, piece in enumerate(pieces)}
    said = [("⟨E381⟩", ""), ("⟨AE⟩", "の"), ("\u200d", None), ("\r\n", None), ("⟨E3⟩", "\ufffd")]
    for token, (alone, text) in zip(samples["texts"][0]["tokens"], said, strict=True):
        token["token"] = place[alone]
        if text is not None:
            token["text"] = place[text]
    samples["texts"][0]["context"] = [place["の"]]
    driver = opened(browser, tmp_path, [density])
    assert browser.complaints() == []
    shown = ["⟨E381⟩", "の", "⟨U+200D⟩", "␍⏎\n", "⟨E3⟩"]
    headings = [
        "Predicting ⟨E381⟩", "Predicting ⟨AE⟩, which reads の here", "Predicting ⟨U+200D⟩",
        "Predicting ␍⏎", "Predicting ⟨E3⟩, which reads \ufffd here",
    ]  # fmt: skip
    for number, (words, heading) in enumerate(zip(shown, headings, strict=True)):
        found = option(browser, number)
        assert found.get_property("textContent") == words
        assert found.get_attribute("aria-label").startswith(words.strip())
        assert ("code" in found.get_attribute("class").split()) == words.startswith("⟨")
        found.click()
        assert found.get_attribute("aria-selected") == "true"
        assert found.size["width"] > 5
        assert driver.find_element(By.CSS_SELECTOR, ".chosen").text == heading
    assert driver.find_element(By.CSS_SELECTOR, ".context").text == "の"
    assert "bytes of a character" in driver.find_element(By.CSS_SELECTOR, ".keys").text


def test_a_page_without_parts_of_characters_does_not_explain_them(
    browser: Browser, tmp_path: Path
) -> None:
    (density,) = densities(1)
    density["samples"]["vocabulary"] = [piece.replace("\u2028", "b") for piece in PIECES]
    driver = opened(browser, tmp_path, [density])
    assert "bytes of a character" not in driver.find_element(By.CSS_SELECTOR, ".keys").text


def test_drawings_are_read_by_pointer_and_by_keys(browser: Browser, tmp_path: Path) -> None:
    runs = densities(1)
    driver = opened(browser, tmp_path, runs)
    for figure, last in (
        ("tv", "Trace of 100.0 %: TV 0.000 easy, 0.000 all"),
        ("agreement", "After 4 of 4 layers: 100.0 % easy, 100.0 % all"),
    ):
        chart = driver.find_element(By.CSS_SELECTOR, f"#{figure} .chart")
        readout = driver.find_element(By.CSS_SELECTOR, f"#{figure} .readout")
        assert readout.text.startswith("Point at")
        ActionChains(driver).move_to_element(chart).perform()
        assert " easy, " in readout.text
        browser.run("arguments[0].focus()", chart)
        chart.send_keys(Keys.END)
        assert readout.text == last
    heat = driver.find_element(By.CSS_SELECTOR, "#heat .chart")
    browser.run("arguments[0].focus()", heat)
    heat.send_keys(Keys.HOME, Keys.ARROW_DOWN)
    readout = driver.find_element(By.CSS_SELECTOR, "#heat .readout")
    assert readout.text == (
        "attention, second quarter of the layers, trace of 0.0100 %: 2.20 % of its edges"
    )


def test_columns_can_show_any_two_of_several_runs(browser: Browser, tmp_path: Path) -> None:
    runs = densities(3)
    runs[1]["samples"]["texts"][0]["tokens"][0]["size"] = 0.7
    driver = opened(browser, tmp_path, runs)
    choice = Select(driver.find_element(By.CSS_SELECTOR, "[aria-label='Right run']"))
    assert choice.first_selected_option.text == "run2"
    choice.select_by_visible_text("run1")
    option(browser, 0).click()
    assert details(browser)["size at TV 0.2"] == "70.0 %"


def test_pages_without_text_say_so(browser: Browser, tmp_path: Path) -> None:
    old, new = synthetic_density(), densities(1)[0]
    driver = opened(browser, tmp_path, [old])
    assert "There is no text in density.json" in driver.find_element(By.ID, "reader").text
    driver = opened(browser, tmp_path, [old, new])
    assert "One run has no text" in driver.find_element(By.ID, "reader").text
    assert browser.complaints() == []


def test_missing_numbers_are_gaps_and_dashes(browser: Browser, tmp_path: Path) -> None:
    (density,) = densities(1)
    density["topology"] = density["curve"]["baselines"] = None
    for group in ("easy", "hard"):
        density["loss_nats"][group] = density["area"][group] = None
        density["size_at_tv_0.2"][group] = None
        density["early_exit"]["agreement"][group] = [None] * LAYERS
        density["curve"][group] = {name: [None] * 26 for name in ("mean", "q25", "q75")}
    density["entropy_spearman"] = {"area": None, "size_at_tv_0.2": None}
    token = density["samples"]["texts"][0]["tokens"][0]
    token |= {"size": None, "area": None, "entropy": None, "loss": None}
    driver = opened(browser, tmp_path, [density])
    assert browser.complaints() == []
    option(browser, 0).click()
    assert details(browser)["size at TV 0.2"] == "–"
    text = driver.find_element(By.TAG_NAME, "body").text
    for word in ("NaN", "null", "undefined", "None"):
        assert word not in text
    assert browser.complaints() == []


def test_a_single_token_makes_a_page(browser: Browser, tmp_path: Path) -> None:
    model, text = write_model(tmp_path / "model"), write_tree(tmp_path / "text")
    out = tmp_path / "out"
    found = evaluate(str(model), TextSource(str(text)), str(out), block_size=4, blocks=1, run=CPU)
    assert found["tokens"] == 1
    browser.open(out / "report.html")
    assert browser.complaints() == []
    assert browser.run("return document.querySelectorAll('[role=option]').length") == 1
    assert "NaN" not in browser.driver.find_element(By.TAG_NAME, "body").text
