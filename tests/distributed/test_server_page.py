"""The chat page of a server, in a headless browser: by keyboard, and as narrow as a phone."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import Browser, find_browser
from tests.support.chain_model import CALL, ENDLESS, write_chain_model
from tests.support.ranks import RankPool
from tests.support.server import WEATHER, Asking, serve_for

pytestmark = [pytest.mark.dist, pytest.mark.slow]
# Screenshots are kept in this folder, if the variable names one.
_KEPT = os.environ.get("GLM3_TEST_SCREENSHOTS")
_TURNS = "[...document.querySelectorAll('.turn')].map(turn => turn.className + ': ' + "
_TURNS += "turn.lastChild.textContent)"
_IDLE = "at('stop').hidden"


async def keep(browser: Browser, name: str) -> None:
    if _KEPT:
        await browser.screenshot(Path(_KEPT) / f"{name}.png")


async def set_value(browser: Browser, name: str, text: str) -> None:
    await browser.value(
        f"at('{name}').value = {json.dumps(text)}; at('{name}').dispatchEvent(new Event('change'))"
    )


async def talk(url: str, program: str) -> dict[str, Any]:
    """A chat with a model that calls a tool, whatever is said to it."""
    found: dict[str, Any] = {}
    async with Browser(program) as browser:
        await browser.open(url, 1280, 800)
        await browser.until("at('model').options.length === 1")
        found["focus"] = await browser.value("document.activeElement.id")
        await keep(browser, "desktop-empty")
        await set_value(browser, "temperature", "0")
        await browser.type("How is")
        await browser.press("Enter", shift=True)
        await browser.type("Beijing?")
        await browser.press("Enter")
        await browser.until(f"{_IDLE} && document.querySelectorAll('.turn').length === 2")
        found["text"] = await browser.value(_TURNS)
        await set_value(browser, "tools", json.dumps([WEATHER]))
        await browser.value("at('retry').click()")
        await browser.until("document.querySelector('.turn.call')")
        await browser.until(_IDLE)
        found["call"] = await browser.value(_TURNS)
        found["asked"] = await browser.value("at('text').placeholder")
        await keep(browser, "desktop-call")
        await browser.type('{"sun": true}')
        await browser.press("Enter")
        await browser.until(f"{_IDLE} && document.querySelectorAll('.turn.call').length === 2")
        found["result"] = await browser.value(_TURNS)
        await keep(browser, "desktop-result")
        await browser.open(url, 1280, 800, is_dark=True)
        await browser.until("document.querySelectorAll('.turn').length === 4")
        found["again"] = await browser.value(_TURNS)
        await keep(browser, "desktop-dark")
        found["key"] = await browser.value("localStorage.getItem('glm3').includes('key\":\"')")
        await browser.open(url, 375, 700)
        await browser.until("document.querySelectorAll('.turn').length === 4")
        found["width"] = await browser.value("document.documentElement.scrollWidth")
        await keep(browser, "narrow")
        await browser.value("at('menu').click()")
        await browser.until("getComputedStyle(at('side')).visibility === 'visible'")
        await asyncio.sleep(0.3)
        await keep(browser, "narrow-side")
        await browser.press("Escape")
        await browser.until("getComputedStyle(at('side')).visibility === 'hidden'")
    return found


def talk_in_browser(ask: Asking) -> dict[str, Any]:
    return asyncio.run(talk(ask.url, str(find_browser())))


async def stop(url: str, program: str) -> tuple[list[str], list[str]]:
    async with Browser(program) as browser:
        await browser.open(url, 1000, 600)
        await browser.until("at('model').options.length === 1")
        await set_value(browser, "temperature", "0")
        await browser.type("Go on")
        await browser.press("Enter")
        await browser.until("(document.querySelector('.assistant')?.textContent.length || 0) > 50")
        await browser.press("Escape")
        await browser.until(_IDLE)
        await keep(browser, "stopped")
        turns = await browser.value(_TURNS)
        note = await browser.value("document.querySelector('.note').textContent")
        await set_value(browser, "max_tokens", "0")
        await browser.type("More")
        await browser.press("Enter")
        await browser.until("document.querySelector('.note.bad')")
        return turns, [note, await browser.value("document.querySelector('.note.bad').textContent")]


def stop_in_browser(ask: Asking) -> tuple[list[str], list[str]]:
    return asyncio.run(stop(ask.url, str(find_browser())))


@pytest.fixture(autouse=True)
def browser() -> None:
    if find_browser() is None:
        pytest.skip("no Chromium here")


def test_a_chat_with_tools(ranks: RankPool, tmp_path: Path) -> None:
    model = write_chain_model(tmp_path / "caller", *CALL, "<|observation|>")
    [found] = ranks.run(1, serve_for, talk_in_browser, model, {})
    asked, called = "turn user: How is\nBeijing?", 'turn call: {"city": "北京", "days": 3}'
    assert found["focus"] == "text"
    assert found["text"][0] == asked
    assert found["text"][1].startswith("turn assistant: get_weather")
    assert found["call"] == [asked, called]
    assert found["asked"] == "What get_weather returns"
    assert found["result"] == [asked, called, 'turn tool: {"sun": true}', called]
    assert found["again"] == found["result"]
    assert not found["key"]
    assert found["width"] == 375


def test_an_answer_is_stopped_by_escape(ranks: RankPool, tmp_path: Path) -> None:
    model = write_chain_model(tmp_path / "endless", *ENDLESS)
    [(turns, notes)] = ranks.run(1, serve_for, stop_in_browser, model, {})
    assert turns[0] == "turn user: Go on"
    assert "windrain" in turns[1].replace(" ", "")
    assert notes[0] == "Stopped."
    assert "max_tokens" in notes[1]


def test_the_page_asks_nobody_else() -> None:
    from glm3cli.infer import serve

    text = (Path(serve.__path__[0]) / "page.html").read_text("utf-8")
    assert "http" not in text
    assert "src=" not in text
