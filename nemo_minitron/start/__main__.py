"""Start a process without the working folder on the import path: `python .../nemo_minitron/start WHAT ...`.

`python -m` puts the working folder first on the import path, so that a checkout of nemo-minitron, a `torch.py` or a
`yaml.py` there would be imported instead of the installed package. `PYTHONSAFEPATH` prevents this only from Python 3.11
on. When a folder is run by its path, only that folder is put first, and this one contains no other module.
"""

import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[1]


def _own(module: str) -> ModuleType:
    """Import a module from the package that this file belongs to, even if another copy is on the import path."""
    sys.path.insert(0, str(PACKAGE.parent))
    try:
        import nemo_minitron  # noqa: F401
    finally:
        del sys.path[0]
    return import_module(module)


def _main() -> int:
    what, *words = sys.argv[1:]
    if what == "minitron":
        del sys.argv[1]
        _own("nemo_minitron.cli.main").main()
        return 0
    if what == "worker":
        return int(_own("nemo_minitron.execution.worker").main(Path(*words)))
    if what == "probe":
        _own("nemo_minitron.backends.megatron.model.probe").main(Path(*words))
        return 0
    if what == "rewards":
        return int(_own("nemo_minitron.evaluation.reward_worker").main(Path(*words)))
    if what == "servers":
        return int(_own("nemo_minitron.backends.alignment.nemo_aligner.server_host").main(Path(*words)))
    if what == "log":
        return int(_own("nemo_minitron.processes.output").main())
    if what == "ranks":
        # Run the file by its path: nemo-minitron and its dependencies may be missing in this Python.
        return int(runpy.run_path(str(PACKAGE / "processes" / "agent.py"))["main"](*words))
    # torchrun: run the module `what` with this Python.
    sys.argv[1:] = words
    runpy.run_module(what, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
