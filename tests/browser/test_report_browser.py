"""The report's page in a real browser: it draws, asks for nothing, and its token viewer shows what the arrays say."""

import evidence
import numpy as np
import pytest
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from sparsekv.report.config import ReportConfig
from sparsekv.report.run import report

pytestmark = pytest.mark.browser

TOKENS = "[data-part=tokens] span"
WIDTHS = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """The page of everything in `tests/evidence.py`."""
    folder = tmp_path_factory.mktemp("report")
    results = evidence.make_evidence(folder / "results")
    report(ReportConfig([str(results)], str(folder / "report.html")))
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(chromium, page_file):
    """The page, every chart drawn. Whatever the tests do with it, its console stays empty."""
    chromium.get_log("browser")
    chromium.get(page_file.as_uri())
    wait_until_drawn(chromium)
    yield chromium
    assert chromium.get_log("browser") == []


def wait_until_drawn(page):
    drawn = "return document.documentElement.dataset.drawn"
    WebDriverWait(page, 60).until(lambda browser: browser.execute_script(drawn) is not None)


def reload(page):
    page.refresh()
    wait_until_drawn(page)


def choose(page, **selected):
    for name, value in selected.items():
        Select(page.find_element(By.CSS_SELECTOR, f"[data-part={name}]")).select_by_value(str(value))


def classes(page):
    """Of every token of the viewer, the names that its look has."""
    found = page.execute_script(f"return [...document.querySelectorAll('{TOKENS}')].map((span) => span.className)")
    return [set(names.split()) for names in found]


def part(page, name):
    return page.find_element(By.CSS_SELECTOR, f"[data-part={name}]")


def expected_level(share):
    """As the viewer's legend says: 0 and 10 only where none or all keep a token."""
    return np.where(share == 0, 0, np.where(share == 1, 10, np.clip(np.floor(share * 10 + 0.5), 1, 9))).astype(int)


def test_draws_every_chart_and_asks_for_nothing(page):
    plots = page.find_elements(By.CSS_SELECTOR, ".plot")
    assert len(plots) >= 3
    assert all(plot.find_elements(By.CSS_SELECTOR, "svg.main-svg") for plot in plots)
    requests = "return performance.getEntriesByType('resource').map((each) => each.name)"
    assert [name for name in page.execute_script(requests) if not name.startswith(("data:", "blob:"))] == []


def test_text_from_data_stays_text(page):
    assert page.title.startswith("SparseKV")  # the attack would have changed it
    assert page.execute_script("return document.querySelectorAll('img, [onerror]').length") == 0
    tokens = page.find_elements(By.CSS_SELECTOR, TOKENS)
    assert tokens[evidence.TOKENS.index(evidence.ATTACK)].text == evidence.ATTACK
    assert evidence.ATTACK in part(page, "answer").text
    assert evidence.ATTACK in part(page, "question").text


@pytest.mark.parametrize("run", evidence.RUNS)
def test_viewer_shows_what_each_press_keeps(page, run):
    view = evidence.make_view(list(evidence.RUNS).index(run), "")
    seen = []
    choose(page, run=run)
    for cell in view.cells:
        choose(page, press=cell.press, ratio=cell.compression_ratio)
        for layer, head in (("all", "all"), (0, 0), (2, 1), ("all", 1), (1, "all")):
            choose(page, layer=layer, head=head)
            rows = cell.kept[slice(None) if layer == "all" else layer][..., slice(None) if head == "all" else head, :]
            share = rows.reshape(-1, len(view.tokens)).mean(0)
            names = classes(page)
            assert [f"l{level}" in each for level, each in zip(expected_level(share), names, strict=True)].count(
                False
            ) == 0
            seen.append(tuple(map(frozenset, names)))
        assert f"{cell.press} says" in part(page, "answer").text
    assert len(set(seen)) > len(seen) / 2  # the selects matter


