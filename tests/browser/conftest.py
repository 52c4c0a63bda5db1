"""Pages as people see them: in Debian's Chromium, without a window. `make browser` installs it.

Where it or playwright is absent, the tests skip with the reason. Pictures of the pages go to the folder
``$COMPRESS_SEARCH_SCREENSHOTS``, or else to pytest's temporary one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

BUNDLE_SECONDS = 1.8
"""Processor time of Plotly's bundle alone, on the machine that limits of processor time are meant for."""

READABILITY = Path(__file__).with_name("readability.js").read_text(encoding="utf-8")


class Visit:
    """One page that is open.

    Attributes:
        page: Playwright's page.
        faults: What went wrong on it: errors in its console, exceptions, what could not be loaded.
        loaded: The addresses of all that it has loaded.
    """

    def __init__(self, page, pictures):
        self.page, self._pictures = page, pictures
        self.faults, self.loaded = [], []
        page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("requestfailed", self._note_failure)
        page.on("request", lambda request: self.loaded.append(request.url))
        self._developer = page.context.new_cdp_session(page)
        self._developer.send("Performance.enable", {"timeDomain": "threadTicks"})

    def _note_failure(self, request):
        # What is still under way when another page is opened is given up.
        if request.failure != "net::ERR_ABORTED":
            self.faults.append(f"{request.url}: {request.failure}")

    def go(self, address):
        """Open an address."""
        self.page.goto(address)
        return self

    def picture(self, name, *, whole=True):
        """Keep a picture of the page."""
        self.page.screenshot(path=self._pictures / f"{name}.png", full_page=whole)

    def wait_for_figures(self, selector):
        """Go to every figure that the page has a place for, wait until it is drawn, and go back."""
        figures = self.page.locator(selector)
        figures.first.wait_for()
        for number in range(figures.count()):
            figures.nth(number).scroll_into_view_if_needed()
            self.wait_for_figure(selector, number)
        self.page.evaluate("scrollTo(0, 0)")
        return self

    def wait_for_figure(self, selector, number=0):
        """Wait until one figure is drawn."""
        drawn = "([at, number]) => document.querySelectorAll(at)[number]?._fullLayout?._size !== undefined"
        self.page.wait_for_function(drawn, arg=[selector, number])
        return self

    def drawn_figures(self):
        """How many figures are drawn."""
        return self.page.evaluate(
            """[...document.querySelectorAll(".js-plotly-plot")].filter(
                (figure) => figure._fullLayout?._size !== undefined).length"""
        )

    def look(self, *, scheme, width):
        """Change the colours that the reader likes, and the width of the window."""
        self.page.emulate_media(color_scheme=scheme)
        self.page.set_viewport_size({"width": width, "height": 900})
        # Plotly waits a tenth of a second before it draws again; then it takes what the machine lets it have.
        self.page.wait_for_timeout(500)
        self.page.wait_for_function("""() => {
            const width = (part) => part.getBoundingClientRect().width;
            return [...document.querySelectorAll(".js-plotly-plot")].every((figure) =>
                [...figure.querySelectorAll(".main-svg")].every((part) => width(part) <= width(figure) + 1));
        }""")

    def figure(self, selector):
        """Return a figure's traces as plotly has them: of each its fields that matter here."""
        script = """(figure) => figure.data.map(({ name, x, y, text, xaxis, marker }) => ({
            name, x: [...(x ?? [])], y: [...(y ?? [])], text, xaxis,
            symbol: marker?.symbol, colour: marker?.color,
        }))"""
        return self.page.eval_on_selector(selector, script)

    def hover(self, selector, *, x, y, axis=""):
        """Put the mouse on a point of a figure, given in its numbers; return the lines that it then says."""
        script = """(figure, [x, y, axis]) => {
            const {[`xaxis${axis}`]: across, [`yaxis${axis}`]: down} = figure._fullLayout;
            const box = figure.getBoundingClientRect();
            return [box.x + across._offset + across.l2p(x), box.y + down._offset + down.l2p(y)];
        }"""
        self.page.locator(selector).scroll_into_view_if_needed()
        across, down = self.page.eval_on_selector(selector, script, [x, y, axis])
        # Plotly hears of the mouse when it moves.
        self.page.mouse.move(across + 30, down + 30)
        self.page.mouse.move(across, down, steps=3)
        label = self.page.locator(f"{selector} .hoverlayer .hovertext")
        label.first.wait_for()
        lines = label.first.locator("css=text > tspan, text:not(:has(tspan))")
        return lines.all_text_contents()

    def busy_seconds(self):
        """Processor time of the page's thread since it was opened: what opening takes on an idle machine."""
        metrics = self._developer.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def overflow(self):
        """How many pixels the page is wider than its window."""
        return self.page.evaluate(
            "document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"
        )

    def hard_to_read(self, least, within="body"):
        """The texts of a part of the page whose contrast is less than that, with it and their colour."""
        texts = self.page.evaluate(READABILITY, within)
        assert len(texts) > 20
        return {(t["text"], round(t["contrast"], 2), t["colour"]) for t in texts if t["contrast"] < least}


@pytest.fixture(scope="module")
def chromium():
    """Return the browser."""
    # Not for the whole session: while playwright is there, asyncio takes its loop for one that runs.
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make browser")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium here: make browser")
    # Chromium refuses its sandbox to root.
    alone = ["--no-sandbox"] if os.getuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=alone)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Return the folder of the pictures."""
    given = os.environ.get("COMPRESS_SEARCH_SCREENSHOTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def visit(chromium, pictures):
    """Open pages; in the end they are closed, and must have had no faults."""
    contexts, visits = [], []

    def make(address, *, width=1200, scheme="light"):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        visits.append(Visit(contexts[-1].new_page(), pictures))
        return visits[-1].go(address)

    yield make
    for context in contexts:
        context.close()
    assert [fault for visit in visits for fault in visit.faults] == []


@pytest.fixture(scope="module")
def slowness(visit, tmp_path_factory):
    """Return by how much this machine is slower than the one that limits of processor time are meant for."""
    file = tmp_path_factory.mktemp("bundle") / "bundle.html"
    file.write_text(f"<!doctype html><meta charset=utf-8><title>x</title><script>{get_plotlyjs()}</script>")
    # The lesser of two: what else the machine does slows the processor down.
    seconds = min(visit(file.as_uri()).busy_seconds() for _ in range(2))
    print(f"Plotly's bundle alone takes {seconds:.2f} s of processor time")
    return max(1.0, seconds / BUNDLE_SECONDS)


@pytest.fixture(scope="session")
def big_study(synthetic_study, tmp_path_factory):
    """A study of five hundred trials."""
    return synthetic_study(tmp_path_factory.mktemp("big"), trials=500)
