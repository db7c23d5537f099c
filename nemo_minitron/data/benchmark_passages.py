"""Plain text from the training questions of public benchmarks, each with its correct answer.

Questions that share a context (a Wikipedia page, a how-to article, a video, a situation) become one document. The
validation split is drawn by document; a context in both training and validation text would make the held-out loss
of a distilled model look better than it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]
_HOW_TO = re.compile(r"^[^:]{1,60}: (How to .+?)\. ", re.DOTALL)
_CHAIN_GAP = 3
"""Largest step between the numbers of two neighboring moments of a HellaSwag video; some moments are missing."""
_OVERLAP_CHARS = 20
"""Shortest repeated text between two moments that is treated as an overlap."""


def passages(task: str, rows: Iterable[Row]) -> list[str]:
    """Return the documents of one task, in order of their first question.

    Args:
        rows: requests of one task: one for each possible answer, with the question and its correct answer under "doc".
    """
    docs = list(unique_docs(rows))
    if task == "hellaswag":
        return _hellaswag(docs)
    key, render = _TASKS.get(task, (_question, _questions))
    groups: dict[str, list[Row]] = {}
    for doc in docs:
        groups.setdefault(" ".join(key(doc).lower().split()), []).append(doc)
    return [render(group) for group in groups.values()]


def unique_docs(rows: Iterable[Row]) -> Iterator[Row]:
    """Return the questions in the requests of one task, without repetitions."""
    seen = set()
    for row in rows:
        doc = row["doc"]
        identity = (doc.get("ind"), doc["query"].strip(), answer(doc))
        if identity not in seen:
            seen.add(identity)
            yield doc


def answer(doc: Row) -> str:
    """Return the correct choice."""
    return str(doc["choices"][doc["gold"]]).strip()


def _question(doc: Row) -> str:
    return str(doc["query"])


def _questions(docs: list[Row]) -> str:
    return "\n\n".join(dict.fromkeys(f"{doc['query'].strip()} {answer(doc)}" for doc in docs))


# BoolQ: `Title -- paragraph\nQuestion: ...?\nAnswer:`. A page has several paragraphs, a paragraph several questions.


def _page(doc: Row) -> str:
    return str(doc["query"]).split(" -- ")[0]


def _page_text(docs: list[Row]) -> str:
    paragraphs: dict[str, list[str]] = {}
    for doc in docs:
        paragraph, question = doc["query"].split("\nQuestion:", 1)
        paragraphs.setdefault(paragraph.strip(), []).append(f"Question:{question.rstrip()} {answer(doc)}")
    return "\n\n".join("\n".join([paragraph, *questions]) for paragraph, questions in paragraphs.items())


# Social IQa: a situation and up to three questions about it.


def _situation(doc: Row) -> str:
    return str(doc["context"])


def _situation_text(docs: list[Row]) -> str:
    questions = dict.fromkeys(f"{doc['question'].strip()}\nAnswer: {answer(doc)}" for doc in docs)
    return f"Question: {docs[0]['context'].strip()} " + "\nQuestion: ".join(questions)


_TASKS: dict[str, tuple[Callable[[Row], str], Callable[[list[Row]], str]]] = {
    "boolq": (_page, _page_text),
    "socialiqa": (_situation, _situation_text),
}


# HellaSwag: how-to articles in sections, and videos described moment by moment; a question repeats earlier moments.


def _hellaswag(docs: list[Row]) -> list[str]:
    articles: dict[str, list[str]] = {}
    moments: list[Row] = []
    for doc in docs:
        title = _HOW_TO.match(doc["query"])
        if title is None:
            moments.append(doc)
            continue
        section = f"{doc['query'][title.end() :].strip()} {answer(doc)}"
        articles.setdefault(title[1], []).append(section)
    sections = ["\n\n".join([f"{title}.", *dict.fromkeys(texts)]) for title, texts in articles.items()]
    return sections + _stories(sorted(moments, key=lambda doc: int(doc["ind"])))


def _stories(moments: list[Row]) -> list[str]:
    """Join the moments of each video into one text, without the words that a moment repeats from earlier ones."""
    stories: list[list[str]] = []
    last_label, last_number = "", -_CHAIN_GAP
    for doc in moments:
        label, description = doc["query"].split(": ", 1)
        text = f"{description.strip()} {answer(doc)}"
        if label == last_label and int(doc["ind"]) - last_number <= _CHAIN_GAP:
            stories[-1].append(_new_text(stories[-1], text))
        else:
            stories.append([f"{label}: {text}"])
        last_label, last_number = label, int(doc["ind"])
    return [" ".join(part for part in story if part) for story in stories]


def _new_text(story: list[str], text: str) -> str:
    """Return what a moment adds to the story: the text after its longest beginning that already ends the story."""
    text_so_far = " ".join(part for part in story if part)
    if text in text_so_far:
        return ""
    for end in range(min(len(text), len(text_so_far)), _OVERLAP_CHARS - 1, -1):
        if text_so_far.endswith(text[:end]):
            return text[end:].strip()
    return text
