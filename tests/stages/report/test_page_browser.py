"""The pages in a real Chromium: what a reader does with them, and what an accessibility audit says of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page
from support.report_builders import (
    HOSTILE,
    QUALITY,
    audit,
    quadruple,
    repeated,
    report_data,
    sample,
    samples,
    stage,
    steps,
)

from cgd_stages.report.page import render, render_comparison
from cgd_stages.results.comparison import joined, table_of
from cgd_stages.results.model import Quadruples, Rejected, ReportData, Sample

pytestmark = pytest.mark.slow

ROWS = (
    quadruple("a0", answer="two and two is five", refinement="two and two is exactly four", draft_right=False,
              refinement_right=True, verdict="wrong", tokens={"answer": 5, "critique": 9, "refinement": 6}),
    quadruple("a1", answer="It is 4.", refinement="It is 9.", critique="Well done.", draft_right=True,
              refinement_right=False, verdict="missing", tokens={"answer": 50, "critique": 2, "refinement": 3}),
    quadruple("a2", prompt="What is a ZEBRA?", reference="", verdict="right",
              tokens={"answer": 7, "critique": 70, "refinement": 7}),
    quadruple("a3", prompt=HOSTILE, answer=HOSTILE, critique=HOSTILE, refinement=HOSTILE, verdict="wrong"),
)  # fmt: skip
REJECTED = (Rejected(id="ff", sample=0, stage="answer", reason="truncated", detail="cut at 128", prompt="Too long?"),)


def several() -> ReportData:
    """A run with three objectives, two benchmarks, validation, and every kind of row."""
    log = tuple(step.model_copy(update={"validation_loss": step.loss + 0.1}) for step in steps(40))
    both = tuple(step.model_copy(update={"bare_validation_loss": step.loss + 0.3}) for step in log)
    names = ("sft", "cft", "cgd")
    told = {"exported_step": 40.0, "train_examples": 7.0, "validation_examples": 2.0}
    trained = {"facts": {"metrics": told}, "inputs": {"training": {"validation": {"select": "best"}}}}
    stages = (stage("prepare", 0, 10), stage("answer", 10, 60))
    outputs = {
        model: samples(marks) + samples(marks[::-1], benchmark="products")
        for model, marks in {"base": "+" + "-" * 8, "sft": "-" * 9, "cft": "++" + "-" * 7, "cgd": "+" * 9}.items()
    }
    return report_data(
        stages=(*stages, *(stage(f"train-{name}", 60, 90, **trained) for name in names)),
        training={f"train-{name}": log if name == "sft" else both for name in names},
        evaluations=outputs,
        quadruples=Quadruples(total=1000, verdicts={"wrong": 1000}, shown=ROWS),
        rejected=REJECTED,
    )


def tried() -> ReportData:
    """A run whose models answered each of three questions four times, the trained one in half the tokens."""

    def outputs(tokens: int, *marks: str) -> tuple[Sample, ...]:
        return tuple(
            sample(f"q{question}", sample=number, correct=mark == "+", tokens=tokens)
            for question, tries in enumerate(marks)
            for number, mark in enumerate(tries)
        )

    return report_data(
        evaluations={"base": outputs(400, "+---", "----", "-+--"), "cgd": outputs(200, "++--", "+---", "++++")}
    )


def compared() -> str:
    def corrupted(rate: float) -> ReportData:
        critique = {"critique": {"kind": "corrupted", "rate": rate}}
        return report_data(stages=(stage("train-cgd", inputs=critique),))

    runs = {"clean": table_of(report_data()), "a-third": table_of(corrupted(0.3)), "all": table_of(corrupted(1.0))}
    wrong = {"critique": {"kind": "miscritique", "rate": 0.3, "target": "refined"}}
    runs["misled"] = table_of(report_data(stages=(stage("train-cgd", inputs=wrong),)))
    return render_comparison(joined(runs))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of the pages, on disk as a reader has them."""
    folder = tmp_path_factory.mktemp("pages")
    nothing = Quadruples(total=0, verdicts={}, shown=())
    thoughtful = quadruple("a0", answer_thinking="A hippopotamus.", refinement_thinking="Two and two.")
    drawn = Quadruples(total=2, verdicts={"wrong": 2}, shown=(thoughtful, quadruple("a0", sample=1)))
    reports = {
        "thoughts": report_data(quadruples=drawn),
        "one": report_data(),
        "published": repeated(),
        "audit": report_data(audit=audit(output="\\frac{1}{2}" * 30)),
        "tries": tried(),
        "rejected": report_data(quadruples=nothing, rejected=REJECTED, training={}, evaluations={}, changes=()),
        "long": report_data(evaluations={name: samples("+-") for name in ("base", "cgd", "own_name" * 15)}),
    }
    files = {"report": render(several(), QUALITY), "compare": compared()}
    files |= {name: render(data) for name, data in reports.items()}
    for name, html in files.items():
        (folder / f"{name}.html").write_text(html)
    return {name: (folder / f"{name}.html").as_uri() for name in files}


