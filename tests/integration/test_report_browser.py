"""The report in a real browser: it shows, needs nothing from outside, fits a phone and follows the dark setting."""

import html
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from fakes import fake_evaluation as made_up

from udrl.evaluate.report import write_report as report
from udrl.run import EvaluationPaths

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: apt-get install chromium")
DARK = "--blink-settings=preferredColorScheme=0"

# Says how wide the page and everything in it is; a box that scrolls inside itself may hold what is wider.
MEASURE = """<script>addEventListener('load', () => {
  const scrolls = e => e && (['auto', 'hidden'].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const wide = [...document.body.querySelectorAll('*')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e.parentElement)).map(e => e.tagName);
  const boxes = [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length;
  parent.postMessage([innerWidth, document.documentElement.scrollWidth, boxes, ...wide].join(' '), '*');
});</script>"""
PHONE = """<!doctype html><p id="found"></p><script>addEventListener('message', m => { found.textContent = m.data; });</script>
<iframe src="copy.html" style="width: 390px; height: 800px; border: 0"></iframe>"""


@pytest.fixture(scope="module", params=["full", "bare"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "full":
        report.write_report(EvaluationPaths(str(folder)), made_up.outputs(), made_up.document())
    else:
        report.write_report(
            EvaluationPaths(str(folder)), made_up.table(made_up.row(), made_up.row(variation=1)), made_up.bare()
        )
    return folder / "report.html"


def browse(page: Path, *options: str) -> tuple[str, list[str]]:
    """What the browser prints for the page, and the errors on its console."""
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
    fixed += [f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    done = subprocess.run(
        [str(CHROMIUM), *fixed, *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=page.parent,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def shot(page: Path, *options: str) -> np.ndarray:
    """The page's pixels, shape (height, width, 3), 0..1."""
    from matplotlib.image import imread

    file = page.parent / "shot.png"
    browse(page, f"--screenshot={file}", "--window-size=1200,2600", *options)
    return np.asarray(imread(io.BytesIO(file.read_bytes()))[..., :3])


def test_the_headline_stands_and_the_console_is_quiet(page: Path) -> None:
    dom, errors = browse(page, "--dump-dom")
    assert errors == []
    told = html.unescape(re.sub(r"<[^>]+>", "", dom))
    assert "Is the claim met?" in told
    assert "Appendix" in told
    assert dom.count("<img ") == len(list(page.parent.glob("*.png")))


def test_a_page_that_would_load_from_outside_is_stopped_and_says_so(page: Path) -> None:
    """That the console is quiet above means nothing unless it speaks here."""
    other = page.with_name("loads.html")
    other.write_text(page.read_text().replace("</main>", '<img src="http://127.0.0.1:9/x.png"><script>1</script></main>'))
    _, errors = browse(other, "--dump-dom")
    assert any("Content Security Policy" in line and "x.png" in line for line in errors)
    assert any("Content Security Policy" in line and "script" in line for line in errors)


def test_nothing_is_wider_than_a_phone_but_inside_boxes_that_scroll(page: Path) -> None:
    text = page.read_text()
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    page.with_name("copy.html").write_text(without_policy.replace("</head>", MEASURE + "</head>"))
    frame = page.with_name("phone.html")
    frame.write_text(PHONE)
    dom, _ = browse(frame, "--dump-dom")
    found = re.search(r'<p id="found">([^<]*)</p>', dom)
    assert found is not None
    width, content, boxes, *wide = found[1].split()
    assert (width, content, wide) == ("390", "390", [])
    assert int(boxes) >= 1  # there was something to scroll


def test_the_page_is_light_or_dark_as_the_reader_likes_and_plots_stay_on_white(page: Path) -> None:
    light, dark = shot(page), shot(page, DARK)
    assert light[2, 2].min() > 0.9
    assert dark[2, 2].max() < 0.2
    if "<img " in page.read_text():
        assert (dark.min(axis=-1) > 0.99).mean() > 0.1  # the cards of the plots
    assert len(np.unique(light.mean(axis=-1).round(2))) > 20
