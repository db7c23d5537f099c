"""Tests of rendered training text: golden texts, comparison with transformers, token boundaries, lengths."""

from __future__ import annotations

import copy
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.data.chat.published import publish_template
from nemo_minitron.data.chat.render import Purpose, pair_row, rated_row, render_rows, sft_rows
from nemo_minitron.data.chat.rows import ATTRIBUTES, BadRow
from nemo_minitron.data.chat.templates import TEMPLATES, set_template
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import CheckpointError, DataError
from nemo_minitron.hf.source import BUILT_IN
from nemo_minitron.schema.chats import ChatRendering
from tests.support.tiny_models import tiny_tokenizer

Row = dict[str, Any]
NAMED: tuple[Any, ...] = ("chatml", "llama3", "extra_id")
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And\n\nnow?"},
    {"role": "assistant", "content": "Bye {{ now }}"},
]
RATED = {"verbosity": 2.0, "helpfulness": 3.6}

GOLDEN: dict[str, tuple[str, str]] = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nAnd\n\nnow?<|im_end|>\n"
        "<|im_start|>assistant\nAttributes: helpfulness:4,verbosity:2\n",
        "Bye {{ now }}<|im_end|>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd\n\nnow?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nAttributes: helpfulness:4,verbosity:2\n",
        "Bye {{ now }}<|eot_id|>",
    ),
    "extra_id": (
        "<extra_id_0>System\nBe brief.\n<extra_id_1>User\nHi there\n<extra_id_1>Assistant\nHello\n"
        "<extra_id_1>User\nAnd\n\nnow?\n<extra_id_1>Assistant\n<extra_id_2>helpfulness:4,verbosity:2\n",
        "Bye {{ now }}\n<extra_id_1>",
    ),
}


@lru_cache
def tokenizer() -> Any:
    """Create the tiny byte-level tokenizer with the markers of all templates."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    markers = [marker for template in TEMPLATES.values() for marker in template.markers]
    fast.add_special_tokens({"additional_special_tokens": markers})
    fast.chat_template = tiny_tokenizer().chat_template
    return fast


def template(name: Any) -> ChatTemplate:
    return ChatTemplate.bind(tokenizer(), name)


def chat(*messages: dict[str, str], **attributes: float) -> Row:
    row: Row = {"messages": list(messages), "origin": "x.jsonl:1"}
    return {**row, "attributes": attributes} if attributes else row


def pair(*prompt: dict[str, str], **more: Any) -> Row:
    return {"prompt": list(prompt), "chosen": "Yes", "rejected": "No", "origin": "x.jsonl:1", **more}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Create a model folder without weights and with another chat template."""
    folder = tmp_path / "model"
    shutil.copytree(BUILT_IN["toy-llama"], folder)
    tokenizer().save_pretrained(folder)
    return folder


# --- the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_golden_texts(name: Any) -> None:
    rows = sft_rows(chat(SYSTEM, *CHAT, **RATED), template(name))
    assert (rows[1]["input"], rows[1]["output"]) == GOLDEN[name]
    assert rows[0]["output"].startswith("Hello")
    assert not any(name in rows[0]["input"] for name in ATTRIBUTES), "an earlier answer has no ratings"
    assert rows[1]["input"].startswith(rows[0]["input"] + "Hello"), "an earlier answer is rendered as it is trained on"


@pytest.mark.parametrize("name", [*NAMED, "model"])
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_prompts_and_dialogues_are_those_of_apply_chat_template(name: Any, system: list[dict[str, str]]) -> None:
    jinja = None if name == "model" else TEMPLATES[name].jinja
    messages, bound = [*system, *CHAT], template(name)
    for number, row in enumerate(sft_rows(chat(*messages), bound)):
        upto = len(system) + 2 * number + 1
        options: Any = {"chat_template": jinja, "tokenize": False}
        prompt = tokenizer().apply_chat_template(messages[:upto], add_generation_prompt=True, **options)
        dialogue = tokenizer().apply_chat_template(messages[: upto + 1], **options)
        assert row["input"] == prompt
        ends = "<extra_id_1>" if name == "extra_id" else "\n" * (name in ("chatml", "model"))
        assert (row["input"] + row["output"]).removesuffix("<extra_id_1>") == dialogue.removesuffix(ends)
        text = tokenizer().apply_chat_template(messages[:upto], **options, add_generation_prompt=True)
        ids = tokenizer()(text, add_special_tokens=False).input_ids
        assert bound.ids(row["input"]) == ids