class Visit:
    """A page in a window of its own, and everything that it should not do: errors, dialogs, requests."""

    def __init__(self, browser: Browser, address: str, *, width: int = 1440, scheme: Any = "light") -> None:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page: Page = context.new_page()
        self.faults: list[str] = []
        self.page.on("console", lambda said: self.faults.append(said.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.faults.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda asked: self._asked(asked.url, address))
        self.page.goto(address)

    def _asked(self, url: str, address: str) -> None:
        if not url.startswith(("data:", address)):
            self.faults.append(f"request to {url}")

    def close(self) -> None:
        self.page.context.close()

    @property
    def row(self) -> str:
        return self.page.locator("#row").inner_text()

    @property
    def position(self) -> str:
        return self.page.locator("#position").inner_text()


@pytest.fixture
def visit(browser: Browser, pages: dict[str, str]) -> Iterator[Visit]:
    """The report of a run with several objectives. Whatever a test does with it, it does nothing wrong."""
    visit = Visit(browser, pages["report"])
    yield visit
    assert visit.faults == []
    visit.close()


def test_a_thought_is_folded_until_a_search_finds_it(browser: Browser, pages: dict[str, str]) -> None:
    visit = Visit(browser, pages["thoughts"])
    assert "a0 / 0" in visit.row
    thoughts = visit.page.locator("#row details.thought")
    assert thoughts.evaluate_all("all => all.map((one) => one.open)") == [False, False]
    assert "hippopotamus" not in visit.row
    visit.page.fill("#search", "hippo")
    assert visit.position == "1 of 1"
    assert thoughts.evaluate_all("all => all.map((one) => one.open)") == [True, False]
    assert visit.page.locator("#row mark").all_inner_texts() == ["hippo"]
    visit.page.fill("#search", "")
    visit.page.click("#next")
    assert "a0 / 1" in visit.row
    assert visit.page.locator("#row details.thought").count() == 0
    assert visit.faults == []
    visit.close()


def test_every_word_is_searched_and_marked(visit: Visit) -> None:
    assert visit.position == "1 of 4"
    visit.page.fill("#search", "zebra")
    assert visit.position == "1 of 1"
    assert visit.page.locator("#row mark").all_inner_texts() == ["ZEBRA"]
    visit.page.fill("#search", "no such words")
    assert visit.row == "No row matches."
    assert visit.position == "none"


FILTERS = {
    "all": ["a0", "a1", "a2", "a3"],
    "draft-wrong": ["a0", "a3"],
    "draft-right": ["a1", "a2"],
    "mended": ["a0"],
    "broken": ["a1"],
    "refinement-wrong": ["a1"],
    "misjudged": [],
    "verdict-right": ["a2"],
    "verdict-wrong": ["a0", "a3"],
    "verdict-missing": ["a1"],
    "rejected": ["ff"],
}


def test_a_filter_shows_its_rows_and_no_others(visit: Visit) -> None:
    offered = visit.page.eval_on_selector_all("#choice option", "(all) => all.map((one) => one.value)")
    assert offered == list(FILTERS)
    for choice, ids in FILTERS.items():
        visit.page.select_option("#choice", choice)
        found = []
        for _ in ids:
            found.append(visit.page.locator("#row h3 small").first.inner_text())
            visit.page.click("#next")
        assert found == ids
        assert visit.position == (f"1 of {len(ids)}" if ids else "none")


def test_the_longest_come_first(visit: Visit) -> None:
    visit.page.select_option("#order", "critique")
    assert "a2" in visit.row
    visit.page.select_option("#order", "answer")
    assert "a1" in visit.row


def test_what_the_refinement_changed_is_marked_word_by_word(visit: Visit) -> None:
    assert visit.page.locator("#row del").all_inner_texts() == ["five"]
    assert visit.page.locator("#row ins").all_inner_texts() == ["exactly four"]
    assert "two and two is five" in visit.row
    assert "67 % of its words kept" in visit.row
    visit.page.uncheck("#changed")
    assert visit.page.locator("#row del, #row ins").count() == 0
    assert "two and two is exactly four" in visit.row


def test_a_rejected_row_says_where_and_why(visit: Visit) -> None:
    visit.page.select_option("#choice", "rejected")
    for text in ("Too long?", "Rejected in answer", "truncated", "cut at 128"):
        assert text in visit.row


def test_the_browser_is_used_with_the_keyboard_alone(visit: Visit) -> None:
    keys = visit.page.keyboard
    keys.press("ArrowRight")
    assert visit.position == "2 of 4"
    keys.press("ArrowLeft")
    keys.press("ArrowLeft")
    assert visit.position == "4 of 4"
    keys.press("/")
    keys.type("zebra")
    assert visit.page.input_value("#search") == "zebra"
    assert visit.position == "1 of 1"
    keys.press("Escape")
    assert visit.page.input_value("#search") == ""
    keys.press("ArrowDown")
    assert visit.position == "2 of 4"
    keys.press("Escape")
    keys.press("ArrowRight")
    assert visit.position == "3 of 4"


def test_no_plot_is_empty_and_a_curve_tells_its_values(visit: Visit) -> None:
    lines = visit.page.locator(".plot path.line")
    # Loss, its moving mean and validation share a chart, and CGD and CFT have a second validation; gradient norm and
    # learning rate have a chart each.
    assert lines.count() == 3 * 5 + 2
    for line in lines.all():
        box = line.bounding_box()
        assert box is not None
        assert box["width"] > 100
    assert visit.page.locator(".plot i.exported").count() == 3 + 2
    assert all(
        box is not None and box["width"] > 0 for box in (bar.bounding_box() for bar in visit.page.locator("rect").all())
    )
    chart = visit.page.locator(".chart").first
    chart.focus()
    chart.press("ArrowRight")
    assert visit.page.locator(".tip").first.inner_text().startswith("step 1 · loss 2.0000")


def test_where_every_row_was_rejected_these_are_shown_first(browser: Browser, pages: dict[str, str]) -> None:
    visit = Visit(browser, pages["rejected"])
    assert visit.position == "1 of 1"
    assert visit.page.input_value("#choice") == "rejected"
    assert "Rejected in answer" in visit.row
    assert visit.faults == []
    visit.close()


def test_on_a_telephone_a_long_name_leaves_room_for_its_figures(browser: Browser, pages: dict[str, str]) -> None:
    visit = Visit(browser, pages["long"], width=390)
    boxes = [name.bounding_box() for name in visit.page.locator(".compared tbody th").all()]
    assert max(box["width"] for box in boxes if box is not None) < 390 / 2
    visit.close()


def test_paper_is_light_whole_and_without_folds(visit: Visit) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    folds = "[...document.querySelectorAll('details')].map((fold) => fold.open)"
    visit.page.click("#theme")
    before = visit.page.evaluate(folds)
    visit.page.set_viewport_size({"width": 718, "height": 900})  # A4 without its margins
    visit.page.emulate_media(media="print")
    visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert visit.page.evaluate(colour) == "rgb(255, 255, 255)"
    assert visit.page.evaluate("getComputedStyle(document.body).color") == "rgb(31, 36, 40)"
    assert all(visit.page.evaluate(folds))
    widths = "[...document.querySelectorAll('table')].map((table) => table.getBoundingClientRect().right)"
    assert max(visit.page.evaluate(widths)) <= 718
    visit.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert visit.page.evaluate(folds) == before


def test_the_button_turns_light_into_dark_and_back(visit: Visit) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light = visit.page.evaluate(colour)
    visit.page.click("#theme")
    assert visit.page.evaluate(colour) != light
    visit.page.click("#theme")
    assert visit.page.evaluate(colour) == light


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        ("report", 1440, "light"),
        ("report", 390, "dark"),
        ("one", 390, "light"),
        ("tries", 390, "dark"),
        ("published", 390, "light"),
        ("published", 1440, "dark"),
        ("audit", 390, "light"),
        ("audit", 1440, "dark"),
        ("rejected", 1440, "light"),
        ("long", 390, "light"),
        ("compare", 1440, "dark"),
    ],
)
def test_a_page_fits_its_window_and_passes_the_accessibility_audit(
    browser: Browser, pages: dict[str, str], name: str, width: int, scheme: str
) -> None:
    visit = Visit(browser, pages[name], width=width, scheme=scheme)
    visit.page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(visit.page).response["violations"]
    assert [f"{one['id']}: {node['html']} {node['failureSummary']}" for one in found for node in one["nodes"]] == []
    assert visit.faults == []
    visit.close()


