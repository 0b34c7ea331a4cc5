"""The playground in a real browser: the real application on an engine without a model."""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.fake_engine import FakeEngine, draft, make_application, serve_on_loopback

from serve.engine_protocol import Draft, SampleRequest
from serve.keys import KeyRing, hash_key
from udrl.text import count_words

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not CHROMIUM or not DRIVER, reason="no chromium or no chromedriver on the path: apt-get install chromium chromium-driver"
)
KEY = "udrl_" + "k" * 43


class ThreadGate:
    """Pauses the engine's streams after their first words until another thread opens it."""

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
        self.wait_until("the page shows its model", lambda: self.one("#model").text or self.shown("#key-row"))

    def one(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def all(self, css: str) -> list[Any]:
        nodes: list[Any] = self.driver.find_elements("css selector", css)
        return nodes

    def shown(self, css: str) -> bool:
        return any(node.is_displayed() for node in self.all(css))

    def script(self, code: str) -> Any:
        return self.driver.execute_script(f"return {code}")

    def set(self, css: str, value: Any) -> None:
        """Set an input with the events that a user causes."""
        self.driver.execute_script(
            "const node = document.querySelector(arguments[0]); node.value = arguments[1];"
            "node.dispatchEvent(new Event('input', {bubbles: true})); node.dispatchEvent(new Event('change', {bubbles: true}))",
            css,
            str(value),
        )

    def length(self, mode: str) -> None:
        self.driver.execute_script("arguments[0].click()", self.one(f"input[name=mode][value={mode}]"))

    def wait_until(self, label: str, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, f"timeout: {label}; {self.one('main').text}"
            time.sleep(0.02)

    def submit(self, intent: str = "a birthday card") -> None:
        from selenium.webdriver.common.keys import Keys

        box = self.one("#intent")
        box.clear()
        box.send_keys(intent, Keys.CONTROL, Keys.ENTER)

    def wait_for_status(self) -> str:
        """Return the status line after the request has ended."""
        self.wait_until(
            "the request has ended", lambda: not self.shown("#stop") and self.one("#status").text not in ("", "Writing …")
        )
        return str(self.one("#status").text)


@contextlib.contextmanager
def browser(folder: Path, *options: str) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chrome_options = webdriver.ChromeOptions()
    chrome_options.binary_location = str(CHROMIUM)
    fixed = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")
    for option in (*fixed, f"--user-data-dir={folder}", *options):
        chrome_options.add_argument(option)
    chrome_options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=chrome_options, service=Service(str(DRIVER)))
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
    with serve_on_loopback(make_application(engine)) as url:
        page = Page(driver, url)
        driver.get_log("browser")
        yield page
        errors = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE" and "422" not in entry["message"]]
        assert not errors
        driver.execute_script("localStorage.clear(); sessionStorage.clear()")


def test_prompts_follow_the_command_and_show_their_achieved_length(page: Page, engine: FakeEngine) -> None:
    page.length("exact")
    page.set("#words", 7)
    page.set("#n", 2)
    page.submit()
    assert "2 prompts in" in page.wait_for_status()
    assert [request.command.words for request in engine.requests] == [7]
    assert [request.intent for request in engine.requests] == ["a birthday card"]
    cards = page.all("article")
    assert len(cards) == 2
    assert all(
        "7 words, as requested" in card.text and count_words(card.find_element("css selector", "p").text) == 7 for card in cards
    )
    assert "7 words" in page.one("#length-out").text


def test_text_grows_live_and_a_rejected_draft_is_replaced(page: Page, engine: FakeEngine) -> None:
    gate: Any = ThreadGate()
    engine.gate = gate

    def write(request: SampleRequest, call: int) -> list[Draft]:
        return [draft("one two"), draft("a b c")] if call == 1 else [draft("d e f")]

    engine.write = write
    page.length("exact")
    page.set("#words", 3)
    page.set("#n", 2)
    page.submit()
    page.wait_until("first words", lambda: [card.text for card in page.all("article p")] == ["one", "a"])
    assert page.shown("#stop")
    gate.open = True
    page.wait_for_status()
    assert [card.text for card in page.all("article p")] == ["d e f", "a b c"]
    assert "3 drafts" in page.one("#status").text


def test_a_missed_length_is_shown(page: Page, engine: FakeEngine) -> None:
    engine.write = lambda request, call: [draft("one two three four")] * request.n
    page.length("range")
    page.set("#words", 2)
    page.set("#most", 3)
    page.set("#n", 1)
    page.submit()
    page.wait_for_status()
    assert "4 words, length missed" in page.one("article").text


def test_arrow_keys_change_tabs_and_all_tasks_fan_out(page: Page, engine: FakeEngine) -> None:
    from selenium.webdriver.common.keys import Keys

    page.one("[role=tab][aria-selected=true]").send_keys(Keys.ARROW_RIGHT)
    tab = page.driver.switch_to.active_element
    assert (tab.get_attribute("data-task"), tab.get_attribute("aria-selected")) == ("image_search", "true")
    tab.send_keys(Keys.END)
    page.set("#n", 1)
    page.submit()
    page.wait_for_status()
    assert {request.command.task for request in engine.requests} == {"text_to_image", "image_search"}
    assert [node.text for node in page.all("article h2")] == ["text to image", "image search"]


def test_an_error_is_shown_in_one_line_and_marks_its_field(page: Page) -> None:
    page.one("#more summary").click()
    page.set("#seed", 2**40)
    page.driver.execute_script("document.querySelector('#form').noValidate = true")
    page.submit()
    assert page.wait_for_status().startswith("seed: ")
    assert page.one("#status").get_attribute("class") == "bad"
    assert page.one("#seed").get_attribute("aria-invalid") == "true"


def test_stop_aborts_the_generation(page: Page, engine: FakeEngine) -> None:
    from selenium.webdriver.common.keys import Keys

    gate: Any = ThreadGate()
    engine.gate = gate
    page.submit()
    page.wait_until("first words", lambda: page.all("article p") and page.one("article p").text)
    page.one("#intent").send_keys(Keys.ESCAPE)
    page.wait_until("the generation is aborted", lambda: engine.aborted == 1)
    assert page.wait_for_status().startswith("Stopped")
    assert "incomplete" in page.one("article").text


def test_text_of_user_and_model_is_never_parsed_as_html(page: Page, engine: FakeEngine) -> None:
    hostile = "<img src=x onerror=alert(1)> <b>bold</b>"
    engine.write = lambda request, call: [draft(hostile)]
    page.set("#n", 1)
    page.submit(hostile)
    page.wait_for_status()
    assert page.one("article p").text == hostile
    assert not page.all("article img, article b")


def test_prompts_and_the_request_can_be_copied(page: Page) -> None:
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.url}
    )
    page.driver.execute_script(
        "window.copied = []; Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (t) => copied.push(t)}})"
    )
    page.set("#n", 2)
    page.submit("it's a card")
    page.wait_for_status()
    text = page.one("article p").text
    page.one("article button").click()
    page.one("#status button").click()
    page.one("#curl").click()
    page.wait_until("three texts are copied", lambda: len(page.script("copied")) == 3)
    prompt, all_prompts, curl = page.script("copied")
    assert prompt == text
    assert all_prompts.splitlines()[0] == text
    assert curl.startswith(f"curl -s {page.url}/v1/prompts")
    assert json.loads(curl.split(" -d '")[1].removesuffix("'").replace("'\\''", "'"))["intent"] == "it's a card"