@pytest.mark.parametrize("name", NAMED)
def test_attributes_are_written_in_fixed_order_and_only_on_request(name: Any) -> None:
    every = dict.fromkeys(reversed(ATTRIBUTES), 4) | {"unheard": 1}
    line = ",".join(f"{attribute}:4" for attribute in ATTRIBUTES) + "\n"
    prompt = template(name).prompt(CHAT[:1], every)
    assert prompt.endswith(line)
    assert line not in template(name).prompt(CHAT[:1])
    plain = ChatRendering(condition_on_attributes=False)
    assert sft_rows(chat(*CHAT, quality=4), template(name), plain) == sft_rows(chat(*CHAT), template(name))


@pytest.mark.parametrize("name", NAMED)
def test_text_is_trimmed_the_same_way_in_training_and_at_inference(name: Any) -> None:
    loose = [{**message, "content": f" \n{message['content']}\n "} for message in CHAT]
    assert sft_rows(chat(*loose), template(name)) == sft_rows(chat(*CHAT), template(name))


def test_pairs_share_their_prompt_and_keep_their_rewards() -> None:
    row = pair(*CHAT[:3], chosen_reward=2, rejected_reward=-1.5)
    assert pair_row(row, template("chatml")) == {
        "prompt": template("chatml").prompt(CHAT[:3]),
        "chosen_response": "Yes<|im_end|>",
        "rejected_response": "No<|im_end|>",
        "chosen_reward": 2.0,
        "rejected_reward": -1.5,
    }
    assert "chosen_reward" not in (pair_row(pair(*CHAT[:3]), template("chatml")) or {})


@pytest.mark.parametrize(
    ("name", "end"), [("chatml", "Hello<|im_end|>"), ("llama3", "Hello<|eot_id|>"), ("extra_id", "Hello\n<extra_id_2>")]
)
def test_a_rated_row_has_the_dialogue_and_nine_labels(name: Any, end: str) -> None:
    row = rated_row(chat(*CHAT[:2], toxicity=0, helpfulness=3.5), template(name))
    assert row is not None
    assert row["text"] == template(name).prompt(CHAT[:1]) + end
    assert row["label"] == [-100.0, 0.0, -100.0, -100.0, 3.5, -100.0, -100.0, -100.0, -100.0]
    with pytest.raises(BadRow, match="no attributes"):
        rated_row(chat(*CHAT[:2]), template(name))


# --- what a template or tokenizer does not support ------------------------------------------------


@pytest.mark.parametrize("marker", ["<|im_end|>", "<|endoftext|>"])
def test_a_marker_in_a_text_is_a_bad_row(marker: str) -> None:
    for index in (0, 1):
        messages = [dict(message) for message in CHAT[:2]]
        messages[index]["content"] += marker
        with pytest.raises(BadRow, match=f"a text of {messages[index]['role']} contains"):
            sft_rows(chat(*messages), template("chatml"))


def test_a_token_across_the_end_of_the_prompt_is_a_bad_row() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"a": 0, ":": 1, ":a": 2}, [(":", "a")]))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    fast.chat_template = "{% for m in messages %}{{ m.content }}:{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(BadRow, match=r"the end of the prompt 'a:' is tokenized differently before the answer 'a:?'"):
        sft_rows(chat(*messages), ChatTemplate.bind(fast, "model"))


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{% if add_generation_prompt %}A: {% endif %}{{ messages[-1].content }}", "does not continue"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not continue"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "does not write attributes"),
        ("{{ raise_exception('No system!') }}", "the chat template refuses the messages: No system!"),
    ],
)
def test_a_model_template_that_cannot_be_split_is_a_bad_row(jinja: str, reason: str) -> None:
    bound = ChatTemplate(tokenizer(), jinja, None, template("model").markers)
    with pytest.raises(BadRow, match=reason):
        sft_rows(chat(*CHAT, quality=3), bound)


def test_an_answer_without_end_in_the_models_template_gets_eos() -> None:
    bound = ChatTemplate(
        tokenizer(), "{% for m in messages %}{{ m.content }}\n{% endfor %}", None, template("model").markers
    )
    assert sft_rows(chat(*CHAT[:2]), bound) == [{"input": "Hi there\n", "output": "Hello\n<|endoftext|>"}]


