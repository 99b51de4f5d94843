"""The page without a browser: sign-in, judging, protection of sessions and forms, escaping."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import itsdangerous
import pytest
from fastapi.testclient import TestClient

from reward_service.comparison import Candidate
from reward_service.config import PeopleConfig
from reward_service.feedback import people
from reward_service.feedback.assignment import Assignments
from reward_service.feedback.page.app import create_app
from reward_service.feedback.page.texts import CHINESE, ENGLISH
from reward_service.feedback.page.views import difference
from reward_service.feedback.store import FeedbackStore
from reward_service.feedback.tasks import Task

SECRET = "a secret of the tests, and of nothing else"
SCRIPT = "<script>alert(1)</script>"


def task(number: int, *, overlap: int = 2, kind: str = "comparison", **changes: object) -> Task:
    count = {"comparison": 2, "rating": 1, "ranking": 4}[kind]
    values: dict[str, object] = {
        "task_id": f"t{number}",
        "kind": kind,
        "prompt_id": f"p{number}",
        "prompt": f"Storm number {number}",
        "candidates": tuple(
            Candidate(text=f"text {number}.{n} {SCRIPT}", model=f"secret-model-{n}")
            for n in range(count)
        ),
        "overlap": overlap,
    }
    return Task(**{**values, **changes})  # type: ignore[arg-type]


class Visitor:
    """Somebody with a browser that follows redirects and fills in forms."""

    def __init__(self, app: object, language: str = "en") -> None:
        self.client = TestClient(app, headers={"accept-language": language})  # type: ignore[arg-type]

    def fields(self, html: str) -> dict[str, str]:
        return dict(re.findall(r'type="hidden" name="(form|assignment)" value="([^"]*)"', html))

    def post(self, path: str, html: str, **fields: str):
        return self.client.post(path, data={**self.fields(html), **fields})

    def sign_in(self, token: str) -> str:
        """The first item's page."""
        page = self.client.get(f"/join/{token}")
        page = self.post("/sign-in", page.text, token=token)
        assert page.url.path == "/welcome"
        page = self.post("/welcome", page.text, agree="yes")
        assert page.url.path == "/judge"
        return page.text


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        yield store


CONFIG = PeopleConfig(repeat_share=0, gold_share=0)


@pytest.fixture
def app(store: FeedbackStore):
    Assignments(store, CONFIG).add_tasks([task(n) for n in range(6)])
    return create_app(store, CONFIG, secret=SECRET, seed=0)


def test_a_person_judges_from_the_invitation_to_the_end(app, store: FeedbackStore) -> None:
    name, token = people.invite(store.database, days=1)
    visitor = Visitor(app)
    html = visitor.sign_in(token)
    choices = ["first_3", "second_2", "tie", "both_bad", "first_1", "second_1"]
    for number, choice in enumerate(choices):
        assert f"<b>{number}</b> judged by you" in html
        assert f"<b>{6 - number}</b> left" in html
        html = visitor.post("/judge", html, choice=choice).text
    assert ENGLISH["nothing_left"] in html
    said = store.comparisons()
    assert [c.annotator.annotator_id for c in said] == [name] * 6
    for choice, comparison in zip(choices, said, strict=True):
        if choice in ("tie", "both_bad"):
            assert comparison.choice == choice
        else:
            side, _, strength = choice.partition("_")
            assert (comparison.choice == comparison.shown_first) == (side == "first")
            assert comparison.strength == int(strength)
    html = visitor.post("/undo", html).text
    assert ENGLISH["undone"] in html
    assert "You had answered: Second, slightly" in html
    assert len(store.comparisons()) == 5
    html = visitor.post("/aside", html, action="flag", reason="harmful", comment="a@b.org").text
    assert len(store.comparisons()) == 5
    mine = visitor.client.get("/me.json").json()
    assert mine["person"] == name
    assert len(mine["comparisons"]) == 7  # six said, one taken back
    assert [a["action"] for a in mine["actions"]] == ["done"] * 6 + ["undone", "flagged"]
    assert mine["actions"][-1]["comment"] == "[email]"


