"""Any text on the command line is read as it was typed, or refused with a message."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nemo_minitron.config.compose import compose, from_dotlist
from nemo_minitron.config.explain import validate
from nemo_minitron.config.overrides import for_hydra
from nemo_minitron.errors import MinitronError
from nemo_minitron.schema.rlhf import Rlhf
from tests.conftest import TOY
from tests.support.examples import budget

TEXT_KEY = "stages.teacher.source"
# An argument of a process holds no NUL and no lone surrogate.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
SIGNS = st.text(st.sampled_from("~#=,()[]{}'\"\\$:;@&%*!?+-. \t\nab01é模😀"), max_size=20)
KEYS = st.sampled_from(
    [
        TEXT_KEY,
        "name",
        "stages.distill.lr",
        "stages.score.block_lengths",
        "stages.data.sources",
        "stages.teacher.architecture",
        "execution.cluster.environment",
        "stages.new.kind",
        "launcher",
        "cluster",
        "data@stages.data",
        "pipeline",
        "~stages.speed",
        "+execution.threads",
    ]
)


def _has_its_own_meaning(text: str) -> bool:
    stripped = text.strip()
    return stripped.lower() == "null" or stripped[:1] in ("'", '"') or "${" in text


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a minimal recipe, which composes in a third of the toy recipe's time."""
    file = tmp_path_factory.mktemp("small") / "small.yaml"
    file.write_text("stages:\n  teacher: {kind: import, source: x}\n")
    return file


@example("\\")
@example("a\\'b\\")
@example(" a ")
@given(text=TEXTS | SIGNS)
@budget(50)
def test_a_text_arrives_unchanged(recipe: Path, text: str) -> None:
    if not _has_its_own_meaning(text):
        assert compose(recipe, [f"{TEXT_KEY}={text}"])["stages"]["teacher"]["source"] == text


@example(["a=[" * 200])
@example(["stages.data.sources=" + "[" * 2000])
@given(st.lists(st.builds("{}={}".format, KEYS | SIGNS, SIGNS | TEXTS) | SIGNS, max_size=3))
@budget(50)
def test_any_words_give_a_recipe_or_a_message(words: list[str]) -> None:
    with suppress(MinitronError):
        validate(compose(TOY, words), where=str(TOY))


@given(KEYS, SIGNS | TEXTS)
@budget(50)
def test_any_value_is_written_for_hydra_or_refused(key: str, value: str) -> None:
    with suppress(MinitronError):
        for_hydra(f"{key}={value}")


@given(st.lists(st.builds("{}={}".format, st.sampled_from(["lr", "actor.a.b", "server_host"]) | SIGNS, SIGNS)))
@budget(50)
def test_any_settings_give_a_mapping_or_a_message(words: list[str]) -> None:
    with suppress(MinitronError):
        from_dotlist(words, Rlhf)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | SIGNS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SIGNS, inner, max_size=3),
    max_leaves=8,
)
SECTIONS = st.dictionaries(st.sampled_from(["kind", "source", "inputs", "target", "sources", "loss", "rungs"]), JSON)


@given(JSON, st.dictionaries(st.sampled_from(["teacher", "select", "distill", "data", "Search"]), SECTIONS | JSON))
@budget(50)
def test_any_contents_of_a_recipe_are_validated_or_explained(execution: object, stages: dict[str, object]) -> None:
    with suppress(MinitronError):
        validate({"name": "x", "execution": execution, "stages": stages}, where="x.yaml")
