"""Write requirements.lock and requirements-dev.lock: the versions that the set-up installs.

Resolves pyproject.toml's ranges in a fresh environment. torch is pinned first, because a loose
`torch` resolves to a build with gigabytes of accelerator libraries on machines that have none.
"""

import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = "torch==2.13.0"
HEADER = (
    "# Made by `make lock` from pyproject.toml. Install with pip; the ranges there stay open.\n"
)


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        install(python, TORCH)
        install(python, *project["dependencies"], *extras["embedded"], *build, "editables")
        base = freeze(python)
        install(python, *extras["dev"])
        dev = [line for line in freeze(python) if line not in base]
    (ROOT / "requirements.lock").write_text(HEADER + "\n".join(base) + "\n")
    (ROOT / "requirements-dev.lock").write_text(HEADER + "\n".join(dev) + "\n")


def install(python: Path, *requirements: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)


def freeze(python: Path) -> list[str]:
    command = [python, "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    skipped = ("pip==", "setuptools==", "wheel==")
    # A local version such as 2.13.0+cpu names one machine's build, not the release.
    return sorted(line.split("+")[0] for line in listed if not line.startswith(skipped))


if __name__ == "__main__":
    sys.exit(main())
