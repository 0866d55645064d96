"""What every benchmark prints last: one JSON object with what was measured against what was asked."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from paretune.runtime.parallel import usable_cores
from paretune.traces.whole_file import write_whole

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Bar:
    """One figure against its target; `at_least` says on which side it must lie. Without a value it is not met."""

    name: str
    value: float | None
    target: float
    at_least: bool = True

    @property
    def ok(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.target if self.at_least else self.value <= self.target


def machine() -> dict[str, object]:
    """Where a result was taken: processor and its vector extensions, cores, versions, date, command."""
    import torch

    model, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in cpuinfo.read_text().split("\n\n")[0].splitlines())
        }
        model = f"{fields.get('model name', model)} family {fields.get('cpu family')} model {fields.get('model')}"
        wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
        flags = " ".join(flag for flag in wanted if flag in fields.get("flags", "").split())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "cpu": model,
        "cpu_flags": flags,
        "cores": usable_cores(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with least and most, for a result file."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def finish(bars: Sequence[Bar], details: object, result_name: str | None = None) -> None:
    """Print the bars as the last line; write them with details and machine to results/<result_name>.json."""
    rows = [{"name": bar.name, "value": bar.value, "target": bar.target, "ok": bar.ok} for bar in bars]
    if result_name is not None:
        whole = {"machine": machine(), "bars": [{**asdict(bar), "ok": bar.ok} for bar in bars], "details": details}
        write_whole(RESULTS / f"{result_name}.json", json.dumps(whole, indent=1) + "\n")
    print(json.dumps({"bars": rows}))


def data_dir() -> Path | None:
    """The folder of public data sets: --data DIR, else PARETUNE_DATA, else shared/data beside the checkout."""
    if "--data" in sys.argv:
        return Path(sys.argv[sys.argv.index("--data") + 1])
    named = os.environ.get("PARETUNE_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


def needed_data(*parts: str) -> Path:
    """A file of the public data sets, or exit 2 saying how to get it."""
    folder = data_dir()
    path = None if folder is None else folder.joinpath(*parts)
    if path is None or not path.exists():
        todo = "name the folder of the data sets with --data or PARETUNE_DATA (benchmarks/README.md)"
        print(f"{'/'.join(parts)} is not there: {todo}", file=sys.stderr)
        sys.exit(2)
    return path
