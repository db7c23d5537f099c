"""Write a bundle: recipes, their models and data, and wheels, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nemo_minitron import __version__
from nemo_minitron.bundle import archive, wheels
from nemo_minitron.bundle.collect import collect
from nemo_minitron.bundle.items import Item
from nemo_minitron.system.progress import Progress


def pack(
    recipes: Sequence[Path],
    overrides: Sequence[str],
    out: Path,
    progress: Progress,
    *,
    with_wheels: bool,
    with_aligner: bool,
    torch_index_url: str | None,
) -> tuple[dict[str, Any], list[str]]:
    """Write the bundle and return (facts about the written file, warnings).

    Raises:
        MinitronError: `out` exists, a recipe cannot be read, or something that it needs is missing.
    """
    archive.require_new(out)
    found = collect(list(recipes), list(overrides), progress)
    with ExitStack() as stack:
        script = Path(archive.__file__).with_name(archive.INSTALL_FILE)
        items = [*found.items, Item(script.name, script.read_bytes(), "script")]
        facts: dict[str, Any] = {
            "nemo_minitron": __version__,
            "target": wheels.target(),
            "recipes": found.recipes,
        }
        warnings = list(found.warnings)
        if with_wheels:
            more, facts["wheels"], about = wheel_items(torch_index_url, stack, progress, with_aligner=with_aligner)
            items, warnings = [*items, *more], [*warnings, *about]
        written = archive.write_archive(out, items, facts, progress)
    if with_wheels and found.needs_aligner and not with_aligner:
        warnings.append("The recipes need NeMo-Aligner: add --aligner unless the other machine runs it in a container.")
    return written, warnings


def wheel_items(
    torch_index_url: str | None, stack: ExitStack, progress: Progress, *, with_aligner: bool
) -> tuple[list[Item], dict[str, Any], list[str]]:
    """Return (files, versions by environment, warnings); `stack` removes temporary files."""
    core = [*wheels.core_wheels(torch_index_url, progress), stack.enter_context(wheels.own_wheel())]
    files, warnings = {"core": core}, list(wheels.warnings_about(core))
    lists = {"core": wheels.list_of(core)}
    if with_aligner:
        found = wheels.aligner_wheels(progress)
        lists["aligner"] = wheels.list_of([*found, *wheels.torch_only_wheels(core)])
        # A file that both environments need is packed once: the aligner's environment installs from both folders.
        shared = {file.name for file in core}
        files["aligner"] = [file for file in found if file.name not in shared]
    items = [Item(f"wheels/{name}/{file.name}", file, "wheel") for name, found in files.items() for file in found]
    items += [Item(f"wheels/{name}/{wheels.LIST_FILE}", text, "list") for name, text in lists.items()]
    return items, {name: wheels.versions_of(found) for name, found in files.items()}, warnings
