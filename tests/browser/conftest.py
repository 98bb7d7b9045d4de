"""A headless Chromium. Where there is none these tests are skipped, but not in CI."""

import os

import pytest

from scripts.take_picture import NO_BROWSER, open_browser


@pytest.fixture(scope="session")
def chromium():
    """The browser; it keeps a log of its console."""
    browser = open_browser()
    if browser is None:
        pytest.fail(NO_BROWSER) if os.environ.get("CI") else pytest.skip(NO_BROWSER)
    with browser:
        yield browser
