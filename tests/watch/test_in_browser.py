"""Reports in a real browser: no error, no request to outside, hovering and smoothing, a quick first paint."""

import json

import pytest

from llmtune.watch.report.page import read_run, report_html
from report_helpers import HOSTILE, make_run, quiet_losses

FIRST_PAINT = """
const done = arguments[0];
new PerformanceObserver(list => {
  for (const entry of list.getEntries()) if (entry.name === "first-contentful-paint") done(entry.startTime);
}).observe({ type: "paint", buffered: true });
"""


def coordinates(path):
    return [float(number) for number in path[1:].replace("L", ",").split(",")]


def requests_of(browser):
    """Every address that the browser asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def open_report(browser, tmp_path, runs):
    path = tmp_path / "report.html"
    path.write_text(report_html(runs), encoding="utf-8")
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(path.as_uri())
    return path.as_uri()


def test_a_long_report_of_hostile_text_opens_without_an_error_or_a_request_in_a_second(browser, tmp_path):
    run = make_run(tmp_path / "a", quiet_losses(10_000), text=HOSTILE, heldout=[(0, 4.0), (5000, 2.0), (9000, 1.9)])
    address = open_report(browser, tmp_path, [read_run(run)])
    assert browser.get_log("browser") == []
    assert [url for url in requests_of(browser) if not url.startswith("data:")] == [address]
    paints = []
    for _ in range(3):  # the machine may be busy with something else
        browser.refresh()
        paints.append(browser.execute_async_script(FIRST_PAINT))
    assert 0 < min(paints) < 1000


def test_hovering_shows_the_values_of_the_step_and_the_slider_smooths(browser, tmp_path):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    losses = quiet_losses(101)
    open_report(browser, tmp_path, [read_run(make_run(tmp_path / "a", losses))])
    plot = browser.find_element(By.CSS_SELECTOR, ".chart.wide .plot")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    ActionChains(browser).move_to_element(plot).perform()
    tip = plot.find_element(By.CSS_SELECTOR, ".tip").text
    assert tip.splitlines()[0] == "step 51"
    assert f"training {float(f'{losses[50]:.4g}')}" in tip
    smooth = browser.find_element(By.CSS_SELECTOR, ".chart.wide path.smooth")
    before = smooth.get_attribute("d")
    set_slider = "const s = document.querySelector('.smoothing input'); s.value = arguments[0];"
    browser.execute_script(set_slider + "s.dispatchEvent(new Event('input'))", 0)
    raw = browser.find_element(By.CSS_SELECTOR, ".chart.wide path.noisy").get_attribute("d")
    assert coordinates(smooth.get_attribute("d")) == pytest.approx(coordinates(raw), abs=0.1)
    assert coordinates(before) != pytest.approx(coordinates(raw), abs=10)
    assert browser.get_log("browser") == []
