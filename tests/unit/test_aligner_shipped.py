"""Our configs against the key names of the files that NeMo-Aligner 0.7.0 ships, and against a container's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import yaml

from nemo_minitron.backends.alignment.nemo_aligner.config import DEAD_KEYS, Method, base_config, complete_config, flat
from nemo_minitron.backends.alignment.nemo_aligner.shipped import (
    ADDED,
    HOME_VARIABLE,
    SHIPPED,
    aligner_home,
    require_shipped,
    shipped_keys,
    unknown_keys,
)
from nemo_minitron.errors import EnvironmentProblem
from tests.conftest import REPO

FOUND = json.loads((REPO / "tests/aligner/shipped_keys_0.7.0.json").read_text())
"""Names only, of the tag v0.7.0."""
METHODS: tuple[Method, ...] = get_args(Method)


def test_every_config_is_a_method() -> None:
    files = {file.stem for file in (REPO / "configs/align").glob("*.yaml")} - {"report"}
    assert files == set(METHODS) == set(SHIPPED)


@pytest.mark.parametrize("method", METHODS)
def test_every_key_is_in_the_file_that_is_shipped(method: Method) -> None:
    assert not unknown_keys(flat(base_config(method)), FOUND["keys"][SHIPPED[method]])


def test_no_key_is_excused_for_nothing() -> None:
    needed = {
        key
        for method in METHODS
        for key in flat(base_config(method))
        if key in ADDED and key not in FOUND["keys"][SHIPPED[method]]
    }
    assert needed == ADDED


def test_a_dead_key_is_in_no_config_and_names_a_live_one() -> None:
    live = {key for method in METHODS for key in flat(base_config(method))}
    assert not live & DEAD_KEYS.keys()
    assert all(right in live for right in DEAD_KEYS.values() if " " not in right)


@pytest.mark.parametrize("method", METHODS)
def test_the_container_in_which_this_runs_has_every_key(method: Method) -> None:
    """In a container this reads NeMo-Aligner's own files; the names in the repository stand for them elsewhere."""
    file = aligner_home() / SHIPPED[method]
    if file.is_file():
        assert shipped_keys(yaml.safe_load(file.read_text())) == set(FOUND["keys"][SHIPPED[method]])
    require_shipped(method, flat(base_config(method)))


def test_a_section_that_stands_for_another_has_its_keys() -> None:
    config = {"a": {"b": {"x": 1, "y": "${a.b.x}"}}, "c": "${a.b}", "d": "${.e}", "e": "${int_div:${a.b.x},2}"}
    assert shipped_keys(config) == {"a.b.x", "a.b.y", "c.x", "c.y", "d", "e"}


def _container(folder: Path, left_out: str) -> None:
    """What a container has, in its form: nested, and without one key."""
    file = folder / SHIPPED["dpo"]
    file.parent.mkdir(parents=True)
    tree: dict[str, object] = {}
    for key in FOUND["keys"][SHIPPED["dpo"]]:
        if key != left_out:
            *path, last = key.split(".")
            at = tree
            for part in path:
                at = at.setdefault(part, {})  # type: ignore[assignment]
            at[last] = None
    file.write_text(yaml.safe_dump(tree))


def test_a_container_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    fill = {key: 1 for key, value in flat(base_config("dpo")).items() if value == "???"}
    complete_config("dpo", fill, {}, on_cpu=False, where="stages.dpo")  # no such file: nothing to compare with
    _container(tmp_path, "model.dpo.gt_reward_scale")
    with pytest.raises(EnvironmentProblem, match=r"does not have these keys: model\.dpo\.gt_reward_scale"):
        complete_config("dpo", fill, {}, on_cpu=False, where="stages.dpo")
