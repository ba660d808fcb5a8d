"""Headless Chromium for tests of the report: what a page says, shows and complains about."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import presence_of_element_located
from selenium.webdriver.support.wait import WebDriverWait

from tests.support.waiting import PATIENCE, held_port, port_of

_MISSING = (
    "found no {}: the tests marked `browser` need Chromium and its driver (Debian: apt-get install "
    "chromium chromium-driver); leave them out with -m 'not browser'"
)


def _found(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.fail(_MISSING.format(" or ".join(names)))


class Browser:
    """One window; pages are opened from files."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = 1200, *, dark: bool = False, media: str = "") -> None:
        """Open a file in a window of this width, in CSS pixels; forget what the console said."""
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=900,
                     deviceScaleFactor=1, mobile=False)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.driver.get_log("browser")
        self.driver.get(path.absolute().as_uri())

    def command(self, name: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def run(self, script: str, *values: Any) -> Any:
        """What a script returns in the page."""
        return self.driver.execute_script(script, *values)

    def wait_for(self, selector: str) -> None:
        """Until the page has made what this selects."""
        there = presence_of_element_located((By.CSS_SELECTOR, selector))
        WebDriverWait(self.driver, PATIENCE).until(there)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return window.innerWidth")
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height,
                     deviceScaleFactor=1, mobile=False)  # fmt: skip
        self.driver.save_screenshot(str(path))


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser of its own, closed at the end."""
    options = ChromeOptions()
    options.binary_location = _found("chromium", "chromium-browser", "google-chrome")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with held_port() as held:
        driver = Chrome(options, ChromeService(_found("chromedriver"), port_of(held)))
        driver.set_page_load_timeout(PATIENCE)
        driver.set_script_timeout(PATIENCE)
        try:
            yield Browser(driver)
        finally:
            driver.quit()
