"""`cgd ui` in a real Chromium: what changes on a page when the cluster does, and what an audit says of it."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect
from support.builders import definition, manifest
from support.report_builders import HOSTILE
from support.status_builders import every_state

from cgd_cli.ui import serving
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import RUN

pytestmark = pytest.mark.slow

T = TypeVar("T")
STATES = every_state()


class Live:
    """An API server and `cgd ui` of it, in a loop of a thread of their own, as the browser's API is blocking."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def start(self, kubeconfig: Any) -> None:
        self.api = ApiServer()
        await self.api.start()
        kubeconfig.write_text(self.api.kubeconfig())
        self.cluster = await Cluster.connect(str(kubeconfig), manager="test")
        await install(self.cluster, definition())
        self._ready, self._stop = asyncio.Event(), asyncio.Event()
        self._serving = asyncio.create_task(self._serve())
        await self._ready.wait()

    async def _serve(self) -> None:
        async with serving(self.cluster, None, 0) as self.address:
            self._ready.set()
            await self._stop.wait()

    async def end(self) -> None:
        self._stop.set()
        await self._serving
        await self.cluster.close()
        await self.api.stop()

    def close(self) -> None:
        self.do(self.end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def create(self, name: str, case: str) -> None:
        body = manifest(name=name)
        del body["metadata"]["uid"], body["metadata"]["generation"]
        self.do(self.cluster.create(RUN, body))
        self.become(name, case)

    def become(self, name: str, case: str, **changes: Any) -> None:
        body = {"status": STATES[case]["status"] | changes}
        self.do(self.cluster.patch(RUN, name, "default", body, subresource="status"))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    live = Live()
    live.do(live.start(tmp_path_factory.mktemp("ui") / "kubeconfig"))
    for case in ("half of the answers", "failed stage", "succeeded", "pod without a node", "suspended later"):
        live.create(case.replace(" ", "-"), case)
    yield live
    live.close()


class Visit:
    """A page in a window of its own, and everything that it should not do: errors, requests to elsewhere."""

    def __init__(self, browser: Browser, live: Live) -> None:
        self._browser, self._live = browser, live
        self.faults: list[str] = []

    def __call__(self, path: str = "", *, width: int = 1440, scheme: Any = "light") -> Page:
        window = {"width": width, "height": 900}
        context = self._browser.new_context(viewport=window, color_scheme=scheme, reduced_motion="reduce")
        page = context.new_page()
        page.on("console", lambda said: self.faults.append(said.text))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("dialog", lambda dialog: (self.faults.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda asked: self._asked(asked.url))
        page.goto(self._live.address + path)
        expect(page.locator("#link")).to_have_text("live")
        return page

    def _asked(self, url: str) -> None:
        if not url.startswith(("data:", self._live.address)):
            self.faults.append(f"request to {url}")


@pytest.fixture
def visit(browser: Browser, live: Live) -> Iterator[Visit]:
    visit = Visit(browser, live)
    yield visit
    for context in browser.contexts:
        context.close()
    assert visit.faults == []


def test_a_change_in_the_cluster_changes_the_line_and_keeps_what_the_reader_does(visit: Visit, live: Live) -> None:
    live.create("moving", "just begun")
    page = visit()
    page.keyboard.press("/")
    page.keyboard.type("moving")
    line = page.locator("tbody tr:visible")
    expect(line).to_have_count(1)
    expect(line.locator(".state")).to_have_text("Pending")
    page.evaluate("document.querySelector('a[href$=moving]').dataset.mine = 'yes'")
    live.become("moving", "half of the answers")
    expect(line.locator(".state")).to_have_text("Answering")
    expect(line.get_by_role("progressbar")).to_have_attribute("aria-label", "Progress of default/moving")
    expect(page.locator("#told")).to_have_text("moving: Answering")
    assert page.locator("#search").input_value() == "moving"
    assert page.locator("a[data-mine=yes]").count() == 1  # the same element: no list was made anew
    live.create("moving-too", "just begun")
    expect(line).to_have_count(2)
    live.do(live.cluster.delete(RUN, "moving-too", "default"))
    expect(line).to_have_count(1)


def test_the_choice_of_runs_outlives_a_reload(visit: Visit) -> None:
    page = visit()
    page.locator("#state").select_option("Failed")
    expect(page.locator("tbody a")).to_contain_text(["failed-stage"])
    assert page.locator("tbody th:visible").count() == 1
    page.reload()
    expect(page.locator("tbody th:visible")).to_have_count(1)
    assert page.locator("#state").input_value() == "Failed"
    page.locator("#search").fill("nothing like it")
    expect(page.locator("#none")).to_be_visible()
    page.locator("#search").press("Escape")
    expect(page.locator("tbody th:visible")).to_have_count(1)


def lower(live: Live) -> Any:
    """The status of the run `one` when its training's loss is 0.5."""
    status = live.do(live.cluster.get(RUN, "one", "default"))["status"]
    next(stage for stage in status["stages"] if stage["name"] == "train-cgd")["loss"] = "0.5"
    return status


def test_a_runs_own_page_follows_it_through_its_stages(visit: Visit, live: Live) -> None:
    live.create("one", "just begun")
    page = visit()
    page.get_by_role("link", name="one", exact=True).click()
    expect(page.locator("#verdict")).to_contain_text("Pending")
    live.become("one", "half of the answers")
    answer = page.get_by_role("row", name="answer Running")
    expect(answer).to_contain_text("30 / 48")
    expect(answer.get_by_role("progressbar")).to_have_attribute("value", "66")
    expect(page.locator("#log-of")).to_have_text("No pod of answer has begun, or it is deleted.")
    live.become("one", "half of the training")
    training = page.get_by_role("row", name="train-cgd Running")
    expect(training.locator(".loss span")).to_have_text("1.235")
    expect(training.locator(".loss svg")).to_have_count(0)  # one loss is no line
    live.do(live.cluster.patch(RUN, "one", "default", {"status": lower(live)}, subresource="status"))
    expect(training.get_by_role("img")).to_have_attribute(
        "aria-label", "Loss since this page was opened, from 1.235 to 0.5"
    )
    live.become("one", "failed stage")
    expect(page.locator("#verdict")).to_contain_text("no such bucket. create it")
    expect(page.locator("#verdict")).to_contain_text("You: change what the message says")
    live.become("one", "succeeded")
    expect(page.locator("#artifacts")).to_contain_text("cgd report one -n default")
    live.do(live.cluster.delete(RUN, "one", "default"))
    expect(page.get_by_role("alert")).to_contain_text("This run has been deleted")


def test_what_a_model_or_a_pod_says_is_text(visit: Visit, live: Live) -> None:
    live.create("hostile", "failed stage")
    stages = [{"name": "prepare", "state": "Failed", "message": HOSTILE[:900]}]
    live.become("hostile", "failed stage", stages=stages)
    page = visit("runs/default/hostile")
    expect(page.locator("#stage-lines")).to_contain_text("<script>")


def test_a_lost_api_server_is_told_and_the_page_goes_on_when_it_is_back(visit: Visit, live: Live) -> None:
    page = visit()
    port = int(live.api.url.rpartition(":")[2])
    live.do(live.api.stop())
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    assert page.locator("tbody th:visible").count() >= 5
    live.do(live.api.start(port))
    expect(page.locator("#link")).to_have_text("live")
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (390, "dark")])
@pytest.mark.parametrize("path", ["", "runs/default/failed-stage", "runs/default/succeeded"])
def test_the_audit_finds_nothing_and_nothing_is_wider_than_the_screen(
    visit: Visit, path: str, width: int, scheme: str
) -> None:
    page = visit(path, width=width, scheme=scheme)
    expect(page.locator("tbody").first).to_be_visible()
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]][:2]) for one in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
