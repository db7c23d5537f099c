"""Seeded mutations of good files, and a process that feeds them to readers under limits of time and memory.

    python -m tests.support.fuzz FOLDER FIRST COUNT READER...

COUNT is a number, `all` or `few`. It prints one JSON object for each reader. A reader may accept an input or refuse it
with a MinitronError; anything else is a fault, named with the number that makes the input again.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

LIMIT_S, LIMIT_BYTES, LIMIT_MESSAGE_CHARS = 10, 2 << 30, 6000
Write = Callable[[random.Random, Path], None]


class Reader(NamedTuple):
    """One kind of input."""

    prepare: Callable[[Path], Any]
    """Makes a valid input in a folder, once; its result is passed to `mutate`."""
    mutate: Callable[[random.Random, Any, Path], None]
    """Writes a changed copy of the valid input into the folder."""
    read: Callable[[Path], object]
    """Reads the folder as the package does."""
    count: int
    """Number of inputs of a whole run."""


# --- mutations ------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 10**30, 1e308, 1e-320, float("inf"), float("nan"), 0.5),
    *("", " ", "x", "../x", "/etc/passwd", "\0", "\ud800", "\x1b[31m", "x" * 5000, "${a}", "{{ x }}", "3" * 400),
    *([], {}, [[]], [["x"]], {"": {}}, {"x": [None]}, [1] * 50),
)


def damaged_bytes(rng: random.Random, data: bytes, extent: int | None = None) -> bytes:
    """Return a copy with some bytes changed, removed, repeated or cut off, most of them within the first `extent`."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        if not out:
            break
        most = min(len(out), extent or len(out))
        at, kind = rng.randrange(most), rng.randrange(7)
        length = rng.choice([1, 1, 2, 4, 8, 64])
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length] * rng.choice([1, 2, 500])
        elif kind == 4:
            out[at : at + 8] = rng.choice([2**64 - 1, 2**63, 2**32, 2**31 - 1, 0, 1 << 20]).to_bytes(8, "little")
        elif kind == 5:
            del out[at:]
        else:
            other = rng.randrange(most)
            out[at : at + length] = out[other : other + length]
    return bytes(out)


def changed(rng: random.Random, value: Any) -> Any:
    """Return a copy of a JSON value with parts changed, removed, repeated, moved or nested deeply."""
    root = {"": copy.deepcopy(value)}
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = list(_places(root))
        holder, key = places[rng.randrange(len(places))]
        kind = rng.randrange(8)
        if kind <= 3:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif kind == 4 and len(places) > 1 and holder is not root:
            del holder[key]
        elif kind == 5:
            other, name = places[rng.randrange(len(places))]
            holder[key] = copy.deepcopy(other[name])
        elif kind == 6:
            holder[key] = nested(holder[key], rng.choice([2, 60, 400]), rng.random() < 0.5)
        elif isinstance(holder, dict):
            holder[str(rng.choice(ODD))[:50]] = copy.deepcopy(rng.choice(ODD))
        else:
            holder.extend(holder[:20] * rng.choice([1, 50]))
    return root[""]


def nested(value: Any, depth: int, lists: bool) -> Any:
    """Return a value inside lists or objects."""
    for _ in range(depth):
        value = [value] if lists else {"a": value}
    return value


def _places(root: Any) -> Any:
    """Yield (holder, key) of parts of a JSON value; for a long list or object, the first and last ones."""
    waiting = [root]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        for key in keys if len(keys) <= 60 else keys[:30] + keys[-30:]:
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


def as_json(rng: random.Random, value: Any) -> bytes:
    """Return a changed JSON value as bytes, some of them damaged."""
    try:
        text = json.dumps(changed(rng, value)).encode("utf-8", "surrogatepass")
    except RecursionError:  # nested several times
        text = b"[" * 100_000
    if rng.random() < 0.1:
        text = text.replace(b"1", rng.choice([b"1" * 5000, b"1e400", b"01", b"-"]), 2)
    if rng.random() < 0.05:
        text = b"[" * 100_000 + text
    return damaged_bytes(rng, text) if rng.random() < 0.25 else text


# --- running --------------------------------------------------------------------------------------


def feed(name: str, reader: Reader, folder: Path, first: int, count: int) -> dict[str, Any]:
    """Give a reader `count` inputs and return the outcomes."""
    from nemo_minitron.errors import MinitronError

    folder.mkdir(parents=True, exist_ok=True)
    good = reader.prepare(folder)
    reader.read(folder)  # the valid input is accepted, and everything is imported
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + LIMIT_BYTES, before[1]))
    started, accepted, slowest, faults = time.monotonic(), 0, 0.0, []
    for number in range(first, first + count):
        reader.mutate(random.Random(f"{name} {number}"), good, folder)
        (folder / "now").write_text(f"{name} {number}")
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        begun = time.monotonic()
        try:
            reader.read(folder)
            accepted += 1
        except MinitronError as error:
            if len(str(error)) > LIMIT_MESSAGE_CHARS:
                faults.append(f"{number}: a message of {len(str(error)):,} characters: {str(error)[:200]}")
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-3:]
            places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(where))
            faults.append(f"{number}: {type(error).__name__}: {str(error)[:200]} ({places})")
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.monotonic() - begun)
    resource.setrlimit(resource.RLIMIT_AS, before)
    return {
        "reader": name,
        "inputs": count,
        "accepted": accepted,
        "wall_s": round(time.monotonic() - started, 1),
        "slowest_s": round(slowest, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "faults": faults[:20],
    }


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    from tests.support.fuzz_readers import READERS

    folder, first, count, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
    for name in names:
        reader = READERS[name]
        number = {"all": reader.count, "few": min(20, reader.count // 100)}.get(count)
        print(json.dumps(feed(name, reader, folder / name, first, number or int(count))), flush=True)


if __name__ == "__main__":
    main()