def test_too_many_unusable_rows_stop_and_a_few_are_counted() -> None:
    rows = [chat(*CHAT), {**chat({"role": "user", "content": "<|im_start|>"}, CHAT[1]), "origin": "y.jsonl:7"}]

    def rendered(share: float) -> tuple[list[Row], LengthStats]:
        stats, options = LengthStats(), ChatRendering(max_bad_fraction=share)
        return list(render_rows(rows, "sft", template("chatml"), options, stats, where="stages.sft.data")), stats

    found, stats = rendered(0.5)
    assert (len(found), stats.facts()["rows"], stats.facts()["bad_rows"]) == (2, 2, 1)
    with pytest.raises(DataError, match=r"y\.jsonl:7: a text of user(.|\n)*stages\.sft\.data\.max_bad_fraction = 0\.4"):
        rendered(0.4)


# --- lengths --------------------------------------------------------------------------------------


def test_statistics_match_the_tokens() -> None:
    stats, bound = LengthStats(), template("chatml")
    found = sft_rows(chat(*CHAT), bound, ChatRendering(), stats)
    prompts, answers = ([len(bound.ids(row[key])) for row in found] for key in ("input", "output"))
    facts = stats.facts()
    assert facts["rows"] == 2
    assert facts["tokens"] == sum(prompts) + sum(answers)
    assert facts["loss_share"] == sum(answers) / facts["tokens"]
    assert facts["prompt_tokens"] == {
        "mean": sum(prompts) / 2,
        "p50": sum(prompts) / 2,
        "p95": pytest.approx(prompts[0] + 0.95 * (prompts[1] - prompts[0])),
        "max": max(prompts),
    }
    assert LengthStats().facts()["loss_share"] == 0.0


