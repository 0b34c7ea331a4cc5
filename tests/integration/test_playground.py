"""The playground in a real browser, on the real application with an engine that needs no model."""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import FakeEngine, application, draft, listening

from serve.drafts import Ask, Draft
from serve.keys import KeyRing, digest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not CHROMIUM or not DRIVER, reason="no chromium or no chromedriver on the path: apt-get install chromium chromium-driver"
)
KEY = "udrl_" + "k" * 43


class Gate:
    """Holds the engine's streams behind their first words until it is opened, from another thread."""

    def __init__(self) -> None:
        self.open = False

    async def wait(self) -> None:
        while not self.open:
            await asyncio.sleep(0.01)


class Page:
    """A browser tab with the playground."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url
        driver.get(url)
        self.until("the page knows its model", lambda: self.one("#model").text or self.shown("#key-row"))

    def one(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def all(self, css: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", css)
        return found

    def shown(self, css: str) -> bool:
        return any(node.is_displayed() for node in self.all(css))

    def script(self, code: str) -> Any:
        return self.driver.execute_script(f"return {code}")

    def set(self, css: str, value: Any) -> None:
        """Set an input as a hand on a slider does."""
        self.driver.execute_script(
            "const node = document.querySelector(arguments[0]); node.value = arguments[1];"
            "node.dispatchEvent(new Event('input', {bubbles: true})); node.dispatchEvent(new Event('change', {bubbles: true}))",
            css,
            str(value),
        )

    def length(self, mode: str) -> None:
        self.driver.execute_script("arguments[0].click()", self.one(f"input[name=mode][value={mode}]"))

    def until(self, what: str, true: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 20
        while not true():
            assert time.monotonic() < deadline, f"never: {what}; {self.one('main').text}"
            time.sleep(0.02)

    def ask(self, intent: str = "a birthday card") -> None:
        from selenium.webdriver.common.keys import Keys

        box = self.one("#intent")
        box.clear()
        box.send_keys(intent, Keys.CONTROL, Keys.ENTER)

    def done(self) -> str:
        self.until("it is done", lambda: not self.shown("#stop") and self.one("#status").text not in ("", "Writing …"))
        return str(self.one("#status").text)


@contextlib.contextmanager
def browser(folder: Path, *options: str) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chosen = webdriver.ChromeOptions()
    chosen.binary_location = str(CHROMIUM)
    fixed = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")
    for option in (*fixed, f"--user-data-dir={folder}", *options):
        chosen.add_argument(option)
    chosen.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=chosen, service=Service(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile"), "--window-size=1100,1000") as driver:
        yield driver


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def page(driver: Any, engine: FakeEngine) -> Iterator[Page]:
    with listening(application(engine)) as url:
        page = Page(driver, url)
        driver.get_log("browser")
        yield page
        wrong = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE" and "422" not in entry["message"]]
        assert not wrong
        driver.execute_script("localStorage.clear(); sessionStorage.clear()")


def test_prompts_are_written_as_commanded_and_say_what_they_achieved(page: Page, engine: FakeEngine) -> None:
    page.length("exact")
    page.set("#words", 7)
    page.set("#n", 2)
    page.ask()
    assert "2 prompts in" in page.done()
    assert [ask["words"] for ask in engine.asked] == [7]
    assert [ask["intent"] for ask in engine.asked] == ["a birthday card"]
    cards = page.all("article")
    assert len(cards) == 2
    assert all("7 words, kept" in card.text and len(card.find_element("css selector", "p").text.split()) == 7 for card in cards)
    assert "7 words" in page.one("#length-out").text


def test_text_grows_live_and_a_missed_draft_is_plainly_written_again(page: Page, engine: FakeEngine) -> None:
    gate: Any = Gate()
    engine.gate = gate

    def say(ask: Ask, call: int) -> list[Draft]:
        return [draft("one two"), draft("a b c")] if len(engine.asked) == 1 else [draft("d e f")]

    engine.say = say
    page.length("exact")
    page.set("#words", 3)
    page.set("#n", 2)
    page.ask()
    page.until("first words", lambda: [card.text for card in page.all("article p")] == ["one", "a"])
    assert page.shown("#stop")
    gate.open = True
    page.done()
    assert [card.text for card in page.all("article p")] == ["d e f", "a b c"]
    assert "3 drafts" in page.one("#status").text


def test_a_length_that_stays_missed_is_said(page: Page, engine: FakeEngine) -> None:
    engine.say = lambda ask, call: [draft("one two three four")] * ask["n"]
    page.length("range")
    page.set("#words", 2)
    page.set("#most", 3)
    page.set("#n", 1)
    page.ask()
    page.done()
    assert "4 words, length missed" in page.one("article").text


def test_tabs_go_by_arrow_keys_and_all_fans_out(page: Page, engine: FakeEngine) -> None:
    from selenium.webdriver.common.keys import Keys

    page.one("[role=tab][aria-selected=true]").send_keys(Keys.ARROW_RIGHT)
    chosen = page.driver.switch_to.active_element
    assert (chosen.get_attribute("data-task"), chosen.get_attribute("aria-selected")) == ("image_search", "true")
    chosen.send_keys(Keys.END)
    page.set("#n", 1)
    page.ask()
    page.done()
    assert {ask["task"] for ask in engine.asked} == {"text_to_image", "image_search"}
    assert [node.text for node in page.all("article h2")] == ["text to image", "image search"]


def test_an_error_is_one_line_and_marks_its_field(page: Page) -> None:
    page.one("#more summary").click()
    page.set("#seed", 2**40)
    page.driver.execute_script("document.querySelector('#form').noValidate = true")
    page.ask()
    assert page.done().startswith("seed: ")
    assert page.one("#status").get_attribute("class") == "bad"
    assert page.one("#seed").get_attribute("aria-invalid") == "true"


def test_stop_ends_the_generation(page: Page, engine: FakeEngine) -> None:
    from selenium.webdriver.common.keys import Keys

    gate: Any = Gate()
    engine.gate = gate
    page.ask()
    page.until("first words", lambda: page.all("article p") and page.one("article p").text)
    page.one("#intent").send_keys(Keys.ESCAPE)
    page.until("the engine was given up", lambda: engine.given_up == 1)
    assert page.done().startswith("Stopped")
    assert "not finished" in page.one("article").text


def test_text_of_user_and_model_is_never_markup(page: Page, engine: FakeEngine) -> None:
    hostile = "<img src=x onerror=alert(1)> <b>bold</b>"
    engine.say = lambda ask, call: [draft(hostile)]
    page.set("#n", 1)
    page.ask(hostile)
    page.done()
    assert page.one("article p").text == hostile
    assert not page.all("article img, article b")


def test_prompts_and_the_request_are_copied(page: Page) -> None:
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.url}
    )
    page.driver.execute_script(
        "window.copied = []; Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (t) => copied.push(t)}})"
    )
    page.set("#n", 2)
    page.ask("it's a card")
    page.done()
    text = page.one("article p").text
    page.one("article button").click()
    page.one("#status button").click()
    page.one("#curl").click()
    page.until("all is copied", lambda: len(page.script("copied")) == 3)
    one, every, curl = page.script("copied")
    assert one == text
    assert every.splitlines()[0] == text
    assert curl.startswith(f"curl -s {page.url}/v1/prompts")
    assert json.loads(curl.split(" -d '")[1].removesuffix("'").replace("'\\''", "'"))["intent"] == "it's a card"


def test_settings_survive_a_reload(page: Page) -> None:
    page.length("exact")
    page.set("#words", 9)
    page.one("#tab-1").click()
    page.driver.refresh()
    page.until("the page is back", lambda: page.one("#model").text)
    assert page.one("[aria-selected=true]").get_attribute("data-task") == "image_search"
    assert page.one("#words").get_attribute("value") == "9"
    assert page.script("mode()") == "exact"


def test_a_key_is_asked_for_where_one_is_needed(driver: Any) -> None:
    engine = FakeEngine()
    with listening(application(engine, KeyRing({"me": digest(KEY)}))) as url:
        page = Page(driver, url)
        assert page.shown("#key")
        page.one("#key").send_keys(KEY, "\t")
        page.until("the model is known", lambda: page.one("#model").text)
        page.ask()
        assert "prompts in" in page.done()
        assert page.script("JSON.stringify(localStorage)").find(KEY) == -1
        driver.execute_script("localStorage.clear(); sessionStorage.clear()")


def test_nothing_is_asked_of_another_host(page: Page) -> None:
    page.ask()
    page.done()
    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked = {one["request"]["url"] for one in sent if one["documentURL"].startswith("http")}  # not the browser's own new tab
    assert f"{page.url}/v1/prompts" in asked
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:"))] == []


@pytest.mark.parametrize("width", [360, 1100])
def test_it_fits_its_screen_with_targets_for_a_thumb(page: Page, width: int) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    )
    try:
        page.one("#more summary").click()
        page.ask("a" * 120)
        page.done()
        assert page.script("document.documentElement.scrollWidth <= innerWidth")
        small = page.script(
            "[...document.querySelectorAll('button, select, summary, .choices span, input[type=range]')]"
            ".filter(e => e.offsetParent && e.getBoundingClientRect().height < 39).map(e => e.id || e.textContent)"
        )
        assert small == []
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_follows_the_dark_setting(page: Page) -> None:
    def background(scheme: str) -> str:
        page.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        return str(page.script("getComputedStyle(document.body).backgroundColor"))

    assert background("light") == "rgb(246, 246, 243)"
    assert background("dark") == "rgb(18, 19, 22)"
    background("light")
