"""`nulledit ui`: the page of a run, asked as a browser asks; tiny models, no network."""

import html
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from http.client import HTTPConnection
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from support.cli import edit_all, refused

from nulledit import Editor, Probe, Run
from nulledit.config import load_recipe
from nulledit.errors import LedgerError
from nulledit.ledger.store import Store
from nulledit.report.document import Value
from nulledit.runs.limits import load_limits

pytest.importorskip("starlette", reason="needs the extra ui")
from starlette.testclient import TestClient

from nulledit.ui.app import Site
from nulledit.ui.forms import filled, in_its_place, read_fact, read_upload
from nulledit.ui.guard import MOST_BYTES
from nulledit.ui.view import FactRow, View, chosen, curves
from nulledit.ui.work import Outcome, Stopped, Worker

PORT = 8000
HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">\u202e{{ 7 * 7 }}'
LONELY = {"subject": "Lyra Holm", "prompt": "{} plays the", "target": "flute", "no_evaluate": "1"}


class Browser:
    """One tab: follows redirects, keeps the cookie, takes the form's token from the page."""

    def __init__(self, client, site):
        self.client, self.site = client, site
        self.client.get(site.app.path)

    def get(self, path):
        return self.client.get(path)

    def post(self, path, data=None, *, wait=True, files=None):
        csrf = re.search(r'name="csrf" value="([^"]+)"', self.get("/edit").text)[1]
        answer = self.client.post(path, data={"csrf": csrf, **(data or {})}, files=files)
        found = re.search(r"/jobs/(\d+)|job=(\d+)", str(answer.url))
        if not (wait and found):
            return answer
        self.wait(int(found[1] or found[2]))
        return self.get(str(answer.url))

    def wait(self, number):
        """Until a job is over; the first one loads the model."""
        job = self.site.worker.jobs[number]
        for _ in range(3000):
            if job.over:
                break
            time.sleep(0.02)
        assert job.over, job.title


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    return edit_all(place, tmp_path_factory.mktemp("ui") / "run")


def site_of(folder, opened=None, name="run"):
    return Site(
        Worker(folder, opened or (lambda talk: Run.open(folder, talk=talk))), name=name, port=PORT
    )


def client_of(site):
    return TestClient(site.app, base_url=f"http://127.0.0.1:{PORT}")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def tab(folder):
    site = site_of(folder)
    with client_of(site) as client:
        yield Browser(client, site)


def events(folder):
    return Store(folder / "ledger").events()


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", " ", page.text))


# -- who may ask --------------------------------------------------------------------------------


def test_only_who_has_the_token_is_let_in(folder):
    site = site_of(folder)
    with client_of(site) as client:
        for path in ("/", "/edit", "/?token=guess", "/jobs/1/stream", "/style.css"):
            found = client.get(path, follow_redirects=False)
            assert found.status_code == 403
            assert "ada" not in found.text
        first = client.get(site.app.path, follow_redirects=False)
        assert (first.status_code, first.headers["location"]) == (303, "/")
        assert "HttpOnly" in first.headers["set-cookie"]
        assert "SameSite=Strict" in first.headers["set-cookie"]
        assert client.get("/").status_code == 200
        client.cookies.set(site.app.cookie, "guess")
        assert client.get("/").status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1:1", "127.0.0.1", "localhost.evil:8000", ""]
)
def test_a_name_that_was_pointed_here_gets_nothing(tab, host):
    found = tab.client.get("/", headers={"host": host})
    assert found.status_code == 421
    assert "ada" not in found.text
    assert tab.client.get("/", headers={"host": f"localhost:{PORT}"}).status_code in (200, 403)


@pytest.mark.parametrize("csrf", [None, "", "guess", "é"])
@pytest.mark.parametrize("path", ["/change", "/edit/check", "/retry", "/ask", "/jobs/1/stop"])
def test_a_form_of_another_page_changes_nothing(tab, folder, path, csrf):
    data = {"kind": "undo", "id": "ada", **({} if csrf is None else {"csrf": csrf})}
    assert tab.client.post(path, data=data).status_code == 403
    assert events(folder) == 2


def test_nothing_on_a_page_may_run_or_be_framed(tab):
    for path in ("/", "/try", "/edit", "/timeline", "/numbers", "/jobs", "/fact?id=ada"):
        found = tab.get(path)
        assert found.status_code == 200, path
        policy = found.headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert found.headers["cache-control"] == "no-store"
        assert not re.search(r"<script(?! src=\"/ui\.js\" defer>)|\son\w+=|javascript:", found.text)


