"""`nulledit mcp`: a run for agents, by the Model Context Protocol."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nulledit.cli.command import Call, command
from nulledit.cli.options import DEVICE, RUN, TRUST, opt
from nulledit.errors import LedgerError


@command(
    "Serve a run to agents, by the Model Context Protocol.",
    RUN,
    opt("--allow-edit", "Offer edit, undo and redo, too; without it tools only read.", bool),
    opt("--limits FILE|default", "What check asks, and what every edit must keep.", str, "default"),
    opt("--text FILE", "For perplexity and KL.  [default: one that comes with nulledit]"),
    DEVICE,
    TRUST,
)
def mcp(call: Call) -> None:
    """Serve the tools ask, facts, fact, log, preview and check on stdin and stdout.

    A client starts this command. The model is loaded by the first call, each call has the ledger as
    it is then, and an edit that would break a limit writes nothing. Install the SDK first: pip
    install 'nulledit[mcp]'.

    \b
    $ nulledit mcp run
    $ nulledit mcp run --allow-edit --limits limits.yaml
    """
    from nulledit.agents.server import Desk, server_of
    from nulledit.api.run import Run
    from nulledit.runs.limits import load_limits

    folder = Path(call.run)
    if not (folder / "ledger" / "ledger.db").is_file():
        raise LedgerError(f"{folder}: no run here (expected {folder / 'ledger' / 'ledger.db'})")
    limits = load_limits(call.limits)
    opened = partial(Run.open, device=call.device, trust_remote_code=call.trust_remote_code)
    server = server_of(Desk(folder, opened), limits, allow_edit=call.allow_edit, text=call.text)
    call.prepare()
    call.say(f"Serving {folder} on stdin and stdout; Ctrl-C ends it")
    server.run("stdio")
