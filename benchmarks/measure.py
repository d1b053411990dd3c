"""What the benchmarks share: the result file of a machine, and memory as the kernel counts it."""

import json
import os
import platform
import sys
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def write(path: Path | None, name: str, values: dict, quiet: bool = False) -> None:
    """Prints ``values`` under ``name`` (unless ``quiet``) and, if there is a path, puts them into that JSON
    file beside what it holds, with command, versions and device.
    """
    from endprompt.runs import provenance

    values = {
        **values,
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        **provenance.stamp(),
    }
    if not quiet:
        print(
            json.dumps(
                {name: {key: value for key, value in values.items() if key not in ("versions",)}}, indent=2
            )
        )
    if path:
        there = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({**there, name: values}, indent=2, sort_keys=True) + "\n")
        part.replace(path)


def reset_peak() -> None:
    """Forgets this process's peak of resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak of resident memory since ``reset_peak``."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


def resident_bytes() -> int:
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )


class TreeMemory(threading.Thread):
    """The peak, looked at 20 times a second, of the summed memory of a process and its descendants:
    proportional shares, so that what they have in common counts once.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak = pid, 0
        self.start()

    def run(self) -> None:
        while Path(f"/proc/{self.pid}").exists():
            total, waiting = 0, [self.pid]
            while waiting:
                pid = waiting.pop()
                try:
                    total += next(
                        int(line.split()[1]) * 1024
                        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                        if line.startswith("Pss:")
                    )
                    for task in Path(f"/proc/{pid}/task").iterdir():
                        waiting += map(int, (task / "children").read_text().split())
                except (OSError, StopIteration, ValueError):
                    continue
            self.peak = max(self.peak, total)
            time.sleep(0.05)