def test_a_form_that_is_too_large_or_has_no_length_is_refused(tab):
    large = tab.client.post("/ask", headers={"content-length": str(MOST_BYTES + 1)})
    assert large.status_code == 413
    assert tab.client.post("/ask", content=iter([b"a"])).status_code == 411


# -- looking ------------------------------------------------------------------------------------


def test_facts_are_listed_searched_filtered_and_sorted_without_a_script(tab):
    page = tab.get("/")
    assert "4 in the model" in text_of(page)
    for word in ("ada", "Velmish", "Émile Zola", "東京", "works as a"):
        assert word in text_of(page)
    assert "ada" in tab.get("/?q=velmish+byron").text
    assert "zola" not in tab.get("/?q=velmish+byron").text
    order = re.findall(r"/fact\?id=(\w+)", tab.get("/?sort=id&down=1").text)
    assert order == sorted(order, reverse=True)
    assert set(order) == {"ada", "zola", "velm", "karo"}
    assert "No fact fits" in tab.get("/?q=nowhere").text
    assert tab.get("/?show=nonsense&sort=nonsense&page=-3&down=x").status_code == 200
    tab.wait(1)  # the page says what is at work
    shown = text_of(tab.get("/"))
    assert all(text_of(tab.get(f"/?page={page}")) == shown for page in ("0", "1", "99"))


def row(**given):
    names = FactRow.__dataclass_fields__
    return FactRow(**{**dict.fromkeys(names, ""), "holds": False, "batch": 1, **given})


def test_each_filter_has_its_own_facts():
    rows = [
        row(id="good", mark="ok", holds=True),
        row(id="bad", mark="missed"),
        row(id="asked", mark="not evaluated"),
        row(id="gone", mark="taken out"),
    ]
    found = {
        show: [r.id for r in chosen(rows, show=show)]
        for show in ("in the model", "holds", "does not hold", "not evaluated", "taken out", "all")
    }
    assert found == {
        "in the model": ["good", "bad", "asked"],
        "holds": ["good"],
        "does not hold": ["bad"],
        "not evaluated": ["asked"],
        "taken out": ["gone"],
        "all": ["good", "bad", "asked", "gone"],
    }


def test_a_fact_has_its_story_and_the_timeline_its_events(tab):
    page = text_of(tab.get("/fact?id=ada"))
    assert "In the model" in page
    assert "Event 1" in page
    assert "no fact 'adda' in the ledger (did you mean 'ada'?)" in text_of(tab.get("/fact?id=adda"))
    page = text_of(tab.get("/timeline"))
    assert page.count("edit") >= 2
    assert "2 facts" not in tab.get("/fact?id=").text
    assert "nulledit export" in tab.get("/numbers").text


def test_the_numbers_of_an_event_are_of_the_one_that_was_evaluated(tab, folder):
    tab.post("/change", {"kind": "undo", "id": "karo"})
    tab.post("/change", {"kind": "redo"})
    told = View(folder).events()
    assert [event["kind"] for event in told] == ["edit", "edit", "undo", "redo"]
    assert [event["kl"] is not None for event in told] == [False, True, False, False]
    assert curves(told) == []
    other = {**told[1], "event": 9, "kl": Value(2.0, 0.5, 10), "says": None}
    (figure,) = curves([*told, other])
    assert [point.x for point in figure.points] == [2, 9]


def test_what_is_on_disk_is_shown_even_if_the_model_is_not(folder):
    def opened(talk):
        raise OSError("no room for the model")

    site = site_of(folder, opened)
    with client_of(site) as client:
        tab = Browser(client, site)
        assert "Velmish" in tab.get("/").text
        said = text_of(tab.post("/ask", {"prompt": "x"}))
        assert "no room for the model" in said
        assert "could not be loaded" in tab.get("/").text
        assert "Traceback" not in said


def test_a_damaged_ledger_is_told_in_words(tab, folder):
    (folder / "ledger" / "ledger.db").write_bytes(b"nothing")
    page = tab.get("/")
    assert page.status_code == 409
    assert "damaged" in page.text
    assert tab.get("/edit").status_code == 200


# -- trying -------------------------------------------------------------------------------------


