"""Random changes of a recipe's text give a plan or a readable error, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.config.compose import compose
from nemo_minitron.config.explain import validate
from nemo_minitron.errors import MinitronError
from nemo_minitron.plan.checks import find_problems
from nemo_minitron.plan.describe import plan_facts
from nemo_minitron.plan.planner import make_plan
from nemo_minitron.plan.resources.summary import memory_warnings, resource_facts
from nemo_minitron.plan.text_amounts import text_warnings
from nemo_minitron.system.places import shipped_recipes
from tests.conftest import REPO
from tests.support.examples import budget

NAMES = [name for name in shipped_recipes() if not name.startswith("claims/")]
TEXTS = {name: (REPO / "recipes" / f"{name}.yaml").read_text() for name in NAMES}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**70), 10**30, 1e308, 1e-320, float("inf"), float("nan")]),
    st.sampled_from(
        ["", " ", "???", "null", "1e-4", "0x10", "~", "a/b", "../x", "asset:toy-text", "asset:", "hf:", "\x85"]
    ),
    st.sampled_from(
        ["${stages}", "${stages.data}", "${nope}", "${", "${oc.env:HOME}", "${oc.env:NOPE}", "${..}", "\\${x}"]
    ),
    st.sampled_from([[], {}, [[]], [None], {"": 1}, {"kind": "score"}, {"a": {"b": {"c": []}}}, {1: 2}, [1, "a", {}]]),
    st.text(max_size=8),
)
ENTRIES = st.sampled_from(
    [
        *(
            "toy/width",
            "toy/depth@_global_",
            "mine",
            "../mine",
            "_self_",
            "nothing",
            "optional nothing",
            "",
            "@",
            "@_global_",
        ),
        *(
            "smollm2_135m/iterative",
            "/pipeline/width",
            "toy/width@stages",
            "a@b@c",
            "${x}",
            "/",
            ".",
            "..",
            "a:b",
            "a=b",
        ),
        *({"/pipeline": "search"}, {"override /pipeline": "chain"}, {"override /pipeline": None}, {"/data": "nothing"}),
        *({"/data@stages.data": "toy_text"}, {"/pipeline": ["width", "chain"]}, {"toy@_global_": "search"}, {"": ""}),
        *({"/pipeline": 3}, {"a": "b", "c": "d"}, {"/model@": "toy_llama"}, {"override nothing": "x"}, 3, None, [], {}),
    ]
)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def changed(draw: st.DrawFn) -> str:
    """Generate the text of a shipped recipe with missing, renamed or moved keys, or with other values."""
    recipe = yaml.safe_load(TEXTS[draw(st.sampled_from(NAMES))])
    for _ in range(draw(st.integers(1, 4))):
        found = list(places(recipe))
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        node = recipe
        for key in path:
            node = node[key]
        how = draw(st.sampled_from(["value", "value", "remove", "rename", "wrap", "copy"]))
        if how == "value":
            node[last] = copy.deepcopy(draw(VALUES))
        elif how == "remove":
            del node[last]
        elif how == "wrap":
            node[last] = draw(st.sampled_from([[node[last]], {"x": node[last]}, str(node[last])]))
        elif how == "copy":
            node[last] = copy.deepcopy(draw(st.sampled_from([recipe, node])))
        elif isinstance(node, dict):
            node[draw(st.one_of(st.text(max_size=6), st.sampled_from(["name", "kind", "stages", 1, None])))] = node.pop(
                last
            )
    if draw(st.booleans()):
        recipe["defaults"] = draw(st.lists(ENTRIES, max_size=4))
    return yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """Generate a text with a typing error: something inserted, doubled or deleted."""
    text = draw(st.one_of(st.sampled_from(list(TEXTS.values())), changed()))
    start = draw(st.integers(0, len(text)))
    end = draw(st.integers(start, min(len(text), start + 40)))
    inserted = st.sampled_from(
        ["\t", "\n", ":", "- ", "&a ", "*a", "<<: *a", "{", "]", "'", '"', "#", "!!python/none ", "---\n"]
    )
    slip = draw(st.one_of(inserted, st.just(text[start:end]), st.text(max_size=5), st.just("[" * 150), st.just("\0")))
    return text[:start] + slip + text[draw(st.sampled_from([start, end])) :]


@budget(30)
@given(text=changed())
def test_a_recipe_with_other_keys_and_values_is_planned_or_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned_or_refused(text, tmp_path, monkeypatch)


@budget(20)
@given(text=damaged())
def test_a_damaged_text_is_planned_or_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned_or_refused(text, tmp_path, monkeypatch)


def planned_or_refused(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what `minitron check` and `minitron plan` do."""
    monkeypatch.chdir(folder)
    file = folder / "mine.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with suppress(MinitronError):
        plan = make_plan(validate(compose(file), where=str(file)))
        list(find_problems(plan))
        facts = resource_facts(plan)
        plan_facts(plan)
        list(text_warnings(plan))
        list(memory_warnings(plan, facts))