def test_map_shows_every_layer_at_every_position(page):
    choose(page, run="trained", press="snapkv", ratio=0.25, layer="all", head="all", colour="kept")
    view = evidence.make_view(list(evidence.RUNS).index("trained"), "")
    pixels = page.execute_script(
        "const map = document.querySelector('[data-part=map]');"
        "const { data } = map.getContext('2d').getImageData(0, 0, map.width, arguments[0]);"
        "return [...data].filter((_, i) => i % 4 === 3)",
        evidence.LAYERS,
    )
    kept = next(cell.kept for cell in view.cells if (cell.press, cell.compression_ratio) == ("snapkv", 0.25))
    assert np.array(pixels).reshape(evidence.LAYERS, -1) == pytest.approx(255 * kept.mean(1), abs=1)


def test_viewer_marks_anchors_and_the_answer(page):
    choose(page, run="base")
    names = classes(page)
    assert [i for i, each in enumerate(names) if "a" in each] == np.flatnonzero(
        evidence.make_view(0, "").anchors
    ).tolist()
    assert [i for i, each in enumerate(names) if "n" in each] == [evidence.TOKENS.index(evidence.NEEDLE)]
    part(page, "jump").click()
    assert page.switch_to.active_element == part(page, "tokens")
    assert evidence.NEEDLE.strip() in part(page, "tip").text


def test_viewer_tells_the_attention_that_a_token_receives(page):
    view, place = evidence.make_view(0, ""), evidence.TOKENS.index(evidence.NEEDLE)
    choose(page, run="base", press="knorm", ratio=0.5, layer=1, head=1)
    ActionChains(page).move_to_element(page.find_elements(By.CSS_SELECTOR, TOKENS)[place]).perform()
    relative = evidence.relative_attention(view)[1, 1, place]
    kept = view.cells[1].kept[1, 1, place]
    tip = part(page, "tip").text
    assert f"position {place} · content" in tip
    assert float(tip.partition("received: ")[2].split()[0]) == pytest.approx(relative, rel=0.01)
    assert ("kept" if kept else "evicted") in tip
    choose(page, colour="received")
    brightness = np.clip(np.log2(evidence.relative_attention(view)[1, 1]) / 5, 0, 1)
    shown = [next(int(name[1:]) for name in each if name[0] == "l") for each in classes(page)]
    assert np.abs(np.array(shown) / 10 - brightness)[(brightness > 0.05) & (brightness < 0.95)].max() < 0.051
    assert all(level == 0 for level, share in zip(shown, brightness, strict=True) if share == 0)
    assert len(set(shown)) > 4


def test_works_from_the_keyboard(page):
    reload(page)
    reached = []
    for _ in range(400):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.switch_to.active_element.get_attribute("data-part"))
        if reached[-1] == "tokens":
            break
    order = [name for name in reached if name in {"run", "press", "ratio", "layer", "head", "colour", "tokens"}]
    assert order == ["run", "press", "ratio", "layer", "head", "colour", "tokens"]
    for keys, position in ((Keys.ARROW_RIGHT, 0), (Keys.ARROW_RIGHT, 1), (Keys.END, len(evidence.TOKENS) - 1)):
        page.switch_to.active_element.send_keys(keys)
        assert f"position {position} " in part(page, "tip").text
    page.switch_to.active_element.send_keys(Keys.ARROW_UP)
    assert f"position {len(evidence.TOKENS) - 1} " not in part(page, "tip").text
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not part(page, "tip").is_displayed()


def test_light_and_dark(page):
    colours = "return [getComputedStyle(document.documentElement).backgroundColor, arguments[0].layout.font.color]"
    plot, button = page.find_element(By.CSS_SELECTOR, ".plot"), page.find_element(By.ID, "theme")
    before = page.execute_script(colours, plot)
    button.click()
    after = page.execute_script(colours, plot)
    assert all(one != two for one, two in zip(before, after, strict=True))
    button.click()
    assert page.execute_script(colours, plot) == before


def test_follows_the_system(page):
    page.execute_script("localStorage.clear()")
    theme = "return document.documentElement.dataset.theme"
    for name in ("dark", "light"):
        features = [{"name": "prefers-color-scheme", "value": name}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        page.refresh()
        assert page.execute_script(theme) == name


def test_fits_a_phone(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        reload(page)
        assert page.execute_script(WIDTHS) == [360, 360]
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