def test_texts_of_models_are_text_and_models_have_no_name(app, store: FeedbackStore) -> None:
    _, token = people.invite(store.database, days=1)
    visitor = Visitor(app)
    html = visitor.sign_in(token)
    for page in (html, visitor.client.get("/judge?diff=1").text):
        assert SCRIPT not in page
        assert "&lt;script&gt;" in page or "&lt;</mark>" in page
        assert "secret-model" not in page
        assert 'src="http' not in page
    headers = visitor.client.get("/judge").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe-inline" not in headers["content-security-policy"]
    assert "style=" not in html


def test_sessions_cannot_be_forged(app, store: FeedbackStore) -> None:
    name, token = people.invite(store.database, days=1)
    visitor = Visitor(app)
    visitor.sign_in(token)
    good = visitor.client.cookies["rlhf_session"]
    assert token not in base64.b64decode(good.split(".")[0] + "==").decode()
    invite = {"invite": people.hash_of(token), "form": "x"}
    payload = base64.b64encode(json.dumps(invite).encode()).decode()
    forged = [
        payload,
        f"{payload}.{good.split('.', 1)[1]}",
        itsdangerous.TimestampSigner("another secret").sign(payload).decode(),
        good[:-2] + ("aa" if good[-2:] != "aa" else "bb"),
    ]
    for cookie in forged:
        stranger = Visitor(app)
        stranger.client.cookies["rlhf_session"] = cookie
        page = stranger.client.get("/judge")
        assert page.url.path == "/", cookie
        assert ENGLISH["access_code"] in page.text
    stranger = Visitor(app)
    page = stranger.client.get("/join/guess")
    assert stranger.post("/sign-in", page.text, token="guess").status_code == 403
    people.revoke(store.database, name)
    assert visitor.client.get("/judge").url.path == "/", "a revoked invitation is out at once"


def test_session_cookie_is_out_of_reach_of_scripts_and_other_sites(app) -> None:
    header = TestClient(app).get("/").headers["set-cookie"].lower()
    assert "httponly" in header
    assert "samesite=lax" in header


def test_forms_of_other_sites_and_sessions_are_refused(app, store: FeedbackStore) -> None:
    visitors = []
    for _ in range(2):
        visitor = Visitor(app)
        html = visitor.sign_in(people.invite(store.database, days=1)[1])
        visitors.append((visitor, html))
    (one, html), (other, other_html) = visitors
    for path in ("/judge", "/aside", "/undo", "/language", "/sign-out", "/welcome"):
        form = {**one.fields(html), "choice": "tie", "action": "skip", "reason": "other"}
        without = {k: v for k, v in form.items() if k != "form"}
        assert one.client.post(path, data=without).status_code == 403, path
        stolen = {**form, "form": other.fields(other_html)["form"]}
        assert one.client.post(path, data=stolen).status_code == 403, path
        elsewhere = one.client.post(path, data=form, headers={"sec-fetch-site": "cross-site"})
        assert elsewhere.status_code == 403, path
    assert store.comparison_history() == []
    assert one.client.get("/judge").url.path == "/judge"


def test_nobody_reaches_another_persons_item(app, store: FeedbackStore) -> None:
    one, other = Visitor(app), Visitor(app)
    html = one.sign_in(people.invite(store.database, days=1)[1])
    other_html = other.sign_in(people.invite(store.database, days=1)[1])
    theirs = other.fields(other_html)["assignment"]
    for path, fields in (
        ("/judge", {"choice": "tie"}),
        ("/aside", {"action": "skip", "reason": "other"}),
    ):
        for assignment in (theirs, "999", "-1", "1 or 1=1", ""):
            page = one.post(path, html, assignment=assignment, **fields)
            assert page.status_code == 404
            assert ENGLISH["not_yours"] in page.text
    assert store.comparison_history() == []
    for path in ("/admin", "/admin/"):
        assert one.client.get(path).status_code in (403, 404)
    assert one.post("/admin/pause", html, paused="yes").status_code == 403
    assert one.post("/judge", html, choice="first_9").status_code == 422
    huge = one.client.post("/judge", content=b"x" * 100_000)
    assert huge.status_code == 413


