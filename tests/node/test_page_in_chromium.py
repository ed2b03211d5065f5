"""The node's status page in a real browser: Chromium without a window. Skipped where it is missing."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("pynetdicom")
pytest.importorskip("prometheus_client")
pytest.importorskip("selenium", reason="the package selenium is not installed")

from helpers import dicom
from nodes import HOST, Archive, run_node, send, wait_for
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed")
def test_the_page_fits_narrow_and_wide_windows_and_says_nothing_on_the_console(small, tmp_path):
    options = ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Archive() as archive, run_node(tmp_path / "node", small, archive) as node:
        send(node.port, dicom(tmp_path / "a.dcm"), dicom(tmp_path / "b.dcm", seed=1, ViewPosition="LL"))
        wait_for(lambda: archive.stored and node._journal.count_states()["refused"])
        driver = Chrome(options=options, service=Service(DRIVER))
        try:
            for width in (500, 1200):
                driver.set_window_size(width, 800)
                driver.get(f"http://{HOST}:{node.http_port}/")
                root = "return document.documentElement"
                assert driver.execute_script(f"{root}.scrollWidth") <= driver.execute_script(f"{root}.clientWidth")
            states = [cell.text for cell in driver.find_elements(By.CSS_SELECTOR, "td:nth-child(4)")]
            colours = {
                driver.find_element(By.CSS_SELECTOR, f"td.{state}").value_of_css_property("color") for state in states
            }
            console = [entry for entry in driver.get_log("browser") if "favicon" not in entry["message"]]
        finally:
            driver.quit()
    assert sorted(states) == ["done", "refused"]
    assert len(colours) == 2
    assert console == []
