"""Making and unpacking bundles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from nemo_minitron.bundle.archive import write_archive
from nemo_minitron.bundle.collect import collect
from nemo_minitron.bundle.items import Item
from nemo_minitron.system.progress import Progress

INSTALL = Path(write_archive.__code__.co_filename).with_name("install.sh")


def unpacked(archive: Path, folder: Path) -> Path:
    """By the system's tar, into a new folder; the bundle's own folder in it."""
    folder.mkdir(parents=True)
    subprocess.run(["tar", "xf", str(archive.absolute())], cwd=folder, check=True)
    (bundle,) = folder.iterdir()
    return bundle


def bundled(tmp_path: Path, recipe: Path, *overrides: str) -> Path:
    """The unpacked bundle of one recipe, without wheels."""
    found = collect([recipe], overrides, Progress(silent=True))
    script = Item("install.sh", INSTALL.read_bytes(), "script")
    archive = tmp_path / "my bundle.tar"
    write_archive(archive, [*found.items, script], {"recipes": found.recipes}, Progress(silent=True))
    return unpacked(archive, tmp_path / "there")


def there(bundle: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in the bundle's folder, with this Python's `minitron` on the PATH."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(words, cwd=bundle, env=environment, capture_output=True, text=True, check=False)


def minitron_there(bundle: Path, *words: str) -> str:
    """Output of `minitron`, which must succeed."""
    done = there(bundle, sys.executable, "-m", "nemo_minitron", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