def test_a_form_sent_twice_counts_once(app, store: FeedbackStore) -> None:
    visitor = Visitor(app)
    html = visitor.sign_in(people.invite(store.database, days=1)[1])
    visitor.post("/judge", html, choice="tie")
    visitor.post("/judge", html, choice="first_1")
    assert [c.choice for c in store.comparisons()] == ["tie"]


def test_nobody_judges_without_consent_to_the_present_text(app, store: FeedbackStore) -> None:
    name, token = people.invite(store.database, days=1)
    visitor = Visitor(app)
    page = visitor.client.get(f"/join/{token}")
    page = visitor.post("/sign-in", page.text, token=token)
    assert visitor.client.get("/judge").url.path == "/welcome"
    refused = visitor.post("/welcome", page.text)
    assert refused.status_code == 422
    people.agree(store.database, name, text="an older text", language="en")
    assert visitor.client.get("/judge").url.path == "/welcome"
    assert visitor.post("/welcome", page.text, agree="yes").url.path == "/judge"


def test_chinese_by_the_browsers_wish_and_by_choice(app, store: FeedbackStore) -> None:
    token = people.invite(store.database, days=1)[1]
    visitor = Visitor(app, language="zh-CN,zh;q=0.9,en;q=0.5")
    html = visitor.sign_in(token)
    assert '<html lang="zh-CN">' in html
    assert CHINESE["which_better"] in html
    html = visitor.post("/language", html, language="en", back="/judge").text
    assert ENGLISH["which_better"] in html
    away = visitor.post("/language", html, language="zh", back="//evil.example/")
    assert away.url.host == "testserver"
    assert set(CHINESE) == set(ENGLISH)


@pytest.mark.parametrize("kind", ["rating", "ranking"])
def test_ratings_and_rankings(store: FeedbackStore, kind: str) -> None:
    Assignments(store, CONFIG).add_tasks([task(1, kind=kind)])
    app = create_app(store, CONFIG, secret=SECRET, seed=1)
    visitor = Visitor(app)
    html = visitor.sign_in(people.invite(store.database, days=1)[1])
    if kind == "rating":
        assert visitor.post("/judge", html, **{"rating-0": "4"}).status_code == 422
        visitor.post("/judge", html, **{"rating-0": "4", "rating-1": "2"})
        assert {r.criterion: r.value for r in store.ratings()} == {"quality": 4, "diversity": 2}
        return
    places = {f"place-{n}": str(p) for n, p in enumerate((2, 1, 4, 3))}
    assert visitor.post("/judge", html, **{**places, "place-0": "1"}).status_code == 422
    visitor.post("/judge", html, **places)
    shown = [int(n) for n in re.findall(r"text 1\.(\d)", html)]
    # the second shown is the best, then the first, the fourth, the third
    assert list(store.rankings()[0].ranking) == [shown[1], shown[0], shown[3], shown[2]]


def test_differences_stay_shown_until_they_are_hidden(app) -> None:
    _, token = people.invite(app.state.page.store.database, days=1)
    visitor = Visitor(app)
    assert "<mark>" not in visitor.sign_in(token)
    html = visitor.client.get("/judge?diff=1").text
    html = visitor.post("/judge", html, choice="tie").text
    assert "<mark>" in html
    assert ENGLISH["plain"] in html
    visitor.client.get("/judge?diff=0")
    assert "<mark>" not in visitor.client.get("/judge").text


