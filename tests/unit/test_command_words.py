"""Overrides on the command line: how their values are read, and messages about words that are not overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.api import load_recipe
from nemo_minitron.cli.rlhf import parse_settings
from nemo_minitron.config.compose import compose
from nemo_minitron.config.keys import value_kind
from nemo_minitron.errors import ConfigError
from tests.conftest import REPO, TOY

TEXTS = (
    "~/model",
    "/ckpt/epoch=3-step=1000",
    "/data/模型",
    "/data/model (1)",
    "nvcr.io#nvidia/nemo:24.12",
    "/data/a,b",
    'it\'s "quoted"',
    "C:\\data\\new",
    "\\",
    "$HOME/x",
    "100%@&;|",
    "a\tb ",
    "",
    "1_000",
    "2024-01-02",
    "1e-4",
    "1.10",
    "on",
    "true",
    "https://host:80/a?b=c&d=e",
    "😀",
    "[a]*.jsonl",
    "glob(*)",
    "{x: 1}",
)


def _source(recipe: dict[str, Any]) -> Any:
    return recipe["stages"]["teacher"]["source"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_value_of_a_text_key_is_taken_literally(text: str) -> None:
    assert _source(compose(TOY, [f"stages.teacher.source={text}"])) == text


def test_quotes_null_and_interpolations_keep_their_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/data")
    assert _source(compose(TOY, ["stages.teacher.source='a b'"])) == "a b"
    assert compose(TOY, ["execution.run_root=${oc.env:PLACE}/x (1)"])["execution"]["run_root"] == "/data/x (1)"
    assert compose(TOY, ["stages.teacher.revision=null"])["stages"]["teacher"]["revision"] is None


def test_lists_and_mappings_may_hold_any_text() -> None:
    sources = load_recipe(
        TOY, ["stages.data.sources=[{source: ~/a=b.txt, weight: 2}, {source: '/x (1)/模型, 2'}]"]
    ).stages["data"]
    assert [source.source for source in sources.sources] == ["~/a=b.txt", "/x (1)/模型, 2"]  # type: ignore[union-attr]
    assert sources.sources[0].weight == 2.0  # type: ignore[union-attr]


def test_short_forms_and_indices_are_expanded(tmp_path: Path) -> None:
    site = tmp_path / "our site=1.yaml"
    site.write_text("partition: big\n")
    recipe = load_recipe(
        TOY, [f"cluster={site}", "cluster.container.core_image=nvcr.io#x", "stages.data.sources[0].source=~/x"]
    )
    cluster = recipe.execution.cluster
    assert cluster is not None
    assert (cluster.partition, cluster.container.core_image) == ("big", "nvcr.io#x")
    assert recipe.stages["data"].sources[0].source == "~/x"  # type: ignore[union-attr]


def test_a_cluster_of_the_home_folder_needs_no_shell_to_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "site.yaml").write_text("partition: mine\n")
    cluster = load_recipe(TOY, ["cluster=~/site.yaml"]).execution.cluster
    assert cluster is not None
    assert cluster.partition == "mine"


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("name", "text"),
        ("stages.teacher.source", "text"),
        ("stages.select.method", "text"),
        ("stages.data.sources.0.source", "text"),
        ("execution.cluster.environment.HF_HOME", "text"),
        ("execution.parallel_by_stage.distill.tp", "other"),
        ("stages.distill.lr", "other"),
        ("stages.score.block_lengths", "list"),
        ("stages.teacher.architecture.x", "unknown"),
        ("stages.distill.lrr", "unknown"),
    ],
)
def test_the_type_of_a_key_comes_from_the_schema(key: str, kind: str) -> None:
    assert value_kind(key) == kind


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stages.distill.lr=1,2"], "several values for a key that holds one"),
        (["stages.distill.lr=range(1,3)"], "several values for a key that holds one"),
        (["stages.score.width_axes=ffn,heads"], r"stages.score.width_axes=\[ffn,heads\]"),
        (["stages.score.block_lengths=3"], r"must be a list, such as \[3\]"),
        (["stages.distill.lr=~x"], "lr = '~x': input should be a valid number"),
        (["stages.distill.lr=inf"], "finite"),
        (["stages.score.seed=-1"], "greater than or equal to 0"),
        (["distill.lr=1"], "Did you mean stages.distill.lr"),
        (["stagess.distill.lr=1"], "Did you mean stages.distill.lr"),
        (["distil.lr=1"], "Did you mean stages.distill.lr"),
        (["pipelin=chain"], "Did you mean pipeline"),
        (["stages..lr=1"], "is not a key"),
        (["stages.distill.lr =1"], "a space in the key"),
        (["stages.distill.lr", "=", "1"], "the spaces around the ="),
        (["stages.distill.lr=", "1"], "the spaces around the ="),
        (["stages.distill.lr:1"], "Write stages.distill.lr=1"),
        (["stages.distill.lr"], "KEY=VALUE"),
        (["=1"], "is not an override"),
        (["--dry-run"], "put options before it"),
        (["recipes/toy/depth.yaml"], "Give one recipe"),
        (["stages.data.sources.7.source=x"], "list index out of range"),
        (["stages.teacher.source=${HOME}/x"], r"\$\{oc.env:HOME\}"),
    ],
)
def test_wrong_overrides_are_explained(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(TOY, words)


def test_an_override_in_place_of_the_recipe_is_rejected() -> None:
    with pytest.raises(ConfigError, match="Put the recipe first"):
        load_recipe(Path("stages.distill.lr=1"), [str(TOY)])


def test_a_number_for_a_text_key_needs_quotes(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("stages:\n  teacher: {kind: import, source: x, revision: 1.10}\n")
    with pytest.raises(ConfigError, match="write it in quotes"):
        load_recipe(recipe, [])


def test_settings_of_rlhf_accept_text() -> None:
    assert parse_settings("ppo", ["server_host=10.1"]).server_host == "10.1"
    assert parse_settings("ppo", ["actor.a.b=x #1", "actor.c=2"]).actor == {"a": {"b": "x #1"}, "c": 2}
    for wrong in ("lr", "=1", "actor.x=${nope}", "actor.x=[", "lr.x=1", "a..b=1"):
        with pytest.raises(ConfigError):
            parse_settings("ppo", [wrong])
    with pytest.raises(ConfigError) as caught:
        parse_settings("pro", ["actor_layout.tpp=2", "server_hosts=a", "num_steps=many"])
    assert caught.value.what.splitlines()[1:] == [
        "  - algorithm = 'pro': not allowed. Allowed: 'ppo' or 'reinforce'.",
        "  - num_steps = 'many': input should be a valid integer, unable to parse string as an integer.",
        "  - actor_layout.tpp: unknown key. Did you mean tp?",
        "  - server_hosts: unknown key. Did you mean server_host?",
    ]


def test_every_shipped_recipe_composes_with_an_override_of_its_name() -> None:
    for recipe in (REPO / "recipes").glob("*/*.yaml"):
        if recipe.parent.name != "claims" or recipe.stem == "smollm2_135m":
            assert compose(recipe, ["name=123"])["name"] == "123"
