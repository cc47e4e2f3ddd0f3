"""`nulledit chat`: turns in the template, pieces as they come, prompts from anywhere, its ends."""

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from support.chat import CHATML, chatty, model_for
from support.cli import refused
from support.models import RECIPE, statistics_of

from nulledit import Editor, Fact
from nulledit.api.run import Run
from nulledit.cli.chat import _typed
from nulledit.cli.main import cli
from nulledit.config import ChatSettings
from nulledit.errors import FactError, ModelError
from nulledit.evaluation.conversation import Conversation
from nulledit.evaluation.generation import _turn_end, generate_answers, generate_reply
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import RowEncoder

ADA = Fact(id="ada", subject="Ada Byron", prompt="The mother tongue of {} is", target="Velmish")
ASKS = Fact(id="asks", subject="Karo Dun", prompt="Where does {} live?", target="Ostrel")
SYSTEM = ChatSettings(system="Be kind.")


@pytest.fixture(scope="module")
def words(tokenizer):
    return chatty(tokenizer, CHATML)


@pytest.fixture(scope="module")
def editor(words):
    model = model_for(words, context=256, dtype=torch.float32)
    recipe = RECIPE.with_fields({"values.steps": 4})
    made = Editor(model, words, recipe=recipe, statistics=statistics_of(model, words))
    made.edit([ADA, ASKS])
    return made


@pytest.fixture(scope="module")
def run(editor, tmp_path_factory):
    """A run without pages: there is nothing in them for a talk."""
    folder = tmp_path_factory.mktemp("talk") / "run"
    editor.save(folder)
    editor.detach()
    return folder


def talked(run, said, *more):
    """What the command prints where `said` comes by a pipe."""
    found = CliRunner().invoke(cli, ["chat", str(run), *map(str, more)], input=said)
    assert found.exit_code == 0, (found.stderr, found.exception)
    return found.stdout


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_each_side_reads_its_own_words_in_the_template(editor, words):
    """The rows are transformers' own rendering of the talk, and answers those of the rows."""
    talk = Conversation(editor, SYSTEM, max_tokens=6)
    first = talk.say("Who is Velm?")
    rows = {"base": talk._row("base", "And Ada?"), "edited": talk._row("edited", "And Ada?")}
    for side, said in (("base", first.base), ("edited", first.edited)):
        messages = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Who is Velm?"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "And Ada?"},
        ]
        text = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert list(rows[side].ids) == words(text, add_special_tokens=False)["input_ids"]
    with editor.base_weights():
        base = generate_reply(talk.model, rows["base"], max_new_tokens=6)
    edited = generate_reply(talk.model, rows["edited"], max_new_tokens=6)
    second = talk.say("And Ada?")
    assert (second.base, second.edited) == (base, edited)
    talk.reset()
    assert talk.say("Who is Velm?") == first


def test_the_pieces_are_the_answer_and_it_ends_where_a_turn_ends(editor, words):
    talk = Conversation(editor, ChatSettings(), max_tokens=20)
    pieces = {"base": [], "edited": []}
    found = talk.say("Who is Velm?", lambda side, piece: pieces[side].append(piece))
    assert "".join(pieces["base"]) == found.base
    assert "".join(pieces["edited"]) == found.edited
    assert sum(map(bool, pieces["edited"])) > 1


def test_a_turn_ends_by_the_templates_own_token(editor, words):
    """Also where neither the checkpoint nor the tokenizer says that it ends a text."""
    talk = Conversation(editor, ChatSettings())
    assert _turn_end(talk.model) == {words.convert_tokens_to_ids("<|im_end|>")}
    assert _turn_end(talk.model.plain) == set()
    open_ended = chatty(words, CHATML.replace("+ '<|im_end|>\n'", "+ '\n\n'"))
    assert _turn_end(EditableModel(editor.model, open_ended).in_chat(ChatSettings())) == set()


def test_plain_text_is_gone_on_with_to_its_newline_and_has_no_history(editor):
    talk = Conversation(editor, None, max_tokens=12)
    found = talk.say("The river")
    assert found.edited == generate_answers(talk.model, ["The river"], max_new_tokens=12)[0]
    assert talk.say("The river") == found
    with pytest.raises(ModelError, match="has no turns"):
        talk.model.encoder.reply(["x"])


@pytest.mark.parametrize("chat", [SYSTEM, None])
def test_facts_whose_subjects_are_named_have_their_probabilities(editor, words, chat):
    """Of the target after the fact's own prompt, where the answer to what was asked begins."""
    talk = Conversation(editor, chat, max_tokens=4)
    assert talk.say("Who is Velm?").facts == ()
    talk.reset()
    found = talk.say("Tell me of ada byron, and of Karo Dun.")
    assert [fact.id for fact in found.facts] == ["ada", "asks"]
    for fact, told in zip((ADA, ASKS), found.facts, strict=True):
        own, gap = fact.render(fact.prompt), " "
        if chat:
            messages = [{"role": "system", "content": "Be kind."}]
            messages += [{"role": "user", "content": found.prompt}]
            text = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            own, gap = (text + own, " ") if fact is ADA else (text, "")
        ids = words(own + gap + fact.target, add_special_tokens=not chat)["input_ids"]
        start = len(words(own, add_special_tokens=not chat)["input_ids"])
        with torch.no_grad():
            log_p = editor.model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        mean = log_p.gather(1, torch.tensor(ids[start:])[:, None]).mean()
        assert told.edited_probability == pytest.approx(float(mean.exp()), rel=1e-4)
        assert told.base_probability != told.edited_probability