@pytest.mark.parametrize("purpose", ["sft", "pairs", "rated"])
def test_a_long_row_is_dropped_or_loses_its_oldest_turns(purpose: Purpose) -> None:
    bound, last = template("chatml"), ChatRendering(turns="last")
    row = pair(SYSTEM, *CHAT[:3]) if purpose == "pairs" else chat(SYSTEM, *CHAT, quality=3)
    short = pair(SYSTEM, CHAT[2]) if purpose == "pairs" else chat(SYSTEM, *CHAT[2:], quality=3)

    def rendered(row: Row, most: int | None, too_long: Any) -> tuple[list[Row], dict[str, Any]]:
        stats = LengthStats()
        options = last.model_copy(update={"max_seq_len_tokens": most, "too_long": too_long})
        return list(render_rows([row], purpose, bound, options, stats, where="x")), stats.facts()

    whole, facts = rendered(row, None, "drop")
    size = int(facts["sequence_tokens"]["max"])
    assert rendered(row, size, "drop")[0] == whole
    found, facts = rendered(row, size - 1, "drop")
    assert (found, facts["rows"], facts["dropped_rows"], facts["cut_rows"]) == ([], 0, 1, 0)
    found, facts = rendered(row, size - 1, "cut_turns")
    assert found == rendered(short, None, "drop")[0]
    assert (facts["rows"], facts["dropped_rows"], facts["cut_rows"]) == (1, 0, 1)
    assert rendered(row, 5, "cut_turns")[1]["dropped_rows"] == 1


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kept", ["both", "config", "file"])
def test_a_template_set_in_a_folder_is_what_transformers_uses(model_dir: Path, name: Any, kept: str) -> None:
    """Versions of transformers differ in which of the two places they read."""
    from transformers import AutoTokenizer

    set_template(model_dir, name)
    if kept == "config":
        (model_dir / "chat_template.jinja").unlink()
    if kept == "file":
        config = json.loads((model_dir / "tokenizer_config.json").read_text())
        (model_dir / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    loaded: Any = AutoTokenizer.from_pretrained(str(model_dir))
    prompt = loaded.apply_chat_template(
        [SYSTEM, *CHAT[:3]], tokenize=False, add_generation_prompt=True, attributes=RATED
    )
    assert prompt == GOLDEN[name][0]
    again = sft_rows(chat(SYSTEM, *CHAT, **RATED), ChatTemplate.load(model_dir, "model"))
    assert again == sft_rows(chat(SYSTEM, *CHAT, **RATED), template(name))


@pytest.mark.parametrize("name", NAMED)
def test_generation_ends_at_the_end_of_a_turn(model_dir: Path, name: Any) -> None:
    stop = tokenizer().convert_tokens_to_ids(TEMPLATES[name].stop)
    for _ in range(2):
        set_template(model_dir, name)
        assert json.loads((model_dir / "generation_config.json").read_text())["eos_token_id"] == [0, stop]
    (model_dir / "generation_config.json").unlink()
    set_template(model_dir, name)
    assert json.loads((model_dir / "generation_config.json").read_text())["eos_token_id"] == [0, stop]


def test_the_models_own_template_is_unchanged(model_dir: Path) -> None:
    before = {file.name: file.read_bytes() for file in model_dir.iterdir()}
    set_template(model_dir, "model")
    assert {file.name: file.read_bytes() for file in model_dir.iterdir()} == before


OWN = (
    "{%- for message in messages -%}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
"""A template that ends a turn with another token than eos, as in the base models of Qwen2.5."""


@pytest.mark.parametrize(
    ("jinja", "expected"),
    [
        (OWN, "<|im_end|>"),
        ("{%- for message in messages -%}{{ message['content'] }} {{ eos_token }}{%- endfor -%}", "<|endoftext|>"),
        ("{%- for message in messages -%}{{ message['content'] }}\n{%- endfor -%}", "<|endoftext|>"),
        ("{{ raise_exception('no') }}", "<|endoftext|>"),
    ],
)
def test_the_end_of_a_turn_is_the_first_special_token_after_an_answer(jinja: str, expected: str) -> None:
    own = copy.deepcopy(tokenizer())
    own.chat_template = jinja
    assert ChatTemplate.bind(own, "model").end_of_turn() == expected
    assert template("extra_id").end_of_turn() == TEMPLATES["extra_id"].stop
    own.eos_token = None
    without = ChatTemplate.bind(own, "model").end_of_turn()
    assert without == (expected if jinja == OWN else None)


def test_added_special_tokens_without_a_name_are_markers() -> None:
    """Control tokens may be special in tokenizer.json alone, as those of Llama 3.x are."""
    own = copy.deepcopy(tokenizer())
    backend = own.backend_tokenizer
    backend.add_special_tokens(["<|control|>", "<|stop|>"])
    backend.add_tokens(["<think>"])
    own.chat_template = OWN.replace("<|im_end|>", "<|stop|>")
    bound = ChatTemplate.bind(own, "model")
    assert not {"<|control|>", "<|stop|>"} & set(own.all_special_tokens)
    assert bound.end_of_turn() == "<|stop|>"
    rows = sft_rows(chat({"role": "user", "content": "Hi <think>"}, CHAT[1]), bound)
    assert rows == [{"input": "<|im_start|>user\nHi <think><|stop|><|im_start|>assistant", "output": "\nHello<|stop|>"}]
    for name in ("model", "chatml"):
        with pytest.raises(BadRow, match=r"contains <\|control\|>, which the tokenizer reads as a marker"):
            sft_rows(chat({"role": "user", "content": "Hi <|control|>"}, CHAT[1]), ChatTemplate.bind(own, name))


def test_a_published_model_ends_generation_where_its_own_template_ends_a_turn(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_text(OWN)
    before = {file.name: file.read_bytes() for file in model_dir.iterdir() if file.name != "generation_config.json"}
    for _ in range(2):
        publish_template(model_dir, "model")
        stop = tokenizer().convert_tokens_to_ids("<|im_end|>")
        assert json.loads((model_dir / "generation_config.json").read_text())["eos_token_id"] == [0, stop]
    assert before.items() <= {file.name: file.read_bytes() for file in model_dir.iterdir()}.items()


def test_a_folder_without_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        set_template(tmp_path, "chatml")


def test_markers_of_several_tokens_are_refused_unless_allowed() -> None:
    toy = BUILT_IN["toy-llama"]
    with pytest.raises(
        DataError, match=r"uses <extra_id_0>, <extra_id_1>, <extra_id_2>, which the tokenizer does not know as single"
    ):
        ChatTemplate.load(toy, "extra_id")
    with pytest.raises(DataError, match=r"allowed: with this tokenizer: chatml, model"):
        ChatTemplate.bind(tiny_tokenizer(), "llama3")
    found = sft_rows(chat(SYSTEM, *CHAT, **RATED), ChatTemplate.load(toy, "extra_id", whole_markers=False))
    assert found[1]["input"] == GOLDEN["extra_id"][0]


def test_a_tokenizer_without_template_is_a_clear_error() -> None:
    with pytest.raises(DataError, match=r"no chat template, or several(.|\n)*chatml, llama3, extra_id"):
        ChatTemplate.load(BUILT_IN["toy-llama"], "model")
