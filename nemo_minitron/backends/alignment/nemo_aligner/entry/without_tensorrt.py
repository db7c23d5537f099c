"""A stand-in for TensorRT-LLM: NeMo-Aligner's actors import it even if it is off (trt_llm.enable = false).

Importing any part of it succeeds; using what was imported raises an error.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

PACKAGES = ("tensorrt_llm", "tensorrt", "mpi4py")


@contextmanager
def importable() -> Iterator[None]:
    """Make imports of TensorRT-LLM and of what it needs succeed in this context, where they are not installed.

    Afterwards the packages are missing again for those who look for them, such as Lightning for MPI.
    """
    missing = tuple(package for package in PACKAGES if importlib.util.find_spec(package) is None)
    finder = _Finder(missing)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in missing]:
            del sys.modules[name]


class _Refusing(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse()


class _Unusable(metaclass=_Refusing):
    """Something imported from the stand-in. It may be named in annotations and be a base class, but not be used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse()


def _refuse() -> NoReturn:
    raise RuntimeError("TensorRT-LLM is not installed: set trt_llm.enable = false, or use NeMo-Aligner's container.")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Refusing(name, (_Unusable,), {})


class _Finder(Loader):
    """Finds and loads every module of some packages."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self._packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None: ...