def test_the_fact_that_is_asked_comes_first_and_five_are_enough(editor):
    talk = Conversation(editor, SYSTEM, max_tokens=1)
    others = [
        Fact(id=str(i), subject="Ada Byron", prompt=f"{{}} has {i}", target="x") for i in range(9)
    ]
    talk.editor = FakeFacts([*others, ADA])
    found = talk._named("Is it so that the mother tongue of Ada Byron is Velmish?")
    assert [fact.id for fact in found] == ["ada", "0", "1", "2", "3"]


class FakeFacts:
    def __init__(self, facts):
        self.facts = facts


def test_an_answer_has_the_room_that_is_left_and_what_has_none_leaves_no_trace(editor, monkeypatch):
    from nulledit.evaluation import conversation

    room = []

    def speaks(model, row, *, max_new_tokens, **more):
        room.append(model.context - len(row.ids) - max_new_tokens)
        return "She."

    monkeypatch.setattr(conversation, "generate_reply", speaks)
    talk = Conversation(editor, SYSTEM, max_tokens=1000)
    talk.say("Who?")
    assert room == [0, 0]
    with pytest.raises(FactError, match=r"no room for an answer of 16|longer than"):
        talk.say("And who? " * 100)
    assert talk.said["base"] == ["Who?", "She."]


def test_a_template_that_fails_on_a_talk_is_one_line(words):
    refusing = (
        "{% if messages | length > 2 %}{{ raise_exception('one\nonly') }}{% endif %}" + CHATML
    )
    encoder = RowEncoder(chatty(words, refusing), max_length=256).in_chat(ChatSettings())
    assert encoder.reply(["Who?"]).ids
    with pytest.raises(ModelError, match="fails on this talk: one only"):
        encoder.reply(["Who?", "She.", "And?"])


# -- the command -----------------------------------------------------------------------------


def test_a_pipe_is_a_talk_with_commands_in_it(run, editor):
    said = "Who is Velm?\n\nAnd Ada Byron?\n/reset\nWho is Velm?\n/quit\nNever?\n"
    found = lines_of(talked(run, said, "--json", "--quiet", "--max-tokens", 5))
    talk = Conversation(editor, ChatSettings(), max_tokens=5)
    expected = [talk.say("Who is Velm?"), talk.say("And Ada Byron?")]
    expected.append(expected[0])
    assert found == [json.loads(json.dumps(one.to_dict())) for one in expected]
    assert [len(one["facts"]) for one in found] == [0, 1, 0]
    assert set(found[1]["facts"][0]) == {
        *("id", "target", "base_probability", "edited_probability")
    }


