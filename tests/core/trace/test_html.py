"""The HTML page: self-contained, escaped, and interactive in a real browser."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch

from meteora_core.trace.html import WIDEST, to_html
from meteora_core.trace.picture import RoutePicture
from support.browser import Browser, Page, find_chromium
from support.route_pictures import make_picture

NASTY = '</script><script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">'


@pytest.fixture
def picture() -> RoutePicture:
    return make_picture(["Is", " it", NASTY, "\n", "", "\x1b[2J", " Yes", " 日本"])


def test_the_page_holds_the_text_and_nothing_else_runs(picture) -> None:
    page = Page(to_html(picture, "A <title> & more"))
    tokens = page.find("span", class_="t")
    assert len(tokens) == len(picture.tokens)
    for index, token in zip(tokens, picture.tokens, strict=True):
        assert page.elements[index][1]["data-text"] == token.text
    assert page.text[tokens[2]] == NASTY
    assert [page.text.get(index, "") for index in tokens[3:6]] == ["⏎\n", "·", "⟨1b⟩[2J"]
    assert page.text[page.find("h1")[0]] == "A <title> & more"
    assert len(page.find("script")) == 2
    assert page.find("img") == []
    assert page.find("i") == []


def test_no_address_stands_in_the_page(picture) -> None:
    source = to_html(picture)
    assert not re.search(r"(?:https?|wss?|ftp)://", source)
    page = Page(source)
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
    policy = page.elements[page.find("meta", **{"http-equiv": "Content-Security-Policy"})[0]][1]["content"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def test_the_plain_page_has_colours_titles_and_maps(picture) -> None:
    page = Page(to_html(picture))
    who, shares = picture.speakers().tolist(), picture.shares()
    for position, index in enumerate(page.find("span", class_="t")):
        attributes = page.elements[index][1]
        assert f"a{who[position]}" in attributes["class"].split()
        assert attributes["style"] == f"--w:{float(shares[position, who[position]]):.3f}"
        assert picture.names[who[position]] in attributes["title"]
    cells = [attributes for tag, attributes in page.elements if tag == "rect" and "data-a" in attributes]
    assert len(cells) == len(picture.tokens) * 3
    opacities = [float(cell["style"].partition(":")[2]) for cell in cells]
    np.testing.assert_allclose(opacities, shares.t().flatten().numpy(), atol=6e-4)
    rows = [attributes for tag, attributes in page.elements if tag == "rect" and "data-row" in attributes]
    assert len(rows) == (4 + 2) * 3


def test_the_data_is_complete(picture) -> None:
    page = Page(to_html(picture))
    data = json.loads(page.text[page.find("script", id="data")[0]])
    assert data["shape"] == [8, 8, 2]
    indices = np.frombuffer(base64.b64decode(data["indices"]), "u1").reshape(8, 8, 2)
    assert (indices == picture.indices.numpy()).all()
    weights = np.frombuffer(base64.b64decode(data["weights"]), "u1").reshape(8, 8, 2) / 255
    np.testing.assert_allclose(weights, picture.weights.numpy(), atol=0.0021)
    assert data["layers"] == [0, 1, 2, 3]


def test_many_adapters_and_long_texts() -> None:
    page = Page(to_html(make_picture(["x"] * (WIDEST * 2 + 1), adapters=30)))
    cells = [attributes for tag, attributes in page.elements if tag == "rect" and "data-a" in attributes]
    assert {cell["data-a"] for cell in cells} == {str(index) for index in range(30)}
    assert max(int(cell["data-to"]) for cell in cells) == WIDEST * 2 + 1
    assert len(cells) <= 30 * WIDEST
    wide = Page(to_html(make_picture(["x"] * 3, adapters=300)))
    data = json.loads(wide.text[wide.find("script", id="data")[0]])
    assert data["wide"]
    assert len(base64.b64decode(data["indices"])) == 2 * 3 * 8 * 2


def test_a_text_of_one_token() -> None:
    page = Page(to_html(make_picture(["x"], answers=0, adapters=1)))
    assert len(page.find("span", class_="t")) == 1


@pytest.mark.slow
def test_in_a_browser(picture, tmp_path) -> None:
    """Tooltips, slider and kinds work, nothing is fetched and no foreign script runs. Without Chromium, only the contents of the page are checked."""
    path = tmp_path / "page.html"
    path.write_text(to_html(picture, "A page"), encoding="utf-8")
    executable = find_chromium()
    if executable is None:
        page = Page(path.read_text(encoding="utf-8"))
        assert page.elements[page.find("input", id="layer")[0]][1]["max"] == "4"
        assert [attributes.get("value") for tag, attributes in page.elements if tag == "option"] == ["", "q", "up"]
        return
    browser = Browser(executable)
    try:
        browser.open(path)
        _check_page(browser, picture)
        assert browser.errors == []
        assert all(url.startswith("file:") for url in browser.requests)
    finally:
        browser.close()


def _check_page(browser: Browser, picture: RoutePicture) -> None:
    assert browser.js("document.title") == "A page"
    assert browser.js("document.scripts.length") == 2
    assert browser.js("document.body.classList.contains('js')")
    assert browser.js("document.querySelectorAll('.t')[2].textContent") == NASTY
    assert browser.js("getComputedStyle(document.querySelector('#tip')).display") == "none"

    who, shares = picture.speakers().tolist(), picture.shares()
    browser.hover(f'.t[data-t="{6}"]')
    assert browser.js("getComputedStyle(document.querySelector('#tip')).display") == "block"
    tip = browser.js("document.querySelector('#tip').textContent")
    assert '" Yes"' in tip
    assert "answer token 6" in tip
    cells = browser.js("[...document.querySelectorAll('#tip tr')].map(r => [...r.cells].map(c => c.textContent))")
    order = torch.argsort(shares[6], descending=True).tolist()
    assert [cell[0] for cell in cells[1:]] == [picture.names[index] for index in order if float(shares[6, index]) > 0.0005]
    assert float(cells[1][1].split()[0]) == pytest.approx(100 * float(shares[6, order[0]]), abs=1)
    browser.hover("h1")
    assert browser.js("getComputedStyle(document.querySelector('#tip')).display") == "none"

    def colours() -> list[str]:
        return browser.js("[...document.querySelectorAll('.t')].map(t => t.className.match(/\\ba(\\d+)/)[1])")

    assert colours() == [str(index) for index in who]
    browser.js("document.querySelector('#layer').focus()")
    browser.press("ArrowRight", 39)
    browser.press("ArrowRight", 39)
    assert browser.js("document.querySelector('#where').textContent") == "layer 1 of 4"
    layer = picture.select(layer=1)
    assert colours() == [str(index) for index in picture.speakers(layer).tolist()]
    opacity = float(browser.js("document.querySelectorAll('#token-map rect[data-a=\"0\"]')[5].style.fillOpacity"))
    assert opacity == pytest.approx(float(picture.shares(layer)[5, 0]), abs=0.004)
    assert browser.js("document.querySelector('#layer-now').getAttribute('visibility')") == "visible"
    browser.js("(() => { const k = document.querySelector('#kind'); k.value = 'up'; k.dispatchEvent(new Event('input')); })()")
    assert colours() == [str(index) for index in picture.speakers(picture.select(layer=1, kind="up")).tolist()]
    browser.js("(() => { const s = document.querySelector('#layer'); s.value = 0; s.dispatchEvent(new Event('input')); })()")
    browser.js("(() => { const k = document.querySelector('#kind'); k.value = ''; k.dispatchEvent(new Event('input')); })()")
    assert colours() == [str(index) for index in who]

    light = browser.screenshot()
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
    assert browser.js("getComputedStyle(document.querySelector('.t')).color") == "rgb(255, 255, 255)"
    dark = browser.screenshot()
    assert light.startswith(b"\x89PNG")
    assert light != dark
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    assert browser.js("document.documentElement.scrollWidth") <= 390