def test_pass_at_k_is_drawn_over_k_and_over_tokens_and_the_pointer_tells_models_apart(
    browser: Browser, pages: dict[str, str]
) -> None:
    visit = Visit(browser, pages["tries"])
    over_k, over_tokens = visit.page.locator(".tries .chart").all()
    for chart in (over_k, over_tokens):
        colours = chart.locator("path.line").evaluate_all("(all) => all.map((one) => getComputedStyle(one).stroke)")
        assert len(set(colours)) == 2
        assert chart.locator("i.point").count() == 2 * 3
    over_k.scroll_into_view_if_needed()
    box = over_k.locator(".plot").bounding_box()
    assert box is not None
    told = []
    for height in (0.0, 1.0):
        visit.page.mouse.move(box["x"] + 1, box["y"] + height * (box["height"] - 1))
        told.append(over_k.locator(".tip").inner_text())
    assert [text.partition(" (")[0] for text in told] == ["CGD · Pass@1 58.3\u202f%", "base · Pass@1 16.7\u202f%"]
    assert [text.rpartition(" · ")[2] for text in told] == ["200 tokens", "400 tokens"]
    assert visit.faults == []
    visit.close()


def test_the_curves_of_wrong_critiques_are_drawn(browser: Browser, pages: dict[str, str]) -> None:
    visit = Visit(browser, pages["compare"])
    box = visit.page.locator(".plot path.line").first.bounding_box()
    assert box is not None
    assert box["width"] > 500
    assert visit.page.locator(".plot path.line").count() == 2
    assert visit.page.locator("i.point").count() == 4
    assert visit.page.locator("#robustness .legend i.key").count() == 2
    assert visit.faults == []
    visit.close()


def test_pages_open_from_a_folder_of_any_name(browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "a # b % c"
    folder.mkdir()
    (folder / "report.html").write_text(render(several(), QUALITY))
    visit = Visit(browser, (folder / "report.html").as_uri())
    assert visit.position == "1 of 4"
    assert visit.faults == []
    visit.close()


def test_the_first_figure_is_copied_as_a_picture_that_stands_by_itself_and_the_manifest_as_text(visit: Visit) -> None:
    page = visit.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])

    def copied() -> str:
        return str(page.evaluate("navigator.clipboard.readText()"))

    page.get_by_role("button", name="Copy as SVG").click()
    page.get_by_role("button", name="Copied").wait_for()
    picture = copied()
    assert picture.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "sums (9 questions)" in picture
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as PNG").click()
    assert download.value.path().read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page.get_by_text("The manifest of this run").click()
    page.get_by_role("button", name="Copy the manifest").click()
    page.get_by_role("button", name="Copied").last.wait_for()
    assert copied().startswith("apiVersion: cgd.dev/v1alpha1\nkind: CGDRun\n")