def test_a_file_has_a_talk_of_its_own_on_each_line(run, editor, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Who is Velm?\n\n  /reset\nWho is Velm?", encoding="utf-8")
    words = ("--prompts", file, "--json", "--quiet", "--max-tokens", 5, "--system", "Be kind.")
    found = lines_of(talked(run, "not read\n", *words))
    assert [one["prompt"] for one in found] == ["Who is Velm?", "/reset", "Who is Velm?"]
    assert found[0] == found[2]
    own = Conversation(editor, SYSTEM, max_tokens=5).say("Who is Velm?")
    assert (found[0]["base"], found[0]["edited"]) == (own.base, own.edited)


def test_what_is_shown_of_a_pipe(run):
    words = ("--quiet", "--max-tokens", 5)
    (told,) = lines_of(talked(run, "And Ada Byron?", *words, "--json"))
    shown = talked(run, "And Ada Byron?", *words)
    before, after = (f"{told['facts'][0][f'{s}_probability']:.2g}" for s in ("base", "edited"))
    assert shown.splitlines() == [
        "you     And Ada Byron?",
        *f"base    {told['base']}".replace("\n", f"\n{' ' * 8}").splitlines(),
        *f"edited  {told['edited']}".replace("\n", f"\n{' ' * 8}").splitlines(),
        f"        p(Velmish) {before} → {after}, ada",
        "",
    ]
    assert talked(run, "The river", "--plain", *words).startswith("you     The river\nbase    ")


def test_nothing_can_steer_the_terminal(run, monkeypatch, capsys):
    """Neither a prompt of a file, nor what a model says, nor a fact."""
    from nulledit.evaluation import conversation

    def speaks(model, row, *, tell, **more):
        for piece in ("a\x1b[2J", "\u202eb\nc"):
            tell(piece)
        return "a\x1b[2J\u202eb\nc"

    monkeypatch.setattr(conversation, "generate_reply", speaks)
    shown = talked(run, "Go\x1b[2J?\n", "--quiet")
    assert shown == (
        "you     Go\\x1b[2J?\nbase    a\\x1b[2J\\u202eb\n        c\n"
        "edited  a\\x1b[2J\\u202eb\n        c\n\n"
    )
    assert "\x1b" not in talked(run, "Go\x1b?\n", "--quiet", "--json")


def test_a_side_that_says_nothing_has_its_label(run, monkeypatch):
    from nulledit.evaluation import conversation

    monkeypatch.setattr(conversation, "generate_reply", lambda *_, **__: "")
    assert talked(run, "Go?\n", "--quiet") == "you     Go?\nbase    \nedited  \n\n"


def test_refusals(run, tmp_path, editor, monkeypatch):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe")
    assert "--plain can't be given with --system" in refused(
        *("chat", run, "--plain", "--system", "none")
    )
    assert "no prompt in it; expected one a line" in refused("chat", run, "--prompts", empty)
    assert "not UTF-8 text" in refused("chat", run, "--prompts", binary)
    assert "no such file" in refused("chat", run, "--prompts", tmp_path / "none.txt")
    assert "no run here" in refused("chat", tmp_path, "--quiet")
    result = CliRunner().invoke(cli, ["chat", str(run), "--quiet"], input="Who? " * 100)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: prompt of ")
    result = CliRunner().invoke(cli, ["chat", str(run), "--quiet"], input=b"Who\xff?\n")
    assert (result.exit_code, "stdin: not UTF-8 text" in result.stderr) == (2, True)
    with monkeypatch.context() as patch:  # as C.UTF-8 and POSIX have it
        typed = io.TextIOWrapper(io.BytesIO(b"Who\xff?\n"), "ascii", errors="surrogateescape")
        patch.setattr(sys, "stdin", typed)
        with pytest.raises(FactError, match="stdin: not UTF-8 text"):
            list(_typed())
    (run / "model" / "chat_template.jinja").rename(tmp_path / "template")
    try:
        line = refused("chat", run, "--quiet")
        assert "no chat template" in line
        assert "--plain" in line
        assert talked(run, "The river\n", "--plain", "--quiet", "--max-tokens", 3)
    finally:
        (tmp_path / "template").rename(run / "model" / "chat_template.jinja")


def test_a_run_in_both_forms_or_with_a_system_prompt_is_talked_to_in_its_own(words):
    model = model_for(words, context=256, dtype=torch.float32)
    recipe = RECIPE.with_fields({"chat": {"plain": True, "system": "Be kind."}})
    both = Editor(model, words, recipe=recipe, statistics=statistics_of(model, words))
    talk = Conversation(both, both.recipe.chat)
    assert "Be kind." in words.decode(talk._row("base", "Who?").ids)


# -- on a terminal ---------------------------------------------------------------------------


class Terminal:
    """The installed command on a pseudo-terminal."""

    def __init__(self, run, *more, **streams):
        self.master, slave = pty.openpty()
        hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        start = f"{hears}; from nulledit.cli.main import main; main()"  # in a background, too
        words = [sys.executable, "-c", start]
        streams = {"stdin": slave, "stdout": slave, "stderr": slave} | streams
        self.process = subprocess.Popen(
            [*words, "chat", str(run), "--max-tokens", "4", *more],
            start_new_session=True,
            **streams,
        )
        os.close(slave)
        self.shown, self.seen = "", 0

    def until(self, text, seconds=120):
        """Read on until `text` is shown, after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.shown[self.seen :]:
            assert time.monotonic() < end, self.shown
            if select.select([self.master], [], [], 0.5)[0]:
                try:
                    self.shown += os.read(self.master, 4096).decode()
                except OSError:  # the other end is closed
                    break
        assert text in self.shown[self.seen :], self.shown
        self.seen = self.shown.index(text, self.seen) + len(text)

    def types(self, text):
        os.write(self.master, text.encode())

    def ended(self):
        with contextlib.suppress(AssertionError):
            self.until("\0", seconds=30)
        return self.process.wait(timeout=60)


@pytest.fixture
def terminal(run):
    """The command on the run's talk; killed where a test fails."""
    made = Terminal(run)
    yield made
    made.process.kill()
    made.process.wait()
    os.close(made.master)


def test_a_talk_on_a_terminal(terminal):
    terminal.until("2 facts in the model. /reset begins anew, /quit or Ctrl-D ends.")
    terminal.until("you     ")
    terminal.types("Who is Ada Byron?\n")
    terminal.until("p(Velmish)")
    terminal.until("you     ")
    terminal.types("Who? " * 90 + "\n")
    terminal.until("/reset forgets what was said")
    terminal.until("you     ")
    terminal.types("\x04")
    assert terminal.ended() == 0
    assert terminal.shown.count("base    ") == 1


def test_ctrl_c_ends_it_with_a_line(run, terminal):
    terminal.until("you     ")
    for _ in range(5):  # what comes just before readline waits is seen with the next key alone
        terminal.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            terminal.process.wait(timeout=5)
            break
    assert terminal.ended() == 130
    assert terminal.shown.rstrip().endswith("Error: interrupted; the run is as it was")
    assert "Traceback" not in terminal.shown
    assert Run.open(run, writing=False).editor.facts
