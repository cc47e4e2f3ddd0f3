"""The errors a user can meet, each with the exit code of the command line."""


class NullEditError(Exception):
    """Something the user can put right; shown as one line."""

    exit_code = 2


class FactError(NullEditError):
    """A facts file or a record in it is bad."""


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
