"""Exports on the Hub: a small server that speaks its interface, and one that is not there."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.cli import done, invoke, refused

from nulledit.errors import ConfigError
from nulledit.export.push import check_repo, push


class Hub(BaseHTTPRequestHandler):
    """Makes repositories and takes files, all of them as they are (none by LFS)."""

    def do_HEAD(self):
        self._answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.server
        hub.asked.append(self.path)
        if hub.refuses:
            self._answer({"error": "You don't have the rights"}, 403)
        elif self.path == "/api/repos/create":
            hub.made = json.loads(body)
            name = f"{hub.made.get('organization', 'me')}/{hub.made['name']}"
            self._answer({"url": f"{hub.address}/{name}", "name": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular"} for f in files]
            self._answer({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                told = json.loads(line)
                if told["key"] == "file":
                    content = base64.b64decode(told["value"]["content"])
                    hub.files[told["value"]["path"]] = content
            said = {"commitUrl": f"{hub.address}/me/x/commit/1", "commitOid": "1"}
            self._answer(said | {"pullRequestUrl": None})
        else:  # such as the check of a card
            self._answer({"errors": [], "warnings": []})

    def do_GET(self):
        self._answer({"name": "me", "type": "user", "sha": "0", "siblings": [], "id": "me/x"})

    def _answer(self, told, code=200):
        body = json.dumps(told).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.asked, server.made, server.refuses = {}, [], None, False
    _at(monkeypatch, server.address)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _at(monkeypatch, address):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        for spelt in (name, name.lower()):
            monkeypatch.delenv(spelt, raising=False)


def unshared(*words):
    """The error of an export that is written and told of, but not uploaded."""
    result = invoke("export", *words, "--quiet")
    assert result.exit_code == 2
    assert "Base + delta is the run's model to the bit." in result.stdout
    (line,) = result.stderr.splitlines()
    return line


def test_what_is_written_is_what_is_uploaded(edited, tmp_path, hub):
    out = tmp_path / "adapter"
    words = ("--as", "lora", "--out", out, "--push", "me/x", "--private", "--json")
    told = json.loads(done("export", edited, *words).stdout)
    assert told["address"] == f"{hub.address}/me/x"
    assert hub.made.get("private") or hub.made.get("visibility") == "private", hub.made
    wanted = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= wanted.keys()
    assert hub.files == wanted


def test_without_the_hub_the_folder_is_written_and_the_command_said(edited, tmp_path, monkeypatch):
    _at(monkeypatch, "http://127.0.0.1:9")  # nobody is there
    out = tmp_path / "delta"
    line = unshared(edited, "--out", out, "--push", "me/x")
    assert "http://127.0.0.1:9 can't be reached" in line
    assert line.endswith(f"{out} is written; to share it: hf upload me/x {out}")
    assert (out / "delta.safetensors").is_file()


def test_who_may_see_it_is_left_to_the_owner(edited, tmp_path, hub):
    done("export", edited, "--out", tmp_path / "d", "--push", "me/x", "--quiet")
    assert not {"private", "visibility"} & hub.made.keys()


def test_a_refusal_of_the_hub_is_one_line(edited, tmp_path, hub):
    hub.refuses = True
    line = unshared(edited, "--out", tmp_path / "d", "--push", "me/x")
    assert "me/x: the Hub refused (" in line
    assert f"hf upload me/x {tmp_path / 'd'}" in line
    assert (tmp_path / "d" / "README.md").is_file()


@pytest.mark.parametrize("name", ["", "a/b/c", "me/", "-me/x", "me x", "me/x.git"])
def test_a_bad_name_is_told_before_anything_is_written(name, edited, tmp_path, hub):
    with pytest.raises(ConfigError, match="is no name of a repository"):
        check_repo(name)
    with pytest.raises(ConfigError, match="is no name of a repository"):
        push(tmp_path, name)
    if name:
        refused("export", edited, "--out", tmp_path / "d", f"--push={name}", "--quiet")
    assert not (tmp_path / "d").exists()
    assert hub.asked == []


def test_private_is_of_a_repository(edited, tmp_path):
    assert "give --push as well" in refused("export", edited, "--out", tmp_path / "d", "--private")
