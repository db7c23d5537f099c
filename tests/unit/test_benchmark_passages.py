"""Tests of training text from benchmark requests: each question once with its correct answer, no repeated context."""

from __future__ import annotations

from typing import Any

from nemo_minitron.data.benchmark_passages import passages


def request(query: str, choices: list[str], gold: int, **fields: Any) -> list[dict[str, Any]]:
    """Return one row for each possible answer, as in the source."""
    doc = {"query": query, "choices": choices, "gold": gold, **fields}
    return [{"doc": doc, "idx": number, "label": gold} for number in range(len(choices))]


def test_each_question_appears_once_with_its_correct_answer() -> None:
    rows = request("Question: What burns?\nAnswer:", ["water", " wood", "stone"], 1)
    assert passages("arc_easy", rows + rows) == ["Question: What burns?\nAnswer: wood"]


def test_one_goal_with_two_correct_answers_is_one_document() -> None:
    rows = request("Goal: dry a cup\nAnswer:", ["towel", "x"], 0) + request("Goal: Dry a cup\nAnswer:", ["y", "air"], 1)
    assert passages("piqa", rows) == ["Goal: dry a cup\nAnswer: towel\n\nGoal: Dry a cup\nAnswer: air"]


def test_questions_about_one_page_are_one_document() -> None:
    rows = (
        request("Oak -- Oaks are trees.\nQuestion: is an oak a tree?\nAnswer:", ["yes", "no"], 0)
        + request("Elm -- Elms are trees.\nQuestion: is an elm a bird?\nAnswer:", ["yes", "no"], 1)
        + request("Oak -- Oaks are trees.\nQuestion: is an oak a car?\nAnswer:", ["yes", "no"], 1)
        + request("Oak -- They are old.\nQuestion: are oaks old?\nAnswer:", ["yes", "no"], 0)
    )
    assert passages("boolq", rows) == [
        "Oak -- Oaks are trees.\nQuestion: is an oak a tree?\nAnswer: yes\nQuestion: is an oak a car?\nAnswer: no\n\n"
        "Oak -- They are old.\nQuestion: are oaks old?\nAnswer: yes",
        "Elm -- Elms are trees.\nQuestion: is an elm a bird?\nAnswer: no",
    ]


def test_questions_about_one_situation_are_one_document() -> None:
    def ask(question: str, right: str) -> list[dict[str, Any]]:
        context = "Kai lost a shoe."
        query = f"Question: {context} {question}\nAnswer:"
        return request(query, [right, "x", "y"], 0, context=context, question=question)

    assert passages("socialiqa", ask("Why?", "it was loose") + ask("What next?", "hop")) == [
        "Question: Kai lost a shoe. Why?\nAnswer: it was loose\nQuestion: What next?\nAnswer: hop"
    ]


def test_sections_of_one_article_are_one_document() -> None:
    rows = (
        request("Health: How to sleep. Lie down.", ["Close your eyes.", "Run."], 0, ind=7)
        + request("Travel: How to pack. Fold it.", ["Sit on it.", "x"], 0, ind=8)
        + request("Health: How to sleep. Stay calm.", ["x", "Breathe."], 1, ind=900)
    )
    assert passages("hellaswag", rows) == [
        "How to sleep.\n\nLie down. Close your eyes.\n\nStay calm. Breathe.",
        "How to pack.\n\nFold it. Sit on it.",
    ]


def test_moments_of_one_video_become_one_text_without_repetitions() -> None:
    rows = (
        request("Surfing: He pays at once. Nobody", ["waits."], 0, ind=40)
        + request("Cutting hair: He then combs it with a brush. He", ["uses an electric clipper."], 0, ind=5)
        + request("Cutting hair: A man sits on a chair. He then", ["combs it with a brush."], 0, ind=3)
        + request("Cutting hair: He uses an electric clipper. He", ["leaves."], 0, ind=6)
        + request("Cutting hair: Another man on another day", ["has a shave."], 0, ind=12)
    )
    assert passages("hellaswag", rows) == [
        "Cutting hair: A man sits on a chair. He then combs it with a brush. He uses an electric clipper. He leaves.",
        "Cutting hair: Another man on another day has a shave.",
        "Surfing: He pays at once. Nobody waits.",
    ]
