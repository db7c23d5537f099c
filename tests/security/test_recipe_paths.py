"""A recipe works in any folder: no part of a path is read as syntax of Hydra or YAML."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_minitron.config.compose import compose
from tests.conftest import REPO

SIGNS = ["ü", "'", '"', ",", "=", "(", "[", "{", "#", ";", " ", "$(id)", "${oc.env:HOME}", "a: b", "%41", "-x", "~"]


@pytest.mark.parametrize("sign", SIGNS)
def test_a_recipe_below_a_folder_of_any_name_is_the_same_recipe(
    sign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / f"one{sign}two"
    (folder / "configs/data").mkdir(parents=True)
    (folder / "configs/data/mine.yaml").write_text("kind: tokenize\nsources: [{source: ./text}]\n")
    (folder / "base.yaml").write_text("defaults: [toy/width, override /data@stages.data: mine, _self_]\n")
    (folder / "mine.yaml").write_text("defaults: [base, _self_]\nstages: {distill: {num_steps: 7}}\n")
    monkeypatch.chdir(folder)
    found = compose(Path("mine.yaml"), [])
    assert found["stages"]["distill"]["num_steps"] == 7
    assert found == compose(folder / "mine.yaml", [])
    expected = compose(REPO / "recipes/toy/width.yaml", [])
    assert found["stages"]["score"] == expected["stages"]["score"]
    assert os.getcwd() == str(folder)
