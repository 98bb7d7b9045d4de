#!/usr/bin/env python
"""Take the picture of the token viewer that README.md shows: `make demo`, then `make picture`. Needs Chromium."""

import base64
import shutil
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from sparsekv.files import write_bytes

FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900")
FLAGS += ("--force-prefers-reduced-motion",)  # a click must not race with a page that is still scrolling
NO_BROWSER = "no Chromium with its driver here (Debian: apt-get install chromium chromium-driver)"
VIEW = {"run": "base", "press": "snapkv"}
MARGIN = 16  # px
PLACE = """
const controls = document.getElementById("token-viewer").getBoundingClientRect();
const tokens = document.querySelector("#token-viewer [data-part=tokens]").getBoundingClientRect();
const [margin] = arguments, around = 2 * margin;
return {
  x: controls.left - margin, y: controls.top + scrollY - margin,
  width: controls.width + around, height: tokens.bottom - controls.top + around,
};
"""


def open_browser() -> webdriver.Chrome | None:
    """A headless Chromium that keeps a log of its console; None where there is none."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (browser and driver):
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(driver))


def main(page: Path, picture: Path) -> None:
    """Write the viewer as it shows one press on one run."""
    if not page.is_file():
        sys.exit(f"{page}: no such file; `make demo` writes it")
    browser = open_browser()
    if browser is None:
        sys.exit(NO_BROWSER)
    with browser:
        browser.get(page.resolve().as_uri())
        drawn = "return document.documentElement.dataset.drawn"
        WebDriverWait(browser, 60).until(lambda _: browser.execute_script(drawn))
        for part, value in VIEW.items():
            Select(browser.find_element(By.CSS_SELECTOR, f"#token-viewer [data-part={part}]")).select_by_value(value)
        browser.execute_script("document.activeElement.blur()")
        clip = browser.execute_script(PLACE, MARGIN) | {"scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        write_bytes(picture, base64.b64decode(shot["data"]))


if __name__ == "__main__":
    main(Path("out/demo/report.html"), Path("docs/viewer.png"))