def test_settings_survive_a_reload(page: Page) -> None:
    page.length("exact")
    page.set("#words", 9)
    page.one("#tab-1").click()
    page.driver.refresh()
    page.wait_until("the page is loaded", lambda: page.one("#model").text)
    assert page.one("[aria-selected=true]").get_attribute("data-task") == "image_search"
    assert page.one("#words").get_attribute("value") == "9"
    assert page.script("lengthMode()") == "exact"


def test_the_page_asks_for_a_key_if_the_server_needs_one(driver: Any) -> None:
    engine = FakeEngine()
    with serve_on_loopback(make_application(engine, KeyRing({"me": hash_key(KEY)}))) as url:
        page = Page(driver, url)
        assert page.shown("#key")
        page.one("#key").send_keys(KEY, "\t")
        page.wait_until("the page shows its model", lambda: page.one("#model").text)
        page.submit()
        assert "prompts in" in page.wait_for_status()
        assert page.script("JSON.stringify(localStorage)").find(KEY) == -1
        driver.execute_script("localStorage.clear(); sessionStorage.clear()")


def test_no_request_goes_to_another_host(page: Page) -> None:
    page.submit()
    page.wait_for_status()
    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = {request["request"]["url"] for request in sent if request["documentURL"].startswith("http")}  # not the new-tab page
    assert f"{page.url}/v1/prompts" in urls
    assert [url for url in urls if not url.startswith(("http://127.0.0.1:", "data:"))] == []


@pytest.mark.parametrize("width", [360, 1100])
def test_the_page_fits_the_screen_and_its_controls_fit_a_thumb(page: Page, width: int) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    )
    try:
        page.one("#more summary").click()
        page.submit("a" * 120)
        page.wait_for_status()
        assert page.script("document.documentElement.scrollWidth <= innerWidth")
        small = page.script(
            "[...document.querySelectorAll('button, select, summary, .choices span, input[type=range]')]"
            ".filter(e => e.offsetParent && e.getBoundingClientRect().height < 39).map(e => e.id || e.textContent)"
        )
        assert small == []
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_follows_the_dark_color_scheme(page: Page) -> None:
    def background(scheme: str) -> str:
        page.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        return str(page.script("getComputedStyle(document.body).backgroundColor"))

    assert background("light") == "rgb(246, 246, 243)"
    assert background("dark") == "rgb(18, 19, 22)"
    background("light")
