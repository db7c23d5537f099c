"""A whole bundle with wheels, used without a network: in a namespace that has only its loopback interface."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, TOY
from tests.support.bundles import unpacked

SEALED = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
CONNECT = "import socket; socket.create_connection(('192.0.2.1', 443), 5)"


def sealed(folder: Path, *words: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a command without a network, and without caches or settings of this user."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(home), "PYTHON": sys.executable}
    return subprocess.run(
        [*SEALED, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=1800
    )


@pytest.mark.slow
def test_a_bundle_installs_and_runs_to_its_report_without_a_network(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs unshare (util-linux) and ip (iproute2)")
    tried = sealed(tmp_path, "true", home=tmp_path)
    if tried.returncode:
        pytest.skip(f"no network namespace may be made here: {tried.stderr.strip()}")
    refused = sealed(tmp_path, sys.executable, "-c", CONNECT, home=tmp_path)
    assert "Network is unreachable" in refused.stderr

    out = tmp_path / "toy.tar"
    command = [sys.executable, "-m", "nemo_minitron", "bundle", str(TOY), "--out", str(out)]
    made = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    bundle = unpacked(out, tmp_path / "other machine")
    out.unlink()

    installed = sealed(bundle.parent, "toy/install.sh", home=tmp_path)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert "ok toy/width" in installed.stdout
    versions = json.loads((bundle / "manifest.json").read_text())["wheels"]["core"]
    listed = sealed(bundle, ".venv/bin/python", "-m", "pip", "list", "--format=json", home=tmp_path)
    found = {row["name"].replace("-", "_").lower(): row["version"] for row in json.loads(listed.stdout)}
    assert {name.replace(".", "_").lower(): version for name, version in versions.items()}.items() <= found.items()
    assert "+cpu" not in found["torch"] or not any(name.startswith(("nvidia", "triton")) for name in found)

    done = sealed(bundle, ".venv/bin/minitron", "run", "recipes/toy/width.yaml", home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((bundle / "runs/toy/width/report.json").read_text())
    assert report["models"].keys() >= {"teacher", "pruned", "distilled"}
    assert "<svg" in (bundle / "runs/toy/width/report.html").read_text()
