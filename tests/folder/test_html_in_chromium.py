"""report.html in a real browser: Chromium without a window, driven by Selenium. Skipped where one is missing."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from helpers import ToyRunner, png
from stand_in import SIZE, write_bundle

from bsdiff_rt.config import InferSettings
from bsdiff_rt.folder.pipeline import Inference

selenium = pytest.importorskip("selenium", reason="the package selenium is not installed")
from selenium.webdriver import ActionChains, Chrome, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed"),
    pytest.mark.slow,
    pytest.mark.services,
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """URL of the page of a run over three X-rays and a broken file, two samples each."""
    folder = tmp_path_factory.mktemp("page")
    bundle = write_bundle(folder / "bundle")
    for seed, name in enumerate(("first.png", "second.png", "third.png")):
        png(folder / "in" / name, seed=seed, shape=(600, 600))
    (folder / "in" / "zz broken.png").write_bytes(b"text")
    settings = InferSettings(output=folder / "out", bundle=str(bundle.folder), html=True, samples=2)
    inference = Inference(settings, ToyRunner(SIZE))
    inference.run(inference.find_tasks([folder / "in"]))
    return (folder / "out" / "report.html").as_uri()


@pytest.fixture(scope="module")
def chromium():
    """A browser that keeps what its console says and what it requests."""
    options = ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, page):
    """The browser with the page just opened. At the end, nothing was said on the console and nothing left the page."""
    chromium.get(page)
    yield chromium
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    folder = page.rpartition("/out/")[0]
    assert page in urls
    assert [url for url in urls if not url.startswith(("data:image/webp;base64,", f"{folder}/"))] == []


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def list_shown(browser):
    """Return the names of the cards that can be seen."""
    cards = browser.find_elements(By.CSS_SELECTOR, ".card")
    return [card.find_element(By.CSS_SELECTOR, "h2 > :first-child").text for card in cards if card.is_displayed()]


def press(browser, *keys):
    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def state(browser):
    return browser.execute_script("return {...state, kind, name: current.name}")


def measure(browser, selector):
    """Return the mean brightness of a picture as the browser decoded it, 0 to 255; -1 if it is not loaded."""
    script = """
      const image = document.querySelector(arguments[0]);
      if (!image.complete || !image.naturalWidth) return -1;
      const canvas = Object.assign(document.createElement("canvas"), { width: 32, height: 32 });
      canvas.getContext("2d").drawImage(image, 0, 0, 32, 32);
      const values = canvas.getContext("2d").getImageData(0, 0, 32, 32).data;
      return values.reduce((sum, value, index) => sum + (index % 4 ? 0 : value), 0) / 1024;
    """
    return browser.execute_script(script, selector)


@pytest.fixture
def viewer(browser):
    """The browser with the first image opened by the keyboard."""
    find(browser, ".card h2 button").send_keys(Keys.ENTER)
    assert find(browser, "#viewer").is_displayed()
    return browser


def test_the_cards(browser):
    assert list_shown(browser) == ["first.png", "second.png", "third.png", "zz broken.png"]
    assert find(browser, "#count").text == "4 of 4 files"
    assert len(browser.find_elements(By.CSS_SELECTOR, ".card:first-child img")) == 4
    assert measure(browser, ".card img") > 50
    assert "not a PNG, JPEG or TIFF file" in find(browser, ".card.refused").text
    assert "Not for diagnostic use" in find(browser, "header").text


def test_the_divider_of_a_card_moves_by_keyboard_and_mouse(browser):
    slider = find(browser, ".compare input")
    split = "return getComputedStyle(document.querySelector('.compare img + img')).clipPath"
    assert "50%" in browser.execute_script(split)
    slider.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert "48%" in browser.execute_script(split)
    ActionChains(browser).move_to_element_with_offset(slider, slider.size["width"] // 4, 0).click().perform()
    moved = float(browser.execute_script(split).split()[-1].removesuffix("%)"))
    assert moved == pytest.approx(75, abs=2)


def test_filter_by_text_and_status(browser):
    press(browser, "/")
    press(browser, "SECOND")
    assert list_shown(browser) == ["second.png"]
    assert find(browser, "#count").text == "1 of 4 files"
    find(browser, "#text").send_keys(Keys.CONTROL, "a")
    find(browser, "#text").send_keys("tiff file")  # of the reason
    assert list_shown(browser) == ["zz broken.png"]
    find(browser, "#text").send_keys(*[Keys.BACKSPACE] * len("tiff file"))
    find(browser, "input[value=ok]").click()
    assert list_shown(browser) == ["zz broken.png"]
    find(browser, "input[value=ok]").click()
    assert len(list_shown(browser)) == 4


def test_the_viewer_is_used_by_keyboard(viewer):
    assert state(viewer) == {
        "scale": 1, "left": 0, "top": 0, "level": 0.5, "width": 1, "split": 50, "kind": "compare", "name": "first.png"
    }  # fmt: skip
    press(viewer, "[", "[", "+", ".", Keys.ARROW_UP)
    changed = state(viewer)
    assert changed["split"] == 46
    assert changed["scale"] == 1.25
    assert changed["width"] == pytest.approx(1 / 1.1)
    assert changed["level"] == pytest.approx(0.48)
    ActionChains(viewer).key_down(Keys.SHIFT).send_keys(Keys.ARROW_LEFT).key_up(Keys.SHIFT).perform()
    assert state(viewer)["left"] == changed["left"] + 40
    press(viewer, "0")
    assert (state(viewer)["scale"], state(viewer)["width"]) == (1, 1)
    press(viewer, "4")
    assert state(viewer)["kind"] == "bone"
    assert not find(viewer, "#divider").is_displayed()
    press(viewer, Keys.ARROW_RIGHT)
    assert (state(viewer)["name"], state(viewer)["kind"]) == ("second.png", "bone")
    press(viewer, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)  # no further than the last
    assert state(viewer)["name"] == "third.png"
    press(viewer, "1", Keys.ESCAPE)
    assert not find(viewer, "#viewer").is_displayed()
    assert viewer.switch_to.active_element.text == "third.png"


def test_the_viewer_is_used_by_mouse(viewer):
    stage = find(viewer, "#stage")
    ActionChains(viewer).move_to_element_with_offset(stage, 200, 0).click_and_hold().move_by_offset(
        100, 50
    ).release().perform()
    dragged = state(viewer)
    assert dragged["level"] == pytest.approx(0.5 + 50 / stage.size["height"], abs=0.01)
    assert dragged["width"] == pytest.approx(1 + 100 / stage.size["width"], abs=0.01)
    slope = find(viewer, "#window feComponentTransfer > *").get_attribute("slope")
    assert float(slope) == pytest.approx(1 / dragged["width"])
    divider = find(viewer, "#divider")
    ActionChains(viewer).drag_and_drop_by_offset(divider, -stage.size["width"] // 4, 0).perform()
    assert state(viewer)["split"] == pytest.approx(25, abs=1)
    ActionChains(viewer).scroll_from_origin(scroll_origin(stage), 0, -400).perform()
    assert state(viewer)["scale"] == pytest.approx(2.718, rel=0.1)
    ActionChains(viewer).double_click(stage).perform()
    assert state(viewer)["scale"] == 1


def scroll_origin(element):
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    return ScrollOrigin.from_element(element)


def test_the_viewer_shows_the_files_themselves(viewer):
    """600 px, where the embedded pictures have 512. A card's own filter does not reach them."""
    sizes = "return ['under', 'over'].map((id) => $(id).naturalWidth)"
    viewer.execute_async_script("Promise.all([$('under').decode(), $('over').decode()]).then(arguments[0])")
    assert viewer.execute_script(sizes) == [600, 600]
    assert find(viewer, "#resolution").text == ""
    press(viewer, "4")
    viewer.execute_async_script("$('under').decode().then(arguments[0])")
    assert find(viewer, "#resolution").text == "shown at 512 of 600 px"


