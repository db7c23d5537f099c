"""Messages for failed disk operations, and checksums and atomic writes of small files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.system.disk import disk_errors, disk_problem
from nemo_minitron.system.files import sealed, unsealed, write_whole

FULL = "The disk is full"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "", "run/a"), FULL),
        (OSError(errno.EDQUOT, ""), FULL),
        (OSError("100000 requested and 12784 written"), FULL),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), FULL),
        (ValueError("I/O error: No space left on device (os error 28)"), FULL),
        (OSError(errno.EROFS, "", "run/a"), "read-only"),
        (OSError(errno.EACCES, "", "run/a"), "No permission to write here"),
        (OSError(errno.EACCES, "", "/elsewhere/model"), "No permission to access this"),
        (OSError(errno.ENOENT, "", "text.txt"), "is missing"),
        (OSError(errno.ENOLCK, ""), "does not support file locks"),
        (OSError(errno.EIO, ""), "reports an error"),
        (OSError(errno.ENOENT, ""), None),
        (OSError(errno.EINVAL, "", "a"), None),
        (ValueError("loss is nan"), None),
    ],
)
def test_an_os_error_has_a_message(error: Exception, message: str | None) -> None:
    problem = disk_problem(error, Path("run"))
    assert (problem is None) if message is None else (problem is not None and message in problem.what)


def test_a_failed_copy_names_its_target() -> None:
    problem = disk_problem(OSError(errno.ENOSPC, "", "source", None, "run/target"), Path("run"))
    assert problem is not None
    assert problem.where == "run/target"


def test_a_chained_os_error_is_found_and_own_errors_are_unchanged(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=FULL), disk_errors(tmp_path):
        # As Megatron does.
        raise Exception("Failed to write dataset materials") from OSError(errno.ENOSPC, "")
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        raise ZeroDivisionError


def test_a_changed_file_fails_its_checksum() -> None:
    facts = {"step": 3, "losses": [0.1, 2], "files": {"2": {}, "10": {}}}
    found = json.loads(json.dumps(sealed(facts)))
    assert unsealed(found) == facts
    assert unsealed(facts) == facts, "of an older version"
    with pytest.raises(ValueError, match="checksum"):
        unsealed({**found, "step": 4})


def test_a_failed_write_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(28))))
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
