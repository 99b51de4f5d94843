"""The page in a real browser: headless Chromium, driven by the keyboard.

RLHF_SCREENSHOTS=DIR keeps pictures of every step.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from reward_service.comparison import Candidate
from reward_service.config import PeopleConfig
from reward_service.feedback import people
from reward_service.feedback.assignment import Assignments
from reward_service.feedback.page.app import create_app
from reward_service.feedback.page.texts import CHINESE, ENGLISH
from reward_service.feedback.store import FeedbackStore
from reward_service.feedback.tasks import Task

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no browser here: install chromium and chromium-driver"
)
SECRET = "a secret of the browser tests only, long enough"
STORY = (
    "Heavy rain closed the bridge over the Tallow on Tuesday, and the council asked drivers to"
    " use the ferry until the weekend. Mayor Ines Varga said that engineers had found two loose"
    " piers and that nobody was hurt."
)
OTHER = (
    "Heavy snow closed the bridge over the Tallow on Tuesday, and the council asked drivers to"
    " stay at home. Mayor Ines Varga said that engineers had found nothing and that <script>"
    "document.title = 'taken over'</script> everybody was happy happy happy."
)


def comparison(number: int) -> Task:
    return Task(
        task_id=f"t{number}",
        kind="comparison",
        prompt_id=f"p{number}",
        prompt=f"Bridge over the Tallow closed ({number})",
        candidates=(Candidate(text=STORY, model="m1"), Candidate(text=OTHER, model="m2")),
        overlap=2,
    )


class Served:
    """The page on a free port of this process."""

    def __init__(self, directory: Path) -> None:
        self.store = FeedbackStore(directory / "feedback.sqlite")
        self.config = PeopleConfig(repeat_share=0, gold_share=0)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        app = create_app(self.store, self.config, secret=SECRET, seed=0, address=self.url)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._thread.start()

    def add(self, *tasks: Task) -> None:
        Assignments(self.store, self.config).add_tasks(tasks)

    def link(self) -> str:
        return f"{self.url}/join/{people.invite(self.store.database, days=1)[1]}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
        self.store.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    page = Served(tmp_path)
    yield page
    page.close()


@pytest.fixture
def open_browser() -> Iterator[Callable[..., Any]]:
    from selenium import webdriver

    opened = []

    def open_one(width: int = 1280, height: int = 900, language: str = "en-GB") -> Browser:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
            "--disable-background-networking", "--no-first-run", f"--lang={language}",
        ):  # fmt: skip
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"intl.accept_languages": language})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        opened.append(driver)
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        return Browser(driver)

    yield open_one
    for driver in opened:
        driver.quit()


class Browser:
    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def press_and_wait(self, key: str) -> None:
        """A key that sends a form: the next page has loaded when this returns."""
        self.driver.execute_script("window.here = true")
        self.press(key)
        self.until(
            lambda: self.driver.execute_script(
                "return !window.here && document.readyState === 'complete'"
            )
        )

    def until(self, condition: Callable[[], Any], what: str = "the next page") -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except Exception:  # the page is changing under the question
                pass
            time.sleep(0.02)
        raise TimeoutError(f"{what} did not come within 30 s; there is: {self.text[:300]}")

    @property
    def text(self) -> str:
        return str(self.driver.execute_script("return document.body.innerText"))

    def picture(self, name: str) -> None:
        directory = os.environ.get("RLHF_SCREENSHOTS")
        if directory:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(f"{directory}/{name}.png")

    def sign_in(self, link: str) -> None:
        """With the keyboard: Enter on the focused button, Space on the focused box, Tab, Enter."""
        self.driver.get(link)
        self.press_and_wait("\ue007")
        self.press(" ", "\ue004")
        self.press_and_wait("\ue007")


def test_a_session_by_keyboard_alone(served: Served, open_browser) -> None:
    served.add(*(comparison(n) for n in range(24)))
    browser = open_browser()
    browser.driver.get(served.link())
    browser.picture("sign_in")
    browser.press_and_wait("\ue007")
    browser.picture("welcome")
    browser.press(" ", "\ue004")
    browser.press_and_wait("\ue007")
    assert ENGLISH["which_better"] in browser.text
    browser.picture("comparison")
    # text of a model is text
    assert "<script>document.title = 'taken over'</script>" in browser.text
    assert browser.driver.title == ENGLISH["title"]
    browser.press_and_wait("d")
    marks = browser.driver.execute_script(
        "return [...document.querySelectorAll('mark')].map(m => m.innerText.trim())"
    )
    assert "snow" in marks
    assert "rain" in marks
    browser.picture("differences")
    for number in range(20):
        browser.press_and_wait("1234567"[number % 7])
        assert f"{number + 1} {ENGLISH['done_by_you']}" in browser.text.replace("\n", " ")
    assert len(served.store.comparisons()) == 20
    assert {c.strength for c in served.store.comparisons()} == {1, 2, 3}
    browser.press_and_wait("u")
    assert ENGLISH["undone"] in browser.text
    assert len(served.store.comparisons()) == 19
    browser.picture("undone")
    browser.press_and_wait("0")
    assert served.store.comparisons()[-1].choice == "both_bad"
    browser.press("s", "2")
    browser.picture("skip")
    browser.press_and_wait("\ue007")
    browser.press("f", "1")
    browser.press_and_wait("\ue007")
    assert len(served.store.comparisons()) == 20
    browser.press_and_wait("3")
    browser.press_and_wait("3")
    assert ENGLISH["nothing_left"] in browser.text
    browser.picture("nothing_left")
    states = [e.withdrawn for e in served.store.comparison_history()]
    assert (len(states), sum(states)) == (24, 1)


def test_ratings_and_rankings_by_keyboard(served: Served, open_browser) -> None:
    texts = tuple(Candidate(text=f"{n}: {STORY}") for n in "abcd")
    served.add(
        Task(task_id="r", kind="rating", prompt_id="p", prompt="A", candidates=texts[:1]),
        Task(task_id="k", kind="ranking", prompt_id="p", prompt="A", candidates=texts, priority=-1),
    )
    browser = open_browser()
    browser.sign_in(served.link())
    browser.press("4", "2")
    browser.picture("rating")
    browser.press_and_wait("\ue007")
    assert {r.criterion: r.value for r in served.store.ratings()} == {
        "quality": 4,
        "diversity": 2,
    }
    browser.press("1", "\ue003", "3", "1", "4")  # Backspace starts again
    browser.picture("ranking")
    browser.press_and_wait("\ue007")
    given = served.store.rankings()[0].ranking
    actions = Assignments(served.store, served.config)
    undone = actions.undo(served.store.rankings()[0].annotator.annotator_id)
    assert undone is not None
    assert list(given) == [undone.shown[n] for n in (2, 0, 3, 1)]


def test_on_a_phone_in_chinese(served: Served, open_browser) -> None:
    served.add(*(comparison(n) for n in range(3)))
    browser = open_browser(width=390, height=844, language="zh-CN")
    browser.sign_in(served.link())
    assert CHINESE["which_better"] in browser.text
    assert browser.driver.execute_script("return document.documentElement.lang") == "zh-CN"
    width = browser.driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= 390, "nothing sticks out of the screen"
    small = browser.driver.execute_script(
        "return [...document.querySelectorAll('main button, main .button')].filter(b =>"
        " b.offsetParent && b.getBoundingClientRect().height < 40).map(b => b.innerText)"
    )
    assert small == [], "targets for fingers"
    browser.picture("phone_top")
    browser.driver.execute_script(
        "document.querySelector('.answer').scrollIntoView({block: 'start'})"
    )
    browser.picture("phone_answer")
    browser.driver.execute_script("document.querySelector('[value=second_1]').click()")
    browser.until(lambda: f"1 {CHINESE['done_by_you']}" in browser.text.replace("\n", " "))
    assert served.store.comparisons()[0].strength == 1


def test_what_assistive_technology_finds(served: Served, open_browser) -> None:
    """Every control has a name, headings are in order, and text has contrast in both themes."""
    served.add(comparison(0))
    browser = open_browser()
    browser.sign_in(served.link())
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [n for n in tree if not n.get("ignored")]
    controls = [
        (n["role"]["value"], n.get("name", {}).get("value", ""))
        for n in nodes
        if n["role"]["value"] in ("button", "link", "radio", "textbox", "DisclosureTriangle")
    ]
    assert len(controls) > 15
    assert [role for role, name in controls if not name.strip()] == []
    assert ("button", ENGLISH["first_3"]) in controls
    headings = browser.driver.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])"
    )
    assert headings[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(headings))
    for theme in ("light", "dark"):
        browser.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": theme}]},
        )
        faint = browser.driver.execute_script(CONTRAST)
        assert faint == [], theme
    browser.picture("dark")


CONTRAST = """
const channel = (v) => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e)
  .backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
const faint = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  if (!own || !e.offsetParent) continue;
  const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < 4.5) faint.push(e.innerText.slice(0, 40));
}
return faint;
"""


def test_two_people_at_once_and_the_administrator(served: Served, open_browser) -> None:
    served.add(*(comparison(n) for n in range(12)))
    first, second = open_browser(), open_browser()
    for browser in (first, second):
        browser.sign_in(served.link())
    for number in range(12):
        first.press_and_wait("1234567"[number % 7])
        second.press_and_wait("1234576"[number % 7])
    said = served.store.comparisons()
    assert len(said) == 24
    assert len({(c.pair.item_id, c.annotator.annotator_id) for c in said}) == 24
    token = people.invite_again(
        served.store.database, "administrator", role="administrator", days=1
    )
    first.driver.delete_all_cookies()
    first.sign_in(f"{served.url}/join/{token}")
    first.driver.get(f"{served.url}/admin")
    assert "24 of 24" in first.text
    assert "2 judges compared 12 pairs" in first.text
    first.picture("admin")
    height = first.driver.execute_script("return document.documentElement.scrollHeight")
    first.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 1280, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    first.picture("admin_whole")
