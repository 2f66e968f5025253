"""The page in a real browser: streams, colours, routes of a token, forced and muted adapters, comparison, export, keyboard, phones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from meteora_core.serving.app import AppOptions
from meteora_core.serving.guard import LOOPBACK, Access
from support.browser import find_chromium
from support.chat_world import NAMES, World, open_chat_model, without_ends
from support.server import RunningServer, running_server

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = find_chromium()
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def local(world: World) -> Iterator[RunningServer]:
    chat_model = open_chat_model(world)
    without_ends(chat_model.model)
    with running_server(chat_model, AppOptions(Access(hosts=LOOPBACK))) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield running
        running.close()


def open_page(browser: Any, url: str, **options: Any) -> tuple[Any, list[str]]:
    """The page, and the messages of its console that are errors; requests to other hosts are errors too."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 850}, **options})
    page, problems = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if not request.url.startswith((url, "data:", "blob:")) else None)
    page.goto(url)
    return page, problems


def ask(page: Any, text: str) -> None:
    before = page.locator(".facts:not(:empty)").count()
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    page.locator(".facts:not(:empty)").nth(before).wait_for(state="attached")
    page.get_by_role("button", name="Send").wait_for()


def test_the_policy_allows_the_page_alone(local: RunningServer) -> None:
    answer = httpx.get(local.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http://" not in answer.text.replace("http://127.0.0.1", "")
    assert "innerHTML" not in answer.text
    assert "style=" not in answer.text


@needs_browser
def test_a_chat_with_coloured_tokens(local: RunningServer, browser: Any, tmp_path: Path) -> None:
    page, problems = open_page(browser, local.url)
    page.wait_for_selector("#adapters li")
    assert page.locator("#adapters .name").all_text_contents() == list(NAMES)
    page.get_by_label("Longest answer in tokens").fill("20")
    ask(page, "<img src=x onerror=alert(1)> hello")
    assert page.locator(".user").text_content() == "<img src=x onerror=alert(1)> hello"
    assert page.locator("img").count() == 0
    tokens = page.locator(".t")
    assert tokens.count() > 5
    tokens.nth(2).hover()
    about = page.locator("#about").text_content()
    assert any(name in about for name in NAMES)
    assert "%" in about
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('.t')].indexOf(document.activeElement)") == 1
    page.get_by_label("Show layers one by one").check()
    page.get_by_role("button", name="Use only beta").click()
    ask(page, "again")
    assert page.locator(".answer").last.locator("h3").text_content() == "only beta"
    page.locator(".answer").last.locator(".t").first.hover()
    assert page.locator(".layers i").count() == 21
    assert page.get_by_label("share of beta in the last answer").text_content() == "100 %"
    page.get_by_role("button", name="Use only beta").click()
    page.get_by_role("button", name="Never choose alpha").click()
    page.get_by_label("Compare with a second setting").check()
    page.get_by_label("Second model").select_option("base")
    ask(page, "and now")
    assert page.locator(".answers.two .answer h3").all_text_contents()[1] == "base"
    assert page.locator(".answers.two .answer").nth(1).locator(".t").count() == 0
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "chat.json")
    turns = json.loads((tmp_path / "chat.json").read_text())["turns"]
    assert [len(turn["answers"]) for turn in turns] == [1, 1, 2]
    assert "alpha" in turns[2]["answers"][0]["settings"]["mute"]
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    assert problems == []
    page.context.close()


@needs_browser
def test_a_key_is_asked_for_and_a_stop_ends_the_answer(server: RunningServer, browser: Any) -> None:
    page, _ = open_page(browser, server.url)
    page.locator("#key").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("That key is wrong.").wait_for()
    page.locator("#key").fill("a-secret-key")
    page.keyboard.press("Enter")
    page.wait_for_selector("#adapters li")
    page.get_by_label("Longest answer in tokens").fill("100000")
    page.get_by_label("Message").fill("x" * 600)
    page.keyboard.press("Enter")
    page.wait_for_selector(".error")
    assert "maximum context length" in page.locator(".answer .error").text_content()
    server.wait_until_idle()
    page.context.close()


@needs_browser
def test_a_phone_in_the_dark(local: RunningServer, browser: Any) -> None:
    page, problems = open_page(browser, local.url, viewport={"width": 390, "height": 780}, color_scheme="dark", device_scale_factor=2)
    page.wait_for_selector("#adapters li", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.locator("aside").is_visible()
    page.get_by_role("button", name="Routing").click()
    page.get_by_label("Longest answer in tokens").fill("12")
    page.keyboard.press("Escape")
    assert not page.locator("aside").is_visible()
    ask(page, "hello")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert problems == []
    page.context.close()
