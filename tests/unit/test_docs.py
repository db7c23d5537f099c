"""README and docs: links and anchors resolve, named files exist, and figures have one dated place."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from nemo_minitron.assets import ASSETS
from nemo_minitron.hf.source import BUILT_IN
from tests.conftest import REPO

PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "recipes/*.md", "configs/**/*.md", "launchers/*.md")
    for page in REPO.glob(pattern)
)
NAMES = [str(page.relative_to(REPO)) for page in PAGES]
RESULTS = REPO / "docs" / "results.md"
MAX_README_LINES = 120
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?<![\w/.<*-])((?:[\w-]+/)+[\w-]+\.(?:py|yaml|sh|md|jsonl|lock|txt))(?![\w*])")
"""A path with a folder, such as `pruning/depth.py`; a single name may be something else."""
ROOTS = (REPO, REPO / "nemo_minitron", REPO / "nemo_minitron" / "backends" / "alignment" / "nemo_aligner")
EXAMPLES = re.compile(r"(?:path/to|my-\w+|runs|logs|back|select|recipes/mine|data/\w+\.jsonl)")
"""Beginnings of paths that stand for a user's own files."""
PACKAGED = ("nemo_minitron", "recipes", "configs", "Makefile", "Dockerfile")
ADDED = (
    "an importance metric",
    "a depth metric",
    "a distillation loss",
    "model family",
    "a stage",
    "a launcher",
    "an alignment backend",
)
MEASURED = re.compile(r"\d ± \d|\d tokens/s|\d % of the chip|\b\d+(?:\.\d+)? times (?:the time|the memory|as fast)\b")


def prose(page: Path) -> str:
    """Return the text of a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for line in prose(page).splitlines():
        if re.match(r"#{1,6} ", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line.lstrip("#").strip())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            repeated = sum(1 for one in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", one))
            found.add(f"{slug}-{repeated}" if repeated else slug)
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_anchors_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_a_page_names_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # it may name files that are gone
    named = {name for code in re.findall(r"`([^`\n]+)`", prose(page)) for name in FILE.findall(code)}
    missing = [
        name for name in sorted(named) if not EXAMPLES.match(name) and not any((root / name).exists() for root in ROOTS)
    ]
    assert not missing


def test_the_package_and_the_recipes_name_pages_that_exist() -> None:
    pattern = re.compile(r"(?<!/)\bdocs/[A-Za-z/_-]+\.(?:md|png|json)")
    files = [REPO / name for name in PACKAGED if (REPO / name).is_file()]
    for name in PACKAGED:
        files += [file for file in (REPO / name).rglob("*") if file.suffix in (".py", ".yaml", ".md", ".j2", ".sh")]
    named = {name for file in files for name in pattern.findall(file.read_text(encoding="utf-8"))}
    assert named, "the pattern finds nothing"
    assert not [name for name in named if not (REPO / name).exists()]


def test_the_package_names_files_of_its_own_that_exist() -> None:
    pattern = re.compile(r"\bnemo_minitron/[\w/]+\.py\b")
    named = {
        name
        for file in (REPO / "nemo_minitron").rglob("*.py")
        for name in pattern.findall(file.read_text(encoding="utf-8"))
    }
    assert named, "the pattern finds nothing"
    assert not [name for name in named if not (REPO / name).exists()]


def test_the_readme_is_short_and_has_the_picture() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_README_LINES
    assert "](docs/report.png)" in text


def test_every_page_is_listed_in_the_overview() -> None:
    overview = REPO / "docs" / "README.md"
    listed = {(overview.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose(overview))}
    assert not [page for page in (REPO / "docs").rglob("*.md") if page != overview and page not in listed]


@pytest.mark.parametrize("page", [page for page in PAGES if page != RESULTS], ids=lambda page: page.name)
def test_measured_figures_are_in_the_results_only(page: Path) -> None:
    assert not MEASURED.findall(page.read_text(encoding="utf-8"))


def test_every_section_of_the_results_has_a_date() -> None:
    sections = re.split(r"^## ", RESULTS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(sections) >= 10
    assert not [section.splitlines()[0] for section in sections if not DATE.search(section)]


def test_the_page_of_example_data_names_every_asset() -> None:
    text = (REPO / "docs" / "reference" / "example-data.md").read_text(encoding="utf-8")
    assert not [name for name in (*BUILT_IN, *ASSETS) if f"`{name}`" not in text]


@pytest.mark.parametrize("folder", ["toy", "chats"])
def test_the_readme_of_shipped_data_names_every_set(folder: str) -> None:
    path = REPO / "nemo_minitron" / folder
    text = (path / "README.md").read_text(encoding="utf-8")
    files = [file for file in path.glob("*.jsonl*") if f"`{file.name}`" not in text]
    # Sets that recipes name as assets may have a row with that name.
    named = {location for name, location in BUILT_IN.items() if f"`{name}`" in text}
    assert not [file.name for file in files if file not in named]


@pytest.mark.parametrize("what", ADDED)
def test_contributing_says_how_to_add(what: str) -> None:
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.search(rf"^### Add .*{what}", text, flags=re.MULTILINE)


def test_names_in_contributing_exist() -> None:
    """Every identifier in code spans occurs in the package, the tests, the configs or the Makefile."""
    files = [
        file for root in ("nemo_minitron", "tests", "constraints", "benchmarks") for file in (REPO / root).rglob("*.py")
    ]
    source = "\n".join(
        file.read_text(encoding="utf-8") for file in (*files, REPO / "Makefile", REPO / "pyproject.toml")
    )
    known = set(re.findall(r"\w+", source))
    spans = re.findall(r"`([^`\n]+)`", prose(REPO / "CONTRIBUTING.md"))
    named = {name for span in spans if not FILE.search(span) for name in re.findall(r"[A-Za-z_]\w{3,}", span)}
    assert len(named) > 60
    assert not named - known - {"my_stage"}


def test_messages_of_the_troubleshooting_page_are_those_of_the_package() -> None:
    """Parts without placeholders (..., N, X, a number) occur in a text of the source."""
    files = [file for file in (REPO / "nemo_minitron").rglob("*") if file.suffix in (".py", ".sh")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    joined = re.sub(r'["\']\s*\n\s*f?["\']', "", source)
    rows = re.findall(r"^\| (`.*?) \|", prose(REPO / "docs" / "how-to" / "troubleshooting.md"), flags=re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 20
    parts = [
        part.strip() for message in messages for part in re.split(r"\.\.\.|step_N|step_M|\b[NX]\b|-?\b\d+\b", message)
    ]
    assert not [part for part in parts if len(part) > 7 and part not in joined]
