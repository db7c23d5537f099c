"""The recipe with a cached teacher, killed while it caches the teacher, and resumed to the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import REPO, Cli

RECIPE = REPO / "recipes/toy/cached.yaml"
SHARDS = 6


def _kill_while_it_writes(root: Path, *overrides: str) -> dict[str, tuple[int, int]]:
    """Return finished shard of the work folder -> (inode, time of the last write)."""
    command = [sys.executable, "-m", "nemo_minitron", "run", str(RECIPE), f"execution.run_root={root}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--until", "cache_teacher"], cwd=REPO, env=environment, stderr=subprocess.PIPE, text=True
    )
    work, deadline = root / "toy/cached/.work/cache_teacher", time.monotonic() + 240
    while len(list(work.glob("shard_*"))) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (root / "toy/cached/cache_teacher").exists(), "nothing may be published"
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in work.glob("shard_*")}


def test_a_student_is_distilled_without_the_teacher_in_memory(minitron: Cli, tmp_path: Path) -> None:
    samples = f"stages.cache_teacher.num_samples={SHARDS * 64}"
    kept = _kill_while_it_writes(tmp_path, samples)
    assert 2 <= len(kept) < SHARDS, "it must be killed in the middle"
    code, output = minitron("run", RECIPE, f"execution.run_root={tmp_path}", samples)
    assert code == 0, output
    run = tmp_path / "toy/cached"
    for name, facts in kept.items():
        file = (run / "cache_teacher" / name).stat()
        assert (file.st_ino, file.st_mtime_ns) == facts, "what was finished is not written again"
    assert len(list((run / "cache_teacher").glob("shard_*"))) == SHARDS + 1, "one more of held-out text"

    cached = json.loads((run / "cache_teacher/manifest.json").read_text())["result"]
    result = json.loads((run / "distill/manifest.json").read_text())["result"]
    assert cached["bytes_per_token"] < 80
    assert result["loss"] == "forward KL to the cached teacher's logits, 50 draws a token, no other loss"
    assert result["final_valid_kl"] < 0.6 * result["initial_valid_kl"]
    assert result["initial_valid_teacher_loss"] == cached["valid_teacher_loss"]
    gap = result["initial_valid_loss"] - cached["valid_teacher_loss"]
    assert result["final_valid_loss"] - cached["valid_teacher_loss"] < 0.6 * gap
    assert "KL to the teacher" in (run / "report.md").read_text()
    assert (run / "report.html").is_file()


def test_a_recipe_changed_over_a_finished_cache_is_stopped(minitron: Cli, tmp_path: Path) -> None:
    """Both stages agree, but the finished cache differs, which the plan cannot detect."""
    root = f"execution.run_root={tmp_path}"
    assert minitron("run", RECIPE, root, "--until", "cache_teacher")[0] == 0
    warmer = ["stages.cache_teacher.temperature=2", "stages.distill.loss.logits.temperature=2"]
    code, output = minitron("run", RECIPE, root, *warmer, "--until", "distill", "--accept-drift")
    assert code == 2, output
    assert "temperature = 2.0, the cache has 1.0" in " ".join(output.split())
    assert "Traceback" not in output
