"""The page in a real browser: opened from disk without a network, looked around in, on a desk and on a phone."""

import csv
import json
import shutil
import statistics
from contextlib import contextmanager

import pytest

from pipeline.report import write_report
from tests.small_run import made_run

pytestmark = pytest.mark.slow

HOSTILE = (
    "</script><script>window.broken=1</script>",
    "\"quoted\" & 'so'",
    "<!--<b>",
    "猫 é",
    "long " * 40,
    "<img src=x>",
)
NAMES = (*HOSTILE, *(f"class {i}" for i in range(6, 30)))
COUNTS = (160, 140, 120, *range(100, 81, -1), 18, 15, 12, 10, 8, 6, 5, 4)


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium to look at the page with; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / '<i>"run" &amp;'
    return made_run(folder, names=NAMES, counts=COUNTS)


@pytest.fixture(scope="module")
def report(run):
    return write_report(run)


@contextmanager
def opened(browser, report, *, width=1280, **context):
    """The page with every chart drawn; fails on anything in the console and on any request but for the file itself."""
    page = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **context).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url))
    page.goto(report.path.resolve().as_uri())
    if context.get("java_script_enabled", True):
        for place in page.locator(".chart").all():
            place.locator("xpath=ancestor::section").scroll_into_view_if_needed()
            place.locator(".main-svg").first.wait_for(timeout=30_000)
    yield page
    page.context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def page(browser, report):
    """On a desk, shared by tests that look at different parts of it."""
    with opened(browser, report) as page:
        yield page


def numbers_of(run, split, lam, column):
    rows = json.loads((run / "rebalance" / "results.json").read_text())["results"]
    return [r[column] for r in rows if (r["method"], r["lam"], r["split"]) == ("iwb", lam, split)]


def test_the_slider_shows_what_was_measured_at_every_lambda(page, run):
    selected = json.loads((run / "rebalance" / "results.json").read_text())["selected"]
    box = page.locator(".explorer")
    slider = box.locator("input[type=range]")
    assert box.locator("output").text_content() == f"λ = {selected['lam']:g} (chosen)"
    assert "selects nothing" in box.locator(".note").text_content()
    seen = set()
    slider.focus()
    page.keyboard.press("Home")
    for position, lam in enumerate((0.0, 0.05, 0.1, 1.0)):
        if position:
            page.keyboard.press("ArrowRight")
        for split in ("val", "test"):
            box.locator(f"input[value={split}]").check()
            for column in ("all", "many", "medium", "few"):
                values = [round(statistics.fmean(numbers_of(run, split, lam, column)), 4)]
                shown = box.locator(f"[data-group={column}] b").text_content()
                assert shown.startswith(f"{values[0]:.1f} %"), (lam, split, column)
                seen.add((column, shown))
            bars = "e => [e.data.length, e.data.at(-1).y, e.data.at(-1).name]"
            kinds, heights, name = box.locator(".chart").evaluate(bars)
            expected = [statistics.fmean(numbers_of(run, split, lam, c)) for c in ("all", "many", "medium", "few")]
            assert heights == pytest.approx(expected, abs=1e-4)
            assert (kinds, name) == (4, f"slider, λ = {lam:g}")
        assert slider.get_attribute("aria-valuetext").startswith(f"λ = {lam:g}")
        slider.focus()
    assert len(seen) > 8  # the numbers do move
    box.get_by_text("back to").click()
    assert box.locator("output").text_content() == f"λ = {selected['lam']:g} (chosen)"


def column_of(page, number):
    cells = page.locator(f".classes tbody tr > :nth-child({number})").all_text_contents()
    return [float(c.replace("−", "-").replace(",", "")) if number not in (1, 3) else c for c in cells]


