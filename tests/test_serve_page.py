"""The page in a browser: a message is sent, tokens arrive, an answer is stopped, the tree is drawn; with the key, in the dark,
on a telephone. Chromium is the system's; without one these tests are skipped.

`TREESTREAM_SCREENSHOTS=docs` in the environment renews the pictures of docs/serve.md.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from offload.serve.server import Server
from serving import demo_engine, is_idle, running, until

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
KEY = "correct-horse"
WAIT_MS = 60_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; Debian's package is called chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # playwright's own event loop
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A pass over the emulated link takes 0.4 s: long enough to be watched."""
    engine: dict[str, Any] = {"tree": "64x10", "resident_layers": 0, "emulate_link": 17_707_008 / 0.4}
    with running(lambda _: demo_engine(**engine), api_key=KEY, keep_alive_s=0.2) as server:
        yield server


def opened(browser: Browser, server: Server, **context: Any) -> tuple[Page, list[str]]:
    """The page, ready, and what its console complains about."""
    context = {"http_credentials": {"username": "me", "password": KEY}, **context}
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#state")).to_have_text("ready")
    return page, complaints


def ask(page: Page, text: str, max_tokens: int) -> None:
    page.locator("#settings-button").click()
    page.locator("#max-tokens").fill(str(max_tokens))
    page.locator("#temperature").fill("0")
    page.locator("#settings button").click()
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def picture(page: Page, name: str) -> None:
    folder = os.environ.get("TREESTREAM_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_an_answer_arrives_in_pieces_beside_its_trees(browser: Browser, server: Server) -> None:
    page, complaints = opened(browser, server)
    expect(page.locator("#model")).to_have_text("demo")
    ask(page, "What is the state of the Union?", 40)
    expect(page.locator("#messages .user")).to_have_text("What is the state of the Union?")
    answer = page.locator("#messages .assistant")
    expect(answer).to_have_text(re.compile(r"\w+"))
    expect(page.locator("#stop")).to_be_visible()
    lengths = {len(answer.inner_text())}
    expect(page.locator("#progress")).to_have_text(re.compile("layer|pass"))
    expect(page.locator("#tree .accepted").nth(1)).to_be_attached()
    expect(page.locator("#tree path").nth(60)).to_be_attached()  # of 64; the last passes need less
    lengths.add(len(answer.inner_text()))
    expect(answer.locator(".note")).to_have_text(re.compile(r"\d+ tokens, after \d+"))
    lengths.add(len(answer.inner_text()))
    assert len(lengths) >= 2
    for name in ("#tokens-per-pass", "#s-per-token", "#predicted", "#pass-s"):
        assert re.fullmatch(r"[0-9.]+( m?s)?", page.locator(name).inner_text()), name
    assert "MB/s" in page.locator("#link-text").inner_text()
    assert 0.3 < float(page.locator("#link").evaluate("meter => meter.value")) <= 1
    assert complaints == []


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_is_stopped_and_the_engine_is_free(browser: Browser, server: Server, how: str) -> None:
    page, complaints = opened(browser, server, viewport={"width": 1100, "height": 800})
    ask(page, "What is the state of the Union?", 900)
    answer = page.locator("#messages .assistant")
    expect(answer).to_have_text(re.compile(r"\w+"))
    if how == "button":
        expect(page.locator("#passes rect").nth(5)).to_be_attached()
        picture(page, "page")
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    expect(answer.locator(".note")).to_have_text("stopped")
    expect(page.locator("#send")).to_be_visible()
    until(lambda: is_idle(server), 10)
    ask(page, "And then?", 4)  # the conversation goes on
    expect(page.locator("#messages .assistant").nth(1).locator(".note")).to_have_text(re.compile(r"4 tokens"))
    assert complaints == []


def test_it_fits_a_telephone_and_the_night(browser: Browser, server: Server) -> None:
    page, complaints = opened(browser, server, viewport={"width": 390, "height": 844}, color_scheme="dark")
    ask(page, "What is the state of the Union?", 24)
    expect(page.locator("#tree path").nth(20)).to_be_attached()
    picture(page, "page_dark")
    expect(page.locator("#messages .note")).to_have_text(re.compile("24 tokens"))
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    red, green, blue = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
    assert max(red, green, blue) < 60
    assert complaints == []


def test_errors_are_shown_and_the_question_can_be_asked_again(browser: Browser, server: Server) -> None:
    page, _ = opened(browser, server)
    ask(page, "Hello", 100_000)
    expect(page.locator("#messages .error")).to_have_text(re.compile("rows of context"))
    ask(page, "Hello", 3)
    expect(page.locator("#messages .assistant").nth(1).locator(".note")).to_have_text(re.compile("3 tokens"))


def test_text_is_text_and_no_markup(browser: Browser, server: Server) -> None:
    page, _ = opened(browser, server)
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>", 2)
    expect(page.locator("#messages .user")).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator("#messages img, #messages b").count() == 0


def test_without_the_key_there_is_no_page(browser: Browser, server: Server) -> None:
    page = browser.new_context().new_page()
    with pytest.raises(Error, match="AUTH_CREDENTIALS"):  # a person would be asked for it
        page.goto(server.url)
