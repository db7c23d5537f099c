"""Starts a process of a stage without the working folder on the import path: `python .../nemo_minitron/start WHAT ...`.

Python puts the working folder first for `-m`, and a checkout of nemo-minitron, a `torch.py` or a `yaml.py` there would
be imported instead of what is installed. `PYTHONSAFEPATH` prevents that only from Python 3.11 on. A folder that is run
by its path has nothing before it but itself, and there is nothing else in this one.
"""

import runpy
import sys
from pathlib import Path


def _worker(call_file: str) -> int:
    """A rank, with the code that the runner has: the package that this file belongs to, wherever else there is one."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    try:
        import nemo_minitron  # noqa: F401
    finally:
        del sys.path[0]
    from nemo_minitron.stages.worker import main

    return main(Path(call_file))


def _main() -> int:
    what, *words = sys.argv[1:]
    if what == "worker":
        return _worker(*words)
    # torchrun: of this Python, which need not have nemo-minitron.
    sys.argv[1:] = words
    runpy.run_module(what, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