def test_dark_and_light(browser):
    def read_back():
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))

    first = read_back()
    find(browser, "#theme").click()
    assert (read_back() < 200) != (first < 200)
    find(browser, "#theme").click()
    assert read_back() == first


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    """URL of the page of a run over 1,000 X-rays."""
    folder = tmp_path_factory.mktemp("long page")
    bundle = write_bundle(folder / "bundle")
    first = png(folder / "in" / "0000.png", seed=0)
    for number in range(1, 1000):
        os.link(first, folder / "in" / f"{number:04}.png")
    settings = InferSettings(output=folder / "out", bundle=str(bundle.folder), html=True, batch=50)
    inference = Inference(settings, ToyRunner(SIZE))
    inference.run(inference.find_tasks([folder / "in"]))
    return (folder / "out" / "report.html").as_uri()


def test_a_thousand_cards_stay_smooth(chromium, long_page):
    """Scrolled to its end, filtered and cleared, no frame of the page takes half a second. Seen: 0.12 s."""
    chromium.get(long_page)
    assert find(chromium, "#count").text == "1000 of 1000 files"
    scroll = """
      const done = arguments[0], end = document.body.scrollHeight, text = document.querySelector("#text");
      let longest = 0, last = performance.now(), frame = 0;
      const next = (now) => {
        longest = Math.max(longest, now - last);
        last = now;
        if (frame === 70) { text.value = "0999"; text.dispatchEvent(new Event("input")); }
        if (frame === 80) { text.value = ""; text.dispatchEvent(new Event("input")); }
        if (++frame > 90) return done(longest);
        window.scrollTo(0, (end * Math.min(frame, 60)) / 60);
        requestAnimationFrame(next);
      };
      requestAnimationFrame(next);
    """
    longest_ms = chromium.execute_async_script(scroll)
    assert longest_ms < 500
    # The last picture is loaded once it is in view.
    WebDriverWait(chromium, 30).until(
        lambda _: (
            chromium.execute_script("document.querySelector('.card:last-child').scrollIntoView()")
            or measure(chromium, ".card:last-child img") > 50
        )
    )
