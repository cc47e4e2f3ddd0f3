"""Builds the documentation's site, `make site`, from docs/ and the code, into build/site.

The pages are those of docs/; the reference of commands, settings and Python is made of help texts,
types and docstrings, so it can't say anything else than the code. Nothing of it needs a network.
"""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click

from nulledit.cli.main import SECTIONS
from nulledit.cli.methods import field_docs

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
SETTINGS = {
    "Recipes": ("nulledit.config", "Recipe"),
    "Values": ("nulledit.config", "ValueSettings"),
    "Contexts": ("nulledit.config", "ContextSettings"),
    "Null space": ("nulledit.config", "NullSpaceSettings"),
    "Method": ("nulledit.config", "MethodSettings"),
    "Chat": ("nulledit.config", "ChatSettings"),
    "Statistics": ("nulledit.config", "StatisticsSettings"),
    "Facts": ("nulledit.data.facts", "Fact"),
    "Jobs": ("nulledit.api.job", "Job"),
    "A job's exports": ("nulledit.api.job", "ExportJob"),
}
"""Heading -> what a file or a section of one may hold."""


def commands_page():
    """Every command with its help, in the order of `nulledit --help`."""
    parts = ["# Commands\n\nMade of the commands' own help.\n"]
    for title, commands in SECTIONS.items():
        parts.append(f"## {title}\n")
        for command in commands:
            for name, found in leaves(f"nulledit {command.name}", command):
                context = click.Context(found, info_name=name)
                parts.append(f"### `{name}`\n\n```text\n{found.get_help(context).rstrip()}\n```\n")
    return "\n".join(parts)


def leaves(name, command):
    """A command, or those of a group."""
    if not isinstance(command, click.Group):
        return [(name, command)]
    return [
        leaf for sub, c in sorted(command.commands.items()) for leaf in leaves(f"{name} {sub}", c)
    ]


def settings_page():
    """The fields of files, from their types and docstrings."""
    parts = ["# Settings\n\nMade of the types that check the files.\n"]
    for title, (module, name) in SETTINGS.items():
        cls = getattr(__import__(module, fromlist=[name]), name)
        docs = field_docs(cls)
        parts.append(f"## {title}\n\n{sentence(cls.__doc__)}\n\n| field | what |\n| --- | --- |")
        parts += [f"| `{field}` | {cell(about)} |" for field, about in docs.items()]
        parts.append("")
    return "\n".join(parts)


def python_page():
    """The public names of `nulledit`, with signatures and docstrings."""
    import nulledit

    parts = [
        "# Python\n\nMade of docstrings. `nulledit` has these names; examples are in "
        "[In Python](../python.md).\n"
    ]
    for name in sorted(nulledit.__all__):
        found = getattr(nulledit, name)
        if not callable(found):
            continue
        parts.append(f"## `{name}`\n\n{described(found)}\n")
        if not inspect.isclass(found):
            continue
        for own, member in inspect.getmembers(found):
            is_own = inspect.isroutine(member) or isinstance(member, property)
            if not own.startswith("_") and is_own and inspect.getdoc(member):
                parts.append(f"### `{name}.{own}`\n\n{described(member)}\n")
    return "\n".join(parts)


def described(found):
    """A signature and a docstring."""
    try:
        head = f"```python\n{found.__name__}{inspect.signature(found)}\n```\n\n"
    except (TypeError, ValueError, AttributeError):
        head = ""
    return head + (inspect.getdoc(found) or "")


def sentence(text):
    return inspect.cleandoc(text or "").split("\n\n")[0].replace("\n", " ")


def cell(text):
    return " ".join(text.split()).replace("|", "\\|")


REFERENCE = {"commands.md": commands_page, "settings.md": settings_page, "python.md": python_page}


def write(folder):
    """The site's sources: docs/, the README as its first page, and the reference."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder)
    (folder / "reference").mkdir()
    for name, made in REFERENCE.items():
        (folder / "reference" / name).write_text(made(), encoding="utf-8")
    for page in folder.rglob("*.md"):
        page.write_text(outside(page.read_text(encoding="utf-8"), page.parent, folder), "utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (folder / "index.md").write_text(
        outside(readme.replace("](docs/", "]("), folder, folder), "utf-8"
    )


def outside(text, place, folder):
    """Links to files beside docs/ become their names: the site has no place for them."""

    def kept(match):
        target = match[2].partition("#")[0]
        if "://" in target or not target or (place / target).exists():
            return match[0]
        return f"`{match[1]}`" if "`" not in match[1] else match[1]

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", kept, text)


def main():
    write(BUILD / "docs")
    words = [str(Path(sys.executable).parent / "zensical"), "build", "--clean"]
    subprocess.run([*words, "--config-file", str(ROOT / "zensical.toml")], check=True, cwd=ROOT)
    pages = len(list((BUILD / "site").rglob("*.html")))
    print(f"{pages} pages in {(BUILD / 'site').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