def test_differences_keep_the_texts_and_mark_words() -> None:
    first, second = difference("Rain fell on Riverton.", "Snow fell on  Riverton, again.")
    assert "".join(p.text for p in first) == "Rain fell on Riverton."
    assert "".join(p.text for p in second) == "Snow fell on  Riverton, again."
    assert [p.text for p in first if p.marked] == ["Rain"]
    assert [p.text for p in second if p.marked] == ["Snow", ", again"]
    first, second = difference("今天下雨了", "今天下雪了")
    assert [p.text for p in first if p.marked] == ["雨"]
    assert [p.text for p in second if p.marked] == ["雪"]


def test_an_administrator_sees_people_flags_and_pauses(app, store: FeedbackStore) -> None:
    admin = Visitor(app)
    token = people.invite_again(store.database, "boss", role="administrator", days=1)
    admin.sign_in(token)
    page = admin.client.get("/admin").text
    page = admin.post("/admin/invite", page).text
    link = re.search(r'value="(http://testserver/join/[^"]+)"', page)
    assert link is not None
    assert link[1] not in admin.client.get("/admin").text, "shown once"
    rater = Visitor(app)
    html = rater.sign_in(link[1].rsplit("/", 1)[1])
    for _ in range(3):
        html = rater.post("/judge", html, choice="tie").text
    rater.post("/aside", html, action="flag", reason="broken", comment="<b>odd</b>")
    page = admin.client.get("/admin").text
    name = store.comparisons()[0].annotator.annotator_id
    assert f'<th scope="row">{name}</th><td class="number">3</td>' in page
    assert "&lt;b&gt;odd&lt;/b&gt;" in page
    admin.post("/admin/pause", page, paused="yes")
    html = rater.client.get("/judge").text
    assert ENGLISH["which_better"] in html, "what somebody is at may be finished"
    assert ENGLISH["paused"] in rater.post("/judge", html, choice="tie").text
    page = admin.post("/admin/pause", page, paused="no").text
    flagged = re.search(r'name="task" value="([^"]+)"', page)
    assert flagged is not None
    page = admin.post("/admin/task", page, task=flagged[1], state="closed").text
    assert "Nothing is flagged" in page
    assert admin.post("/admin/revoke", page, name="boss").status_code == 422
    admin.post("/admin/revoke", page, name=name)
    assert rater.client.get("/judge").url.path == "/"


def test_the_administrators_page_in_chinese(app, store: FeedbackStore) -> None:
    """Nothing but names, coefficients and texts of models is left in English."""
    for choice in ("first_2", "second_1"):
        rater = Visitor(app)
        html = rater.sign_in(people.invite(store.database, days=1)[1])
        for _ in range(5):
            html = rater.post("/judge", html, choice=choice).text
        rater.post("/aside", html, action="flag", reason="broken")
    admin = Visitor(app, language="zh-CN")
    admin.sign_in(people.invite_again(store.database, "boss", role="administrator", days=1))
    html = admin.client.get("/admin").text
    html = admin.post("/admin/invite", html).text
    assert "10 / 12" in html or "10 / 10" in html
    assert "2 位评判者比较了" in html
    assert "几乎不高于偶然" in html or "明显高于偶然" in html or "结论" in html
    # The texts, the names of tags and attributes, and what is written for the machine.
    html = re.sub(r"<style.*?</style>|<details>.*?</details>|<[^>]*>", " ", html, flags=re.DOTALL)
    words = set(re.findall(r"[A-Za-z]{3,}", html))
    names = {i.annotator_id for i in people.invitations(store.database)}
    letters = {w for name in names for w in re.findall(r"[A-Za-z]{3,}", name)}
    models = {"secret", "model"}
    known = {"English", "Cohen", "Fleiss", "Krippendorff", "Gwet", "Bradley", "Terry"}
    assert words - letters - models - known <= {"kappa", "alpha", "logit"}
