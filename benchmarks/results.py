"""Where the benchmarks keep what they measured, and on which machine.

A run writes BUILD/bench/NAME.json. benchmarks/results/NAME.json is such a run, stored for those
who have not made one: README's tables are made from it, and notebook 09 draws it meanwhile.
"""

import contextlib
import datetime
import json
import os
import platform
from pathlib import Path

from local.atomic import replacing
from local.paths import BUILD

STORED = Path(__file__).with_name("results")


def write(name: str, result: dict, output: Path | None = None) -> Path:
    """Store a run's result with the machine and the day; returns the file."""
    output = output or BUILD / "bench" / f"{name}.json"
    record = result | {"machine": machine(), "date": datetime.date.today().isoformat()}
    with replacing(output) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return output


def latest(name: str) -> dict:
    """The run made in this folder, else the stored one; `["here"]` says which."""
    made = BUILD / "bench" / f"{name}.json"
    path = made if made.exists() else STORED / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) | {"here": path == made}


def machine() -> dict:
    """The processor, its cores, the memory in bytes, the system."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }


def processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
