"""`nulledit mcp`: a run's tools, asked by the SDK's own client."""

import asyncio
import json
import shutil
import sys

import pytest
from support.cli import edit_all, refused

from nulledit import Editor
from nulledit.api.run import Run
from nulledit.runs.limits import Limits

pytest.importorskip("mcp", reason="needs the extra mcp")
import mcp

from nulledit.agents.server import Desk, server_of

READS = {"ask", "facts", "fact", "log", "preview", "check"}
WRITES = {"edit", "undo", "redo"}
NEW = {"id": "new", "subject": "Velm", "prompt": "{} is a", "target": "town"}


@pytest.fixture(scope="module")
def edited(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mcp") / "run"
    edit_all(place, folder)
    return folder


@pytest.fixture
def run(edited, tmp_path):
    return shutil.copytree(edited, tmp_path / "run")


def loose():
    return Limits.from_dict({"efficacy_strict": {"at_least": 0}})


def asked(server, *calls):
    """What each call gives: plain data, or the error as text."""

    async def all_of_them():
        async with mcp.Client(server) as client:
            found = []
            for name, given in calls:
                result = await client.call_tool(name, given)
                text = result.content[0].text
                found.append(
                    text if result.is_error else result.structured_content or json.loads(text)
                )
            return found

    return asyncio.run(all_of_them())


def names(server):
    async def listed():
        async with mcp.Client(server) as client:
            return {t.name: t for t in (await client.list_tools()).tools}

    return asyncio.run(listed())


def test_tools_read_unless_editing_is_allowed(run):
    found = names(server_of(Desk(run), loose()))
    assert set(found) == READS
    assert all(tool.annotations.read_only_hint for tool in found.values())
    found = names(server_of(Desk(run), loose(), allow_edit=True))
    assert set(found) == READS | WRITES
    assert {n for n, t in found.items() if not t.annotations.read_only_hint} == WRITES


def test_what_tools_say_is_what_the_run_says(run, place):
    text = str(place / "corpus.txt")
    server = server_of(Desk(run), loose(), text=text)
    prompt = "The mother tongue of Ada Byron is"
    ask, facts, some, fact, log, preview, check = asked(
        server,
        ("ask", {"prompt": prompt, "target": "Velmish"}),
        ("facts", {}),
        ("facts", {"search": "ada"}),
        ("fact", {"id": "ada"}),
        ("log", {}),
        ("preview", {"facts": [NEW], "undo": ["zola"]}),
        ("check", {}),
    )
    held = Run.open(run)
    assert ask == json.loads(json.dumps(held.ask(prompt, "Velmish").to_dict()))
    assert facts["count"] == len(held.editor.facts)
    assert [f["id"] for f in some["facts"]] == ["ada"]
    assert fact["fact"]["target"] == "Velmish"
    assert len(log["events"]) == len(held.history.events)
    assert check["passed"]
    assert json.dumps(preview)
    assert Run.open(run).history.state_id == held.history.state_id, "nothing was written"


def test_edit_and_undo_are_the_runs(run, place):
    text = str(place / "corpus.txt")
    before = Editor.load(run).history
    server = server_of(Desk(run), loose(), allow_edit=True, text=text)
    written, again, undone, back = asked(
        server,
        ("edit", {"facts": [NEW]}),
        ("edit", {"facts": [NEW]}),
        ("undo", {"ids": ["new"]}),
        ("redo", {}),
    )
    assert (written["written"], written["facts"][0]["id"]) == (1, "new")
    assert again["written"] == 0
    assert undone["removed"] == ["new"]
    assert back["restored"] == ["new"]
    assert len(Editor.load(run).history.events) == len(before.events) + 3
    assert (run / "results.jsonl").read_text().count('"new"') >= 1


def test_a_limit_that_would_break_writes_nothing(run, place):
    before = Editor.load(run).history.state_id
    limits = Limits.from_dict({"kl": {"at_most": 1e-12}})
    server = server_of(Desk(run), limits, allow_edit=True, text=str(place / "corpus.txt"))
    said, facts = asked(server, ("edit", {"facts": [NEW]}), ("facts", {"search": "new"}))
    assert "kl failed; no model was written" in said
    assert facts["count"] == 0, "nor kept in memory"
    assert Editor.load(run).history.state_id == before


def test_errors_are_one_line_and_the_desk_goes_on(run):
    opened = []

    def opening(folder):
        opened.append(folder)
        return Run.open(folder)

    server = server_of(Desk(run, opening), loose(), allow_edit=True)
    unknown, wrong, none, few, facts = asked(
        server,
        ("undo", {"ids": ["nobody"]}),
        ("edit", {"facts": [{"subject": "x"}]}),
        ("edit", {"facts": []}),
        ("ask", {"prompt": "Ada Byron", "max_tokens": -1}),
        ("facts", {}),
    )
    assert "there are none" in none
    assert "max_tokens is -1; expected" in few
    assert "--" not in wrong, "options are of the command line"
    assert "nobody" in unknown
    assert "\n" not in unknown
    assert "prompt" in wrong
    assert facts["count"]
    assert len(opened) == 1, "a mistake of the caller loads no model again"


def test_what_another_process_did_is_there_in_the_next_call(run):
    desk = Desk(run)
    server = server_of(desk, loose())
    (first,) = asked(server, ("facts", {}))
    Run.open(run).undo("ada")
    (then,) = asked(server, ("facts", {}))
    assert {f["id"] for f in first["facts"]} - {f["id"] for f in then["facts"]} == {"ada"}


def test_a_client_starts_the_command(run):
    command = mcp.StdioServerParameters(
        command=sys.executable, args=["-m", "nulledit", "mcp", str(run), "--quiet"]
    )
    (facts,) = asked(command, ("facts", {"search": "ada"}))
    assert [fact["id"] for fact in facts["facts"]] == ["ada"]


def test_what_cannot_be_served_is_refused(run, tmp_path):
    assert "no run here" in refused("mcp", tmp_path / "nothing")
    assert "nowhere.yaml" in refused("mcp", run, "--limits", "nowhere.yaml")
