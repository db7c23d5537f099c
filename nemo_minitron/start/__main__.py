"""Starts a process of a stage without the working folder on the import path: `python .../nemo_minitron/start WHAT ...`.

Python puts the working folder first for `-m`, and a checkout of nemo-minitron, a `torch.py` or a `yaml.py` there would
be imported instead of what is installed. `PYTHONSAFEPATH` prevents that only from Python 3.11 on. A folder that is run
by its path has nothing before it but itself, and there is nothing else in this one.
"""

import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[1]


def _own(module: str) -> ModuleType:
    """A module of the package that this file belongs to, wherever else there is one of that name."""
    sys.path.insert(0, str(PACKAGE.parent))
    try:
        import nemo_minitron  # noqa: F401
    finally:
        del sys.path[0]
    return import_module(module)


def _main() -> int:
    what, *words = sys.argv[1:]
    if what == "worker":
        return int(_own("nemo_minitron.execution.worker").main(Path(*words)))
    if what == "probe":
        _own("nemo_minitron.backends.megatron.model.probe").main(Path(*words))
        return 0
    if what == "log":
        return int(_own("nemo_minitron.processes.output").main())
    if what == "ranks":
        # By its path: this Python need not have nemo-minitron or what it imports.
        return int(runpy.run_path(str(PACKAGE / "processes" / "agent.py"))["main"](*words))
    # torchrun, of this Python.
    sys.argv[1:] = words
    runpy.run_module(what, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
