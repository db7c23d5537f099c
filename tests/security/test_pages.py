"""Text from other people in pages and model cards stays text: nothing in it is loaded or executed."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_minitron.artifacts.manifest import Manifest
from nemo_minitron.hf.license import read_license
from nemo_minitron.report.collect import collect
from nemo_minitron.report.html import render_html
from nemo_minitron.report.lineage import Lineage
from nemo_minitron.report.markdown import render_markdown
from nemo_minitron.report.model_card import render_card
from nemo_minitron.report.status_page import render_status
from tests.support.fake_run import fake_run

EVIL = "x](https://evil.example) | <img src=http://evil.example/x onerror=1> `a` **b** \x1b]52;c;e\x07\n---\n# T\u202e"


class _Page(HTMLParser):
    """Collect what a page would load or run, and its permissions."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.policy, self.scripts, self.outside = "", 0, list[str]()
        self.order = list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.order.append(tag)
        if found.get("http-equiv", "").lower() == "content-security-policy":
            self.policy = found["content"]
            assert "style" not in self.order, "the policy stands before what it is for"
        self.scripts += tag == "script" or any(name.startswith("on") for name in found)
        for name in ("src", "href", "xlink:href", "action", "data"):
            if name in found and not found[name].startswith(("#", "data:image/")):
                self.outside.append(found[name])


def _require_closed(text: str) -> None:
    page = _Page(text)
    rules = dict(rule.strip().split(" ", 1) for rule in page.policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert rules["style-src"] == "'unsafe-inline'"
    assert rules["base-uri"] == rules["form-action"] == "'none'"
    assert "script-src" not in rules
    assert not page.scripts
    assert not page.outside, page.outside
    assert not re.search(r"@import|url\((?!#)", text)


def test_the_report_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    facts = collect(EVIL, EVIL, fake_run(tmp_path))
    _require_closed(render_html(facts, EVIL))


def test_the_page_of_a_running_run_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    stage = {"status": EVIL, "took": EVIL, "summary": EVIL, "running": True, "eta": EVIL, "job": None}
    _require_closed(render_status({"name": EVIL, "run_dir": str(tmp_path), "stages": {"a": stage}}, reload_s=5))


def _require_plain(markdown: str) -> None:
    assert "\x1b" not in markdown
    assert "\u202e" not in markdown
    markdown = re.sub(r"(?<!\\)`[^`\n]*`", "", markdown)  # code spans show everything as it is
    assert "<img" not in markdown.replace("\\<", "")
    assert not re.search(r"(?<!\\)\]\(https?://evil", markdown)
    assert not re.search(r"(?<!\\)https?://evil", markdown), "a bare address would be a link, too"
    assert "\n# T" not in markdown


def _card(label: str, *, license_id: str = "apache-2.0", **model: Any) -> str:
    shape = {"num_layers": 2, "hidden_size": 8}
    metrics = {"label": label, "num_params": 5, "bits_per_byte": 1.0, "perplexity": 2.0, "tasks": {label: {"acc": 0.5}}}
    trained = {"tokens": 3, "num_steps": 1, "loss": label, "data_sources": [label], **model}
    stages = (
        Manifest("r", "x", label, "", {}, {"model": "t"}, {"shape": shape}),
        Manifest("r", "d", "distill", "", {}, {"student": "x", "teacher": "t", "data": label}, trained),
    )
    return render_card(
        label,
        facts={"num_params": 5, "shape": shape, "dtype": label},
        teacher={"num_params": 10, "source": f"hf:{label}", "license": license_id, "shape": shape},
        lineage=Lineage("d", "t", {stage.stage: stage for stage in stages}, missing=(label,)),
        metrics=[{**metrics, "tasks_limit": None}],
    )


def test_a_hostile_label_is_text_in_the_card(tmp_path: Path) -> None:
    card = _card(EVIL, license_id=EVIL)
    header = card.split("\n---\n", 1)[0].removeprefix("---\n")
    assert yaml.safe_load(header)["license"] == EVIL, "the header stays one, whatever a value holds"
    _require_plain(card.split("\n---\n\n", 1)[1])
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert rows
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows if "bits per byte" in row or "perplexity" in row}
    assert columns == {3}, "a bar in a label makes no column"
    assert _card("plain").count("plain") > 4


def test_a_hostile_label_is_text_in_the_report(tmp_path: Path) -> None:
    stages = fake_run(tmp_path, student=EVIL)
    _require_plain(render_markdown(collect(EVIL, EVIL, stages)))


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: mit\ntags: [a---b]\n---\n# A\n", "mit"),
        ("---\ntitle: a --- b\nlicense: llama3.1\n---\nText\n---\n", "llama3.1"),
        ("\ufeff---\r\nlicense: mit\r\n--- \r\nText", "mit"),
        ("---\ndescription: |\n  ---\n  x\nlicense: mit\n---\n", "mit"),
        ("\n---\nlicense: mit\n---", "mit"),
        ("# A\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n" + "a: [" * 2000 + "\n---\n", None),
    ],
)
def test_the_license_of_a_card_with_dashes_in_its_header(card: str, found: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert read_license(tmp_path) == found
