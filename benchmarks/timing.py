"""Seconds and memory of two sides that take turns at the same work."""

import os
import statistics
import time
from pathlib import Path

import torch

REFERENCE, OURS = "reference", "nulledit"


class Clock:
    """CPU and wall seconds by stage and side, and the most memory a side took."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.cpu, self.wall, self.peak = {}, {}, {}

    def time(self, stage, side, work):
        """`work()`, timed; work on an accelerator is waited for."""
        self._settle()
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        name = stage, side
        self.cpu.setdefault(name, []).append(time.process_time() - cpu)
        self.wall.setdefault(name, []).append(time.perf_counter() - wall)
        self.peak[name] = max(self.peak.get(name, 0.0), self._peak())
        return result

    def median(self, stage, side, *, wall=False):
        """Median seconds of `side`; on an accelerator, where it computes, always wall time."""
        wall = wall or self.device.type != "cpu"
        return statistics.median((self.wall if wall else self.cpu)[stage, side])

    def ratio(self, stage):
        """How many times less the library takes."""
        return self.median(stage, REFERENCE) / self.median(stage, OURS)

    def row(self, stage, unit, per=1.0, sides=(REFERENCE, OURS)):
        """One line of the table, in seconds per `per`."""
        cells = []
        for name in (REFERENCE, OURS):
            if name in sides:
                cpu = statistics.median(self.cpu[stage, name]) / per
                cells += [f"{cpu:.3g}", f"{self.median(stage, name, wall=True) / per:.3g}"]
                cells += [f"{self.peak[stage, name]:.2f}"]
            else:
                cells += ["", "", ""]
        ratio = f"{self.ratio(stage):.1f}" if len(sides) == 2 else ""
        runs = len(self.cpu[stage, sides[-1]])
        print(f"| {stage} | {unit} | {' | '.join(cells)} | {ratio} | {runs} |", flush=True)

    @staticmethod
    def head():
        """The table's first lines."""
        print(
            "| stage | unit | reference CPU s | wall s | GiB | nulledit CPU s | wall s | GiB "
            "| ratio | runs |"
        )
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)

    def _settle(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:  # Linux: the high-water mark of resident memory, begun anew
            Path("/proc/self/clear_refs").write_text("5")

    def _peak(self):
        """GiB in use at most since `_settle`: of the accelerator, or of the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        status = Path("/proc/self/status").read_text()
        line = next(row for row in status.splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20


def threads(count):
    """Use `count` threads; what the whole run is told in its first line."""
    torch.set_num_threads(count)
    return f"{count} thread(s) of {os.cpu_count()} cores, PyTorch {torch.__version__}"
