"""Limits on YAML and on `${...}` references in recipes: size, depth, and growth through aliases and references."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from nemo_minitron.errors import ConfigError
from nemo_minitron.limits import RECIPE_SECONDS, YAML_BYTES, YAML_DEPTH, YAML_NODES, TimeIsUp, cpu_seconds

_REFERENCE_WEIGHT = 20
"""Weight of one reference in values, because resolving it takes 0.3 ms."""


class TooMuch(yaml.YAMLError):
    """A YAML text is too large, too deeply nested, or has too many values with its aliases expanded."""


class _Bounded:
    """Mixin for PyYAML loaders that applies the limits before anything is constructed."""

    def __init__(self, stream: Any) -> None:
        text: Any = stream if isinstance(stream, str | bytes) else stream.read(YAML_BYTES.value() + 1)
        if len(text) > YAML_BYTES.value():
            raise TooMuch(f"it has more than {YAML_BYTES.value():,} bytes. {YAML_BYTES.how_to_raise()}")
        if text is not stream and isinstance(text, str):
            # Pass a stream, because the errors for a string would quote whole lines.
            named = io.StringIO(text)
            vars(named)["name"] = getattr(stream, "name", "<file>")
            text = named
        self._depth = 0
        super().__init__(text)  # type: ignore[call-arg]

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > YAML_DEPTH:
            raise TooMuch(f"it is nested deeper than {YAML_DEPTH} levels")
        node = super().compose_node(parent, index)  # type: ignore[misc]
        self._depth -= 1
        return node

    def construct_document(self, node: Any) -> Any:
        if expanded(node) > YAML_NODES.value():
            raise TooMuch(
                f"with its aliases expanded it has more than {YAML_NODES.value():,} values. {YAML_NODES.how_to_raise()}"
            )
        return super().construct_document(node)  # type: ignore[misc]


def expanded(root: yaml.Node) -> int:
    """Count the values of a YAML document with its aliases expanded.

    Raises:
        TooMuch: a value contains itself.
    """
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: yaml.Node) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) in inside:
            raise TooMuch("a value contains itself")
        if id(node) not in sizes:
            inside.add(id(node))
            parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] = 1 + sum(map(size, parts))
            inside.remove(id(node))
        return sizes[id(node)]

    return size(root)


def bounded_loader(base: Any) -> Any:
    """Return a subclass of a PyYAML loader that applies the limits."""
    return base if issubclass(base, _Bounded) else type("BoundedLoader", (_Bounded, base), {})


def safe_load(text: str) -> Any:
    """Load YAML like yaml.safe_load, with the limits.

    Raises:
        yaml.YAMLError: the text is not valid YAML or exceeds a limit.
    """
    return bounded_loader(yaml.SafeLoader)(text).get_single_data()


@contextmanager
def bounded(where: str) -> Iterator[None]:
    """Limit the values that OmegaConf and Hydra read and resolve in this context, and the CPU time.

    Raises:
        ConfigError: a limit is exceeded, or the recipe refers to itself.
    """
    from omegaconf.base import Container

    resolve = Container.resolve_parse_tree
    counter = _Counter()

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        counter.add(_REFERENCE_WEIGHT)
        found = resolve(self, *args, **options)
        counter.add(_weight(found))
        return found

    Container.resolve_parse_tree = counted  # type: ignore[method-assign]
    try:
        with _bounded_loading(), cpu_seconds(RECIPE_SECONDS):
            yield
    except TimeIsUp:
        raise ConfigError(
            f"The recipe takes more than {RECIPE_SECONDS.value()} s of CPU time to read.",
            where=where,
            next_step=RECIPE_SECONDS.how_to_raise(),
        ) from None
    except _TooManyReferences:
        raise ConfigError(
            f"The ${{...}} references of the recipe resolve to more than {YAML_NODES.value():,} values, or to texts of "
            "that weight.",
            where=where,
            next_step=YAML_NODES.how_to_raise(),
        ) from None
    except RecursionError:
        raise ConfigError("The recipe is nested too deeply, or refers to itself.", where=where) from None
    finally:
        Container.resolve_parse_tree = resolve  # type: ignore[method-assign]


@contextmanager
def _bounded_loading() -> Iterator[None]:
    """Replace `get_yaml_loader` in OmegaConf's modules, where 2.4 moved it, by a loader with the limits."""
    name, base = "get_yaml_loader", "BaseLoader"
    users = [vars(module) for path, module in sys.modules.items() if path.startswith("omegaconf.")]
    users = [namespace for namespace in users if name in namespace]
    make = users[0][name]
    # From 2.4 on the base is libyaml's loader, whose depth cannot be limited here and which allows fewer values.
    bases, limits = make.__globals__, dict.fromkeys(inspect.signature(make).parameters)
    kept = bases.get(base)

    def loader(**_: Any) -> Any:
        return bounded_loader(make(**limits))

    def put(base_of_loaders: Any, maker: Any) -> None:
        if kept is not None:
            bases[base] = base_of_loaders
        for namespace in users:
            namespace[name] = maker

    put(yaml.SafeLoader, loader)
    try:
        yield
    finally:
        put(kept, make)


class _Counter:
    """Sum of the weights of all references resolved so far."""

    def __init__(self) -> None:
        self.made, self.most = 0, YAML_NODES.value()

    def add(self, weight: int) -> None:
        """Add a weight.

        Raises:
            _TooManyReferences: the sum exceeds the limit.
        """
        self.made += weight
        if self.made > self.most:
            raise _TooManyReferences


class _TooManyReferences(BaseException):
    """The references exceed the limit. A BaseException, so that OmegaConf does not catch it."""


def _weight(found: Any) -> int:
    """Return the number of values that a reference resolves to; 100 characters of text count as one."""
    if isinstance(found, str):
        return len(found) // 100
    waiting, count = [found], 0
    while waiting:
        node = waiting.pop()
        content = getattr(node, "_content", node)
        inner = getattr(content, "_content", content) if not isinstance(content, dict | list) else content
        if isinstance(inner, dict):
            waiting.extend(inner.values())
            count += len(inner)
        elif isinstance(inner, list):
            waiting.extend(inner)
            count += len(inner)
    return count
