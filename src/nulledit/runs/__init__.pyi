from nulledit.runs.gate import check as check
from nulledit.runs.gate_report import GateReport as GateReport
from nulledit.runs.gate_report import Row as Row
from nulledit.runs.limits import Limits as Limits
from nulledit.runs.limits import load_limits as load_limits
from nulledit.runs.warnings import warnings_of as warnings_of
