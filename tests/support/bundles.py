"""Support for tests that make and unpack bundles."""

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
    """Unpack a bundle into a new folder with the system's tar, and return the bundle's folder."""
    folder.mkdir(parents=True)
    subprocess.run(["tar", "xf", str(archive.absolute())], cwd=folder, check=True)
    (bundle,) = folder.iterdir()
    return bundle


def bundled(tmp_path: Path, recipe: Path, *overrides: str) -> Path:
    """Make and unpack a bundle of one recipe, without wheels."""
    found = collect([recipe], overrides, Progress(silent=True))
    script = Item("install.sh", INSTALL.read_bytes(), "script")
    archive = tmp_path / "my bundle.tar"
    write_archive(archive, [*found.items, script], {"recipes": found.recipes}, Progress(silent=True))
    return unpacked(archive, tmp_path / "there")


def there(bundle: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the bundle's folder, with this Python's `minitron` on the PATH."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(words, cwd=bundle, env=environment, capture_output=True, text=True, check=False)


def minitron_there(bundle: Path, *words: str) -> str:
    """Run `minitron`, which must succeed, and return its output."""
    done = there(bundle, sys.executable, "-m", "nemo_minitron", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
