"""A headless Chromium for the tests of the live page."""

import shutil
from contextlib import contextmanager

import pytest


@contextmanager
def chromium(width: int = 1280, height: int = 1000):
    """A selenium driver; the test is skipped where the machine has no Chromium."""
    browser, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no chromium or chromedriver on the PATH: the Debian packages chromium and chromium-driver bring them")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", f"--window-size={width},{height}"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield found
    finally:
        found.quit()


def until(driver, condition, what: str, seconds: float = 20):
    """The first true value of ``condition()``, which is asked for up to ``seconds``."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, 0.05).until(lambda _: condition(), what)


def problems(driver) -> list[str]:
    """What the browser complained of, violations of the Content-Security-Policy and errors of scripts included."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