def test_both_models_answer_with_the_targets_probability(tab, folder):
    page = text_of(
        tab.post("/ask", {"prompt": "The mother tongue of Ada Byron is", "target": "Velmish"})
    )
    said = Run.open(folder).ask("The mother tongue of Ada Byron is", "Velmish")
    assert f"{said.base_probability:.3g}" in page
    assert f"{said.edited_probability:.3g}" in page
    job = next(j for j in tab.site.worker.jobs.values() if j.kind == "ask")
    assert job.outcome.data[0] == said
    assert job.heard == {"base": said.base, "edited": said.edited}
    same, base, edited = job.outcome.data[1]
    assert (same + base).strip() == said.base.strip()
    assert (same + edited).strip() == said.edited.strip()
    assert "Asked before" in tab.get("/try").text
    assert tab.post("/ask", {"prompt": "  "}).status_code == 409


def test_a_stream_tells_how_far_a_job_is_and_ends_with_it(tab):
    tab.post("/ask", {"prompt": "The harbour of Velm"})
    number = max(tab.site.worker.jobs)
    told = tab.get(f"/jobs/{number}/stream")
    assert told.headers["content-type"].startswith("text/event-stream")
    last = json.loads(told.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["over"]
    assert set(last["heard"]) == {"base", "edited"}
    assert tab.get("/jobs/999/stream").status_code == 404


# -- editing ------------------------------------------------------------------------------------


def test_a_fact_is_previewed_written_undone_and_brought_back(tab, folder):
    before = events(folder)
    page = tab.post("/edit/check", {**LONELY, "do": "preview"})
    assert "Nothing was written" in text_of(page)
    assert events(folder) == before
    number = max(tab.site.worker.jobs)
    tab.post("/edit/again", {"job": str(number), "do": "write"})
    assert events(folder) == before + 1
    assert "flute" in tab.get("/").text
    id_ = View(folder).facts()[-1].id
    foreseen = tab.post("/foresee", {"kind": "undo", "id": id_})
    assert "Nothing was changed yet" in text_of(foreseen)
    assert events(folder) == before + 1
    state = Store(folder / "ledger").read().state_id
    tab.post("/change", {"kind": "undo", "id": id_})
    assert "flute" not in tab.get("/").text
    assert "flute" in tab.get("/?show=taken+out").text
    assert "redo" in text_of(tab.get(f"/fact?id={id_}")).casefold()
    tab.post("/change", {"kind": "redo"})
    assert Store(folder / "ledger").read().state_id == state
    assert Run.open(folder).verify().passed


def test_what_is_wrong_stands_beside_its_field_and_the_rest_stays(tab, folder):
    given = {"subject": "Velm", "prompt": "no slot here", "target": "", "old_answer": "a & b"}
    page = tab.post("/edit/check", {**given, "do": "write"})
    assert page.status_code == 422
    assert re.search(r'id="target-wrong-1">target is', page.text)
    assert 'value="a &amp; b"' in page.text
    assert 'value="no slot here"' in page.text
    lines = {"paraphrases": "\r\n a & b\r\nc \u202e"}
    page = tab.post("/edit/check", {**given, **lines, "target": "town", "do": "write"})
    assert 'aria-describedby="paraphrases-about">\n\n a &amp; b\nc \u202e</textarea>' in page.text
    assert re.search(r'id="prompt-wrong-1">prompt has no slot', page.text)
    assert events(folder) == 2


def test_what_is_in_the_model_already_is_not_written_again(tab, folder):
    tab.post("/edit/check", {**LONELY, "do": "write"})
    pages = (folder / "summary.json").read_bytes()
    assert "nothing was written" in text_of(tab.post("/edit/check", {**LONELY, "do": "write"}))
    assert events(folder) == 3
    assert (folder / "summary.json").read_bytes() == pages


def test_an_id_of_another_fact_and_a_fact_beside_a_file_are_no_edit(tab, folder):
    id_ = View(folder).facts()[0].id
    page = tab.post("/edit/check", {**LONELY, "id": id_, "do": "check"})
    assert re.search(r'id="id-wrong-1">id [^<]*is that of another fact', page.text)
    records = [{"subject": "Nim", "prompt": "{} is", "target": "x", "id": id_}]
    file = ("more.json", json.dumps(records).encode())
    page = tab.post("/edit/check", {"do": "write"}, files={"file": file})
    assert "is that of another fact" in text_of(page)
    page = tab.post("/edit/check", {**LONELY, "do": "write"}, files={"file": file})
    assert "give one fact there, or a file" in text_of(page)
    assert events(folder) == 2


def test_facts_that_are_asked_again_are_shown_as_they_are_now(tab):
    tab.post("/edit/check", {**LONELY, "do": "write"})
    assert "not evaluated" in tab.get("/?q=flute").text.split("<tbody")[1]
    tab.post("/measure", {"what": "facts"})
    assert "not evaluated" not in tab.get("/?q=flute").text.split("<tbody")[1]


def shown_limits(page):
    found = re.findall(r'name="limit\.(\w+)" value="([^"]*)"', page.text)
    return {name: value for name, value in found if value}


def test_limits_of_the_form_hold_or_nothing_is_written(tab, folder):
    default = load_limits().to_dict()
    fields = shown_limits(tab.get("/edit"))
    assert list(fields) == list(default)
    assert fields["kl"] == f"{default['kl']['at_most']:g}"
    given = {**LONELY, "gate": "1", "do": "write"}
    said = text_of(tab.post("/edit/check", {**given, "limit.norm_growth": "0.0001"}))
    assert "norm_growth failed; no model was written" in said
    assert events(folder) == 2
    tab.post("/edit/check", {**given, "limit.norm_growth": "1e6"})
    assert events(folder) == 3
    assert tab.site.worker.jobs[max(tab.site.worker.jobs)].asked.limits.to_dict() == {
        "norm_growth": {"optional": False, "at_most": 1e6}
    }


@pytest.mark.parametrize(
    ("given", "field", "said"),
    [
        ({"gate": "1", "limit.efficacy_strict": "0.8"}, "limit.efficacy_strict", "write 80"),
        ({"gate": "1", "limit.room_left": "<b>"}, "limit.room_left", "expected 0 to 100"),
        ({"gate": "1", "limit.kl": "  "}, "gate", "no limit has a number"),
        ({"method": "alphaedti"}, "method", "did you mean 'alphaedit'?"),
        ({"settings": "values.steps"}, "settings", "expected FIELD=VALUE"),
        ({"settings": "batch_size=2\nvalues.stepps=4"}, "settings", "did you mean 'steps'?"),
        ({"settings": "values.steps=0"}, "settings", "values.steps is 0; expected"),
        ({"settings": "method.l3=4"}, "settings", "unknown setting 'method.l3'"),
        ({"settings": "a: b=[", "method": "rome"}, "settings", "a: b"),
        ({"method": "gated", "settings": "method.projection=after"}, "settings", "no projection"),
        ({"stats": "/nowhere", "settings": "l2=1"}, "stats", "/nowhere: no such file"),
        ({"stats": "."}, "stats", "belong to another recipe"),
    ],
)
def test_what_is_wrong_with_limits_and_recipe_is_beside_its_field(tab, folder, given, field, said):
    page = tab.post("/edit/check", {**LONELY, **given, "do": "write"})
    assert page.status_code == 422
    (found,) = re.findall(rf'id="{re.escape(field)}-wrong-1">(.*?)</p>', page.text)
    assert said in html.unescape(found)
    assert f'aria-describedby="{field}-wrong-1"' in page.text or field == "gate"
    assert 'name="no_evaluate" value="1" checked' in page.text
    for name, text in given.items():
        assert html.escape(text, quote=False).strip() in page.text, name
    assert events(folder) == 2


def test_a_retry_keeps_the_limits_of_its_page(tab, folder, monkeypatch):
    assert shown_limits(tab.get("/retry")) == shown_limits(tab.get("/edit"))
    given = {"retry": "2", "gate": "1"}
    said = text_of(tab.post("/retry", {**given, "limit.norm_growth": "0.0001"}))
    assert "norm_growth failed; no model was written" in said
    wrong = tab.post("/retry", {**given, "limit.efficacy_strict": "0.8"})
    assert (wrong.status_code, "write 80" in wrong.text) == (422, True)
    assert "<option selected>2" in wrong.text
    assert events(folder) == 2
    seen = []
    monkeypatch.setattr(Run, "retry", lambda _, *asked, **more: seen.append((asked, more)) or "-")
    tab.post("/retry", {**given, "limit.norm_growth": "1e6"})
    tab.post("/retry", {"retry": "1", "limit.norm_growth": "1e6"})
    (((twice,), kept), ((once,), free)) = seen
    assert (twice, once, free["limits"]) == (2, 1, None)
    assert kept["limits"].to_dict() == {"norm_growth": {"optional": False, "at_most": 1e6}}


def test_what_the_form_refuses_the_command_refuses_in_the_same_words(tab, place, tmp_path):
    for changes, words in (
        ({"settings": "values.steps=0"}, ("--set", "values.steps=0")),
        ({"settings": "method.l3=4"}, ("--set", "method.l3=4")),
        ({"method": "alphaedti"}, ("--method", "alphaedti")),
    ):
        page = tab.post("/edit/check", {**LONELY, **changes, "do": "write"})
        (found,) = re.findall(r'-wrong-1">(.*?)</p>', page.text)
        edit = ("edit", place / "facts.json", "--model", place / "model", "--out", tmp_path / "r")
        recipe = ("--recipe", place / "recipe.yaml", "--stats", place / "stats")
        assert refused(*edit, *recipe, *words, "-q") == f"Error: {html.unescape(found)}"


def test_another_recipe_is_previewed_then_begins_an_epoch(tab, folder, place):
    ways = {"settings": "values.steps=2\r\nmethod.l2=5", "stats": str(place / "stats")}
    tab.post("/edit/check", {**LONELY, **ways, "do": "preview"})
    number = max(tab.site.worker.jobs)
    assert tab.site.worker.jobs[number].state == "done", tab.site.worker.jobs[number].error
    assert events(folder) == 2
    karo = {"subject": "Karo Dun", "prompt": "{} lives in", "target": "Velm", "no_evaluate": "1"}
    tab.post("/edit/check", {**karo, "do": "write"})
    assert len(Store(folder / "ledger").read().epochs) == 1, "a preview changes no recipe"
    tab.post("/edit/again", {"job": str(number), "do": "write"})
    history = Store(folder / "ledger").read()
    assert [epoch.recipe.values.steps for epoch in history.epochs] == [3, 2]
    assert history.epoch.recipe.method.constants["l2"] == 5
    tab.post("/edit/check", {**LONELY, "subject": "Velm", **ways, "do": "write"})
    assert len(Store(folder / "ledger").read().epochs) == 2, "the recipe is that of the run"
    id_ = View(folder).facts()[-1].id
    tab.post("/change", {"kind": "undo", "id": id_})
    assert Run.open(folder).verify().passed


def test_a_recipe_that_could_not_be_used_leaves_the_run_its_own(tab, folder, tmp_path):
    ways = {"settings": "layers=[2]", "stats": str(tmp_path)}
    tab.post("/edit/check", {**LONELY, **ways, "do": "write"})
    job = tab.site.worker.jobs[max(tab.site.worker.jobs)]
    assert job.state == "failed"
    assert "unexpected" not in job.error
    tab.post("/edit/check", {**LONELY, "do": "write"})
    history = Store(folder / "ledger").read()
    assert len(history.epochs) == 1
    assert len(history.events) == 3


def test_a_file_is_checked_as_the_command_checks_it(tab, folder, place):
    bad = (
        b'- {subject: A, prompt: "{} is"}\n- {subject: B, prompt: "{} is", target: x, colour: y}\n'
    )
    page = tab.post("/edit/check", {"do": "write"}, files={"file": ("../../my<b>.yaml", bad)})
    assert page.status_code == 422
    said = text_of(page)
    assert "record 1" in said
    assert "record 2" in said
    assert "/tmp" not in said
    assert "<b>.yaml" not in page.text
    good = json.dumps([{"subject": "Lyra Holm", "prompt": "{} plays the", "target": "flute"}])
    page = tab.post("/edit/check", {"do": "check"}, files={"file": ("more.json", good.encode())})
    assert "the model says" in text_of(page)
    assert events(folder) == 2
    number = max(tab.site.worker.jobs)
    tab.post("/edit/again", {"job": str(number), "do": "write"})
    assert events(folder) == 3


def test_an_error_in_a_job_is_one_line(tab, folder):
    for path, data, words in (
        ("/change", {"kind": "undo", "id": "nobody"}, "no fact 'nobody' in the"),
        ("/change", {"kind": "redo"}, "nothing to redo"),
        ("/change", {"kind": "explode"}, "unknown change"),
        ("/change", {"kind": "undo"}, "no fact was ticked"),
        ("/edit/again", {"job": "77", "do": "write"}, "no job 77"),
        ("/edit/again", {"job": "1", "do": "write"}, "that was no edit"),
        ("/diff", {"first": "x", "second": "1"}, "choose two events"),
        ("/diff", {"first": "99", "second": "1"}, "2 events"),
    ):
        said = text_of(tab.post(path, data))
        assert words in said.replace("there is nothing", "nothing"), (path, said[-600:])
        assert "Traceback" not in said
    assert events(folder) == 2


def test_every_other_job_says_what_its_command_says(tab):
    assert "Nothing was changed yet" in text_of(tab.post("/foresee", {"kind": "restore"}))
    assert "facts differ" in text_of(tab.post("/diff", {"first": "0", "second": "2"}))
    assert "efficacy_strict" in text_of(tab.post("/measure", {"what": "gates"}))
    assert "Velmish" in text_of(tab.post("/measure", {"what": "facts"}))


def test_hostile_text_is_shown_and_never_read(tab, folder):
    fact = {
        "subject": f"A {HOSTILE[:25]}",
        "prompt": "{} is",
        "target": HOSTILE,
        "id": HOSTILE,
        "relation": HOSTILE,
    }
    tab.post("/edit/check", {**fact, "no_evaluate": "1", "do": "write"})
    assert events(folder) == 3, tab.site.worker.jobs[max(tab.site.worker.jobs)].error
    tab.post("/ask", {"prompt": HOSTILE, "target": HOSTILE})
    id_ = View(folder).facts()[-1].id
    pages = [
        "/",
        "/timeline",
        "/jobs",
        "/try",
        "/numbers",
        f"/jobs/{max(tab.site.worker.jobs)}",
        f"/?q={HOSTILE}",
    ]
    story = tab.client.get("/fact", params={"id": id_})
    form = tab.client.get("/edit", params={"id": id_, "how": "replace"})
    for page in [*map(tab.get, pages), story, form]:
        assert page.status_code == 200
        assert "<script>alert" not in page.text
        assert "<img src=x" not in page.text
        shown = re.sub(r"<(input|textarea)[^>]*>([^<]*</textarea>)?", "", page.text)
        assert "\u202e" not in shown, "it would turn what follows around"
        assert " 49" not in page.text
    assert "alert(1)" in story.text
    ids = re.findall(r'name="id" value="([^"]*)"', tab.get("/").text)
    assert html.unescape(ids[-1]) == id_ == HOSTILE
    tab.post("/change", {"kind": "undo", "id": html.unescape(ids[-1])})
    assert not View(folder).facts()[-1].active


def test_two_tabs_of_one_browser_do_not_lose_each_others_work(tab, folder):
    other = Browser(tab.client, tab.site)
    tab.post("/change", {"kind": "undo", "id": "ada"})
    said = text_of(other.post("/change", {"kind": "undo", "id": "ada"}))
    assert "no fact 'ada' in the model" in said
    other.post("/change", {"kind": "undo", "id": "zola"})
    assert {r.id for r in View(folder).facts() if r.active} == {"velm", "karo"}


def test_a_command_at_work_on_the_ledger_is_named_and_its_change_taken_up(tab, folder):
    tab.post("/ask", {"prompt": "Velm"})
    with Store(folder / "ledger").writing():
        said = text_of(tab.post("/change", {"kind": "undo", "id": "ada"}))
    assert "is writing to this ledger" in said
    Run.open(folder).undo("zola")
    tab.post("/change", {"kind": "undo", "id": "ada"})
    assert {r.id for r in View(folder).facts() if r.active} == {"velm", "karo"}


def test_a_stopped_edit_leaves_its_finished_batches(tab, folder, monkeypatch):
    facts = [
        {"subject": f"Person {i}", "prompt": "{} was born in", "target": "Ostrel"} for i in range(6)
    ]
    content = json.dumps(facts).encode()
    stopped = []

    def watch(self, message):
        self.lines.append(message)

    original = Store.commit

    def commit(store, history, stored):
        original(store, history, stored)
        for job in tab.site.worker.waiting():
            job.stopping = True
            stopped.append(job)

    monkeypatch.setattr(Store, "commit", commit)
    page = tab.post("/edit/check", {"do": "write"}, files={"file": ("f.json", content)})
    assert stopped
    assert "1 finished batch is kept" in text_of(page)
    assert events(folder) == 3
    assert len([r for r in View(folder).facts() if r.active]) == 6
    monkeypatch.undo()
    assert Run.open(folder).verify().passed


def test_a_run_begins_on_a_model_without_one(place, tmp_path):
    folder = tmp_path / "new"

    def opened(talk):
        editor = Editor.from_pretrained(
            str(place / "model"),
            recipe=load_recipe(place / "recipe.yaml"),
            statistics=place / "stats",
        )
        return Run.create(folder, editor, talk=talk)

    site = site_of(folder, opened)
    with client_of(site) as client:
        tab = Browser(client, site)
        for path in ("/", "/timeline", "/numbers", "/try", "/edit"):
            assert tab.get(path).status_code == 200
        assert "No fact is in the model yet" in tab.get("/").text
        tab.post("/ask", {"prompt": "Velm is"})
        tab.post("/edit/check", {**LONELY, "do": "preview"})
        for path, data in (
            *(("/measure", {"what": what}) for what in ("gates", "facts")),
            *(("/change", {"kind": kind}) for kind in ("redo", "restore", "rebuild")),
            *(("/foresee", {"kind": kind}) for kind in ("redo", "restore", "rebuild")),
            ("/retry", {"retry": "1"}),
            ("/diff", {"first": "0", "second": "0"}),
        ):
            assert "unexpected" not in text_of(tab.post(path, data)), path
        assert not folder.exists()
        tab.post("/edit/check", {**LONELY, "do": "write"})
        assert "flute" in tab.get("/").text
    assert Run.open(folder).verify().passed


def test_what_a_written_fact_says_is_told_before_its_evaluation(tab, folder):
    tab.post(
        "/edit/check",
        {"subject": "Lyra Holm", "prompt": "{} plays the", "target": "flute", "do": "write"},
    )
    job = tab.site.worker.jobs[max(tab.site.worker.jobs)]
    told = [
        i for i, line in enumerate(job.lines) if line.startswith("Written. Lyra Holm plays the … ")
    ]
    later = [i for i, line in enumerate(job.lines) if line.startswith("Evaluating 1 fact")]
    assert len(told) == 1
    assert told[0] < later[0]
    assert tab.get(f"/jobs/{job.number}/state").json()["over"]


def test_a_first_edit_that_is_stopped_leaves_no_folder_and_can_be_begun_again(
    place, tmp_path, monkeypatch
):
    folder = tmp_path / "new"
    editor = Editor.from_pretrained(
        str(place / "model"),
        recipe=load_recipe(place / "recipe.yaml"),
        statistics=place / "stats",
    )
    site = site_of(folder, lambda talk: Run.create(folder, editor, talk=talk))

    def stop(*_, **__):
        raise Stopped("stopped")

    with client_of(site) as client:
        tab = Browser(client, site)
        with monkeypatch.context() as patch:
            patch.setattr("nulledit.editing.batch_values.optimise_values", stop)
            said = text_of(tab.post("/edit/check", {**LONELY, "do": "write"}))
        assert "stopped; nothing was changed" in said
        assert not folder.exists()
        tab.post("/edit/check", {**LONELY, "do": "write"})
        assert "flute" in tab.get("/").text
    assert Run.open(folder).verify().passed


# -- parts --------------------------------------------------------------------------------------


def test_a_worker_goes_on_after_a_fault_with_the_run_loaded_anew(folder):
    opened = []
    worker = Worker(folder, lambda talk: opened.append(1) or Run.open(folder, talk=talk))
    worker.start()

    def fault(run, job):
        run.editor.undo("ada")
        raise RuntimeError("a fault of ours")

    bad = worker.submit("bad", fault)
    good = worker.submit("good", lambda run, job: Outcome([str(len(run.editor.facts))]))
    while not good.over:
        time.sleep(0.02)
    worker.stop()
    said = "unexpected RuntimeError: a fault of ours; 1 finished batch is kept"
    assert (bad.state, bad.error) == ("failed", said)
    assert len(opened) == 2
    assert good.state == "done"


def test_a_worker_goes_on_where_what_was_stopped_can_not_be_written(folder, monkeypatch):
    worker = Worker(folder, lambda talk: Run.open(folder, talk=talk))
    worker.start()

    def stopped(run, job):
        run.editor.undo("ada")
        raise Stopped("stopped")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "change", full)
        first = worker.submit("first", stopped)
        while not first.over:
            time.sleep(0.02)
    second = worker.submit("second", lambda run, job: Outcome([str(len(run.editor.facts))]))
    while not second.over:
        time.sleep(0.02)
    worker.stop()
    assert first.state == "stopped"
    assert "1 finished batch is kept, but the run's files do not follow yet" in first.error
    assert "No space left" in first.error
    assert second.state == "done"


