"""An export on the Hugging Face Hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from nulledit.errors import ConfigError, HubError
from nulledit.models.hub import hub_answers


def check_repo(repo: str) -> None:
    """ConfigError where `repo` can be no name of a repository, such as me/model."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo!r} is no name of a repository: {error}") from error


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload the files of `folder`, a card among them, to the Hub's repository `repo`; its address.

    The repository is made if there is none, `private` if asked. HubError, with the command that
    does it later, where the Hub can't be reached or refuses; `folder` stays as it is.
    """
    check_repo(repo)
    later = f"{folder} is written; to share it: {upload_command(folder, repo, private=private)}"
    if not hub_answers():
        raise HubError(f"{constants.ENDPOINT} can't be reached; {later}")
    api = HfApi()
    try:
        as_asked = private or None  # None: as the owner has it for new ones
        made = api.create_repo(repo, private=as_asked, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Edits by nulledit"
        )
    except Exception as error:  # its client has many kinds, and those of the library below
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise HubError(f"{repo}: the Hub refused ({said}); {later}") from error
    return made.url


def upload_command(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """The command that uploads `folder` without nulledit."""
    words = ["hf", "upload", repo, str(folder), *["--private"] * private]
    return shlex.join(words)
