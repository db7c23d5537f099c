"""What one GPU can show in eight minutes: correctness, memory and speed, in one process that imports everything once.

    python benchmarks/gpu_check.py --out checks.jsonl             # on a GPU
    python benchmarks/gpu_check.py --cpu --out checks.jsonl       # rehearsal with tiny sizes: every item, no GPU
    python benchmarks/gpu_check.py --only variants                # some items; --list shows their names

Each item has a share of the time: it is skipped if too little is left, and interrupted if it takes twice as long. Its
result is one JSON line {name, ok, seconds, values, traceback}, on disk before the next item begins; its name is printed
before it runs. `ok` is false if it fails or a distance exceeds its bound, and null if it was skipped. Items that need
what a skipped one made skip as well. The exit code is 1 if an item is not ok. The items are in gpu_items.py and
gpu_speed.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

T0 = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from nemo_minitron.processes.gpu_environment import gpu_environment  # noqa: E402

DEADLINE_S = 500.0
OVERTIME = 2.0
"""An item is interrupted after this multiple of its share."""
CPU_OVERTIME = 5
"""A rehearsal on a shared CPU is slower."""


class Overtime(Exception):
    """An item took longer than its share allows."""


@dataclass(frozen=True)
class Item:
    """One check."""

    name: str
    seconds: float
    function: Callable[[Any], dict[str, Any]]


def run_item(item: Item, context: Any, out: Path, deadline_s: float) -> dict[str, Any]:
    """Run an item and append its line."""
    left = deadline_s - (time.monotonic() - T0)
    print(f"[{time.monotonic() - T0:6.1f} s] {item.name} ({item.seconds:.0f} s)", flush=True)
    from gpu_items import Skipped, free_memory

    line: dict[str, Any]
    started, line = time.monotonic(), {"name": item.name, "ok": False, "values": {}, "traceback": None}
    try:
        if left < item.seconds:
            raise Skipped(f"{left:.0f} s are left, {item.seconds:.0f} s are needed")
        allowed = OVERTIME * item.seconds * (1 if context.on_gpu else CPU_OVERTIME)
        with _alarm(min(allowed, max(1.0, left))):
            values = item.function(context)
        line |= {"values": values, "ok": passes(values)}
    except Skipped as reason:
        line |= {"ok": None, "values": {"skipped": str(reason)}}
    except (Exception, Overtime):
        line["traceback"] = traceback.format_exc()[-6000:]
    line["seconds"] = round(time.monotonic() - started, 2)
    _append(out, line)
    free_memory()
    print(f"           {'ok' if line['ok'] else line['ok']} in {line['seconds']} s", flush=True)
    return line


def passes(values: dict[str, Any]) -> bool:
    """Return whether no part of an item's values says that it does not pass."""
    parts = [value for value in values.values() if isinstance(value, dict)]
    return bool(values.get("passes", True)) and all(map(passes, parts))


def _append(out: Path, line: dict[str, Any]) -> None:
    with out.open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Overtime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU with tiny sizes")
    parser.add_argument("--only", nargs="*", help="names of items")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.jsonl"))
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds from the start")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if not arguments.cpu:
        os.environ.update(gpu_environment(os.environ, splits_layers=False, num_processes=1))
    with tempfile.TemporaryDirectory(prefix="gpu_check") as folder:
        from gpu_items import ITEMS as CORRECTNESS
        from gpu_items import Context
        from gpu_speed import ITEMS as SPEED

        items = [Item(*entry) for entry in (*CORRECTNESS, *SPEED)]
        if arguments.list:
            print("\n".join(item.name for item in items))
            return 0
        unknown = set(arguments.only or ()) - {item.name for item in items}
        if unknown:
            parser.error(f"unknown items: {', '.join(sorted(unknown))}")
        context = Context(Path(folder), on_gpu=not arguments.cpu)
        try:
            context.start_reference()
            chosen = [item for item in items if not arguments.only or item.name in arguments.only]
            lines = [run_item(item, context, arguments.out, arguments.deadline) for item in chosen]
        finally:
            context.close()
    failed = [line["name"] for line in lines if line["ok"] is False]
    print(f"{len(lines)} items, failed: {failed or 'none'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
