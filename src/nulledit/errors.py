"""The errors a user can meet, each with the exit code of the command line."""

from __future__ import annotations

from typing import Self


class NullEditError(Exception):
    """Something the user can put right; shown as one line."""

    exit_code = 2


class FactError(NullEditError):
    """A facts file or a record in it is bad."""


class BadRecordsError(FactError):
    """Records of a facts file are bad; the message tells the first, `problems` all of them."""

    def __init__(self, source: str, problems: tuple[str, ...], *, skippable: int, read_as: str):
        """`skippable`: how many `--skip-bad` would leave out; `read_as`: the file's format."""
        more = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
        ways = [f"read as {read_as}"] if read_as else []
        ways += ["--skip-bad leaves such records out"] if skippable else []
        way = f"; {'; '.join(ways)}" if ways else ""
        super().__init__(f"{source}: {problems[0]}{more}{way}")
        self.problems = problems


class ModelError(NullEditError):
    """A model is unknown, has no layout, or lacks the layer asked for."""


class StatisticsError(NullEditError):
    """Statistics of preserved keys are missing, too few or of another model."""


class ConfigError(NullEditError):
    """A recipe or a setting is bad."""


class LedgerError(NullEditError):
    """A ledger cannot be read, or does not hold what was asked for."""


class CheckFailed(NullEditError):
    """A check or gate ran and said no."""

    exit_code = 1


class ReportError(NullEditError):
    """A folder holds no run or study that a report can be made of, or a page is in the way."""


class NoRoomError(NullEditError):
    """Earlier edits have taken every direction that a new one could use."""


class SolveError(NullEditError):
    """A system has no solution in float64, as with settings that are many powers of ten apart."""


class HubError(NullEditError):
    """Something could not be put on the Hub."""


class RankError(NullEditError):
    """Another rank of the same launch is gone, has stopped, or has other data."""

    def __init__(
        self, message: str, *, missing: tuple[int, ...] = (), lost: bool = False, code: int = 2
    ):
        """`missing`: ranks that can't speak; `lost`: nobody erred, so that a restart goes on."""
        super().__init__(message)
        self.missing, self.lost, self.exit_code = missing, lost or bool(missing), code
        self.is_advised = False

    def advised(self, advice: str) -> Self:
        """The same error with what to do about it, where a restart goes on; the first advice."""
        said = f"{self}; {advice}" if self.lost and not self.is_advised else str(self)
        told = type(self)(said, missing=self.missing, lost=self.lost, code=self.exit_code)
        told.is_advised = True
        return told
