"""The report as a person sees it: a real Chromium opens it from the disk, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from rmt_lightning.report import main
from rmt_lightning.reporting.plots import COLORS

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
PLOTS = ("timeline_steps", "timeline_seconds", "val_accuracy", "loss", "lengths", "speed")
EVIL = "<img src=x onerror=alert(1)> <b>bold"


@pytest.fixture(scope="module")
def address(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report on three runs, one of them with a name that would like to be a program."""
    here = tmp_path_factory.mktemp("browser")
    for number, name in enumerate(("first", "second", EVIL)):
        shutil.copytree(finished_run, here / name)
        config = yaml.safe_load((here / name / "config.yaml").read_text())
        config["seed"] = number
        (here / name / "config.yaml").write_text(yaml.safe_dump(config))
    (here / "first/attention").mkdir()
    shutil.copy(finished_run / "curriculum.png", here / "first/attention/map.png")
    main([str(here), str(here / "absent"), "--output", str(here / "report.html")])
    return f"file://{here}/report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        pytest.skip("no browser is installed (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["light", "dark", "phone"])
def page(request: pytest.FixtureRequest, browser: sync_api.Browser, address: str) -> Iterator[sync_api.Page]:
    phone = request.param == "phone"
    context = browser.new_context(
        viewport={"width": 390, "height": 800} if phone else {"width": 1280, "height": 900},
        color_scheme="dark" if request.param == "dark" else "light",
        has_touch=phone,
        is_mobile=phone,
        offline=True,
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(address)
    for plot in PLOTS:
        page.wait_for_selector(f"#{plot} .main-svg")
    yield page
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    context.close()


def painted(page: sync_api.Page, selector: str, color: str) -> int:
    """How many pixels of an element have a color."""
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    with Image.open(BytesIO(page.locator(selector).screenshot())) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
    return int((abs(pixels - [red, green, blue]).max(axis=2) < 12).sum())


def test_the_page(page: sync_api.Page) -> None:
    # Nothing is wider than the screen; wide tables scroll by themselves.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    inside = "[...document.querySelectorAll('.plot')].every(plot => plot.offsetLeft + plot.offsetWidth < innerWidth)"
    assert page.evaluate(inside)
    assert page.locator("#runs tbody tr").count() == 3
    assert page.locator("#machines tbody tr").count() == 3
    assert [cell.strip() for cell in page.locator("#differences tbody tr").all_inner_texts()] == ["seed\t2\t0\t1"]
    assert page.locator(".left-out li").count() == 1

    for plot in PLOTS:
        shapes = ".barlayer .trace" if "timeline" in plot else ".scatterlayer .trace"
        assert page.locator(f"#{plot} {shapes}").count() == 3, plot
    # All of it is really painted: the bars in the colors of their runs, the curves (these lie upon each other) in one.
    for plot in PLOTS:
        for color in COLORS[:3] if "timeline" in plot else COLORS[2:3]:
            assert painted(page, f"#{plot}", color) > 50, f"{plot}: {color}"
    # A run's name is text, in tables and in plots.
    assert EVIL in page.locator("#runs").inner_text()
    assert EVIL in page.locator("#timeline_steps").inner_text().replace("\xa0", " ")
    assert page.locator("b:text('bold')").count() == 0

    # Its colors are those of the theme, and readable.
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    style = "getComputedStyle(document.querySelector('{}')).{}"
    paper, quiet = ("rgb(21, 24, 29)", "rgb(163, 171, 181)") if dark else ("rgb(255, 255, 255)", "rgb(91, 99, 109)")
    assert page.evaluate(style.format("body", "backgroundColor")) == paper
    assert page.evaluate(style.format("#loss .xtick text", "fill")) == quiet

    # A closed attention map opens to a picture.
    page.locator("summary", has_text="1 map").click()
    picture = page.locator("img[alt='Attention map of first: map']")
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100


def test_pointing_and_hiding(page: sync_api.Page) -> None:
    plot = page.locator("#val_accuracy")
    plot.scroll_into_view_if_needed()
    on_phone = page.evaluate("matchMedia('(pointer: coarse)').matches")
    mark = plot.locator(".scatterlayer .trace").nth(1).locator(".points path").nth(2).bounding_box()
    assert mark is not None
    x, y = mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2
    if on_phone:
        page.touchscreen.tap(x, y)
    else:
        page.mouse.move(x, y)
    page.wait_for_selector("#val_accuracy .hoverlayer .hovertext")
    told = plot.locator(".hoverlayer").text_content() or ""
    assert "step 9, stage 2" in told and "validation accuracy" in told

    # Where they are shown, they cover neither title, legend nor data.
    covered = """[...document.querySelectorAll(".plot > div")].filter((plot) => {
      const buttons = plot.querySelector(".modebar")?.getBoundingClientRect();
      const title = document.createRange();
      title.selectNodeContents(plot.previousElementSibling);
      return buttons && (buttons.bottom > plot.getBoundingClientRect().top + 1
        || title.getBoundingClientRect().right > buttons.left);
    }).map((plot) => plot.id)"""
    assert page.evaluate(covered) == []

    # Its buttons stay on this machine: none uploads the data.
    titles = page.evaluate("[...document.querySelectorAll('#val_accuracy .modebar-btn')].map(b => b.dataset.title)")
    assert on_phone == (titles == [])
    assert not any(word in title for title in titles for word in ("Share", "cloud", "Edit", "Plotly"))

    # A chip hides its run in all plots, and shows it again.
    chip = page.locator(".chips button").nth(1)
    for shown in (2, 3):
        chip.click()
        for name in PLOTS:
            shapes = ".barlayer .trace" if "timeline" in name else ".scatterlayer .trace"
            page.wait_for_function(f"document.querySelectorAll('#{name} {shapes}').length === {shown}")
        assert chip.get_attribute("aria-pressed") == ("true" if shown == 3 else "false")
        assert page.locator("#runs tr.off").count() == 3 - shown
