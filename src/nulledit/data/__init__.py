"""Facts: what they are, and files of them."""

from nulledit.data.facts import Fact, Probe
from nulledit.data.readers import FactFile, parse_records, read_facts

__all__ = ["Fact", "FactFile", "Probe", "parse_records", "read_facts"]