def test_what_was_finished_before_an_error_is_told_and_written(folder):
    worker = Worker(folder, lambda talk: Run.open(folder, talk=talk))
    worker.start()

    def half(run, job):
        run.editor.undo("ada")
        raise LedgerError("no room for the second")

    job = worker.submit("half", half)
    while not job.over:
        time.sleep(0.02)
    worker.stop()
    assert job.error == "no room for the second; 1 finished batch is kept"
    assert Run.open(folder).verify().passed


def test_a_fact_replaced_by_a_form_keeps_what_forms_do_not_show(folder):
    history = Run.open(folder).history
    known = replace(
        history.present[0].fact,
        more_prompts=("They say that {} is", "You know that {} is"),
        neighbours=(Probe("The sea is", "blue", ("deep blue",)),),
        other_relations=(Probe("The mother of it is"),),
        portability=(Probe("So it is", "true"),),
        target_aliases=("here as well",),
    )
    columns = [replace(history.present[0], fact=known)]
    there = SimpleNamespace(present=columns)
    same = in_its_place(read_fact(filled(known)), there).facts.facts
    assert same == (known,)
    other = in_its_place(read_fact(filled(known) | {"target": "Ostrel"}), there).facts.facts[0]
    assert other.more_prompts == known.more_prompts
    assert other.other_relations == known.other_relations
    assert (other.target, other.target_aliases, other.portability) == ("Ostrel", (), ())
    gone = in_its_place(read_fact(filled(known) | {"forget": "1"}), there).facts.facts[0]
    assert (gone.target_aliases, gone.portability) == (known.target_aliases, ())
    another = read_fact(filled(known) | {"prompt": "{} lies in"})
    assert in_its_place(another, there) == another