def test_classes_are_sorted_filtered_and_leafed_through(page):
    heads = page.locator(".classes thead button")
    assert column_of(page, 2) == sorted(COUNTS, reverse=True)[:20]
    for number, ascending in ((7, False), (7, True), (2, False), (1, True), (5, False), (6, False)):
        heads.nth(number - 1).click()
        shown = column_of(page, number)
        assert shown == sorted(shown, reverse=not ascending) or number == 1
        sort = page.locator(".classes th[aria-sort]:not([aria-sort=none])")
        assert sort.get_attribute("aria-sort") == ("ascending" if ascending else "descending")
    first = column_of(page, 1)
    assert len(first) == 20
    page.locator(".pager").get_by_text("next").click()
    second = column_of(page, 1)
    assert {*first, *second} == {*NAMES}
    assert len(second) == 10
    page.locator(".classes input").fill("SCRIPT")
    assert column_of(page, 1) == [HOSTILE[0]]
    assert page.locator(".found").text_content() == "1 of 30 classes"
    page.locator(".classes input").fill("")
    page.locator(".classes select").select_option("few")
    assert set(column_of(page, 3)) == {"few"}
    assert len(column_of(page, 3)) == sum(c < 20 for c in COUNTS)


def test_class_charts_tell_of_the_class_and_show_the_numbers_of_the_csv(page, report):
    change = next(f for f in report.figures if f.stem == "class-change").with_suffix(".csv").read_text(encoding="utf-8")
    place = page.locator("[data-chart^=chart-class-change]")
    up, down, text = place.evaluate("e => [e.data[0].y, e.data[1].y, e.data[0].text]")
    shown = [a if a is not None else b for a, b in zip(up, down, strict=True)]
    rows = list(csv.DictReader(change.splitlines()))
    assert shown == [pytest.approx(float(row["change"])) for row in rows]
    assert all(f"{int(row['images'])} training images" in told for row, told in zip(rows, text, strict=True))
    place.scroll_into_view_if_needed()
    bar = place.locator(".bars .point").first.bounding_box()
    page.mouse.move(bar["x"] + bar["width"] / 2, bar["y"] + bar["height"] / 2)
    page.locator(".hoverlayer .hovertext").first.wait_for()
    assert "training images" in page.locator(".hoverlayer .hovertext").first.text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser, report, scheme):
    with opened(browser, report, width=390, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        ink, back = page.evaluate("['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k])")
        brightness = [sum(map(int, c[4:-1].split(","))) for c in (ink, back)]
        assert (brightness[0] > brightness[1]) == (scheme == "dark")


def test_without_javascript_every_figure_is_a_picture(browser, report):
    with opened(browser, report, java_script_enabled=False) as page:
        pictures = page.locator("figure img")
        assert pictures.count() == len(report.figures)
        for picture in pictures.all():
            assert picture.bounding_box()["height"] > 100
        assert not any(place.is_visible() for place in page.locator(".chart, .explorer, .classes").all())
        assert page.get_by_text("needs JavaScript").is_visible()


def test_with_javascript_charts_take_the_place_of_pictures_but_not_on_paper(page):
    assert not any(picture.is_visible() for picture in page.locator("figure img").all())
    page.emulate_media(media="print")
    assert all(picture.is_visible() for picture in page.locator("figure img").all())
    assert not any(place.is_visible() for place in page.locator(".chart").all())
    page.emulate_media(media="screen")


def test_hostile_names_stay_text(page, run):
    assert page.evaluate("window.broken") is None
    assert page.get_by_label("Share chart").count() == 0  # no button that sends it anywhere
    assert page.locator("h1").text_content() == run.name
    assert page.locator("h1 *, main i, main b:not(.tile b), svg img, main img[src=x]").count() == 0


def test_several_runs_stand_side_by_side(browser, run, tmp_path):
    other = made_run(tmp_path / "other", names=NAMES, counts=COUNTS, seed=1)
    report = write_report([run, other], out=tmp_path / "out")
    assert [row["run"] for row in report.rows] == [run.name, "other"]
    with opened(browser, report) as page:
        assert page.locator(".explorer:visible").count() == 2
        first = page.locator("#part-0 table").first.locator("tbody tr")
        assert first.count() == 4
        assert first.nth(0).locator("th").text_content() == run.name
        text = page.locator("#part-0 [data-chart^=chart-class-difference]").evaluate("e => e.data[0].y")
        assert len(text) == 30
        curves = page.locator("#part-0 [data-chart^=chart-accuracy-lambda]").evaluate("e => e.data.map(t => t.name)")
        assert "other" in curves
    with opened(browser, report, width=390) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