def test_a_form_and_a_fact_say_the_same():
    given = {
        "subject": "France",
        "prompt": "The capital of {} is",
        "target": "Madrid",
        "old_answer": "Paris",
        "paraphrases": "France's capital is\n\nIn France you rule from",
        "neighbours": "The capital of Italy is => Rome\nA prompt alone\nOslo => capital of =>",
    }
    fact = read_fact(given).facts.facts[0]
    assert [(p.prompt, p.answer) for p in fact.neighbours] == [
        ("The capital of Italy is", "Rome"),
        ("A prompt alone", None),
        ("Oslo => capital of", None),
    ]
    assert read_fact(filled(fact)).facts.facts == (fact,)
    assert read_fact({**given, "forget": "1"}).facts.facts[0].forget
    assert read_upload("x.yaml", b"\xff\xfe\x00").errors["file"]
    assert read_upload("", b"").errors["file"]


def test_the_command_refuses_what_does_not_belong_together(place, folder, tmp_path):
    assert "can't be given with a run" in refused("ui", folder, "--out", tmp_path / "x")
    assert "if it is a model, give --out RUN" in refused("ui", place / "model")
    assert f"show it by: nulledit ui {folder}" in refused("ui", place / "model", "--out", folder)
    new = ("ui", place / "model", "--out", tmp_path / "x")
    assert "nosuch" in refused(*new, "--recipe", "nosuch")
    assert "nosuch" in refused(*new, "--stats", "nosuch")
    (tmp_path / "empty").mkdir()
    assert "neither a run nor a model" in refused("ui", tmp_path / "empty")
    assert "neither a run nor a model" in refused("ui", tmp_path / "empty", "--out", tmp_path / "x")


@pytest.mark.few(signal.SIGTERM, of="way")
@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_this_machine_alone_until_it_is_ended(folder, way):
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"{hears}; from nulledit.cli.main import main; main()"  # in a background, too
    words = [sys.executable, "-c", start, "ui", str(folder), "--json", "--quiet"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:  # else it would be waited for, whatever fails
            told = json.loads("".join(server.stdout.readline() for _ in range(4)))
            assert told["run_folder"] == str(folder)
            address = urlsplit(told["address"])
            assert address.hostname == "127.0.0.1"
            asked = HTTPConnection(address.hostname, address.port, timeout=60)
            asked.request("GET", "/")
            assert asked.getresponse().status == 403
            asked.close()
            asked.request("GET", f"/?{address.query}")
            first = asked.getresponse()
            assert (first.status, first.headers["location"]) == (303, "/")
            asked.close()
            server.send_signal(way)
            said = server.communicate(timeout=120)[1]
            assert server.returncode == 0, said
            assert "Traceback" not in said
        finally:
            server.kill()
