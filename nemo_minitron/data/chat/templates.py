"""Named chat templates in Jinja, in the form that Hugging Face tokenizers use.

Each takes an optional variable `attributes`, a dict of ratings, and writes it as one line before the last answer:

    tokenizer.apply_chat_template(messages, add_generation_prompt=True, attributes={"helpfulness": 4})
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.rows import ATTRIBUTES
from nemo_minitron.errors import CheckpointError, shortened
from nemo_minitron.schema.chats import TemplateName

TEMPLATE_FILE, CONFIG_FILE, GENERATION_FILE = "chat_template.jinja", "tokenizer_config.json", "generation_config.json"
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of additional named templates, e.g. for tools."""


@dataclass(frozen=True)
class Template:
    """Named template with its special tokens."""

    jinja: str
    stop: str
    """Text that ends an answer and stops generation."""
    markers: tuple[str, ...]
    """Tokens that should be single special tokens of the tokenizer; no text of a row may contain them."""
    rated_end: str = ""
    """Text at the end of the dialogue for a model that rates answers."""


def _rating(prefix: str) -> str:
    """Return Jinja that sets `rating` to prefix, name:value in the fixed order and a line end, or to nothing."""
    names = ", ".join(f"'{name}'" for name in ATTRIBUTES)
    return (
        "{%- set rating -%}{%- if attributes is defined and attributes -%}"
        f"{{{{ '{prefix}' }}}}"
        f"{{%- for name in [{names}] if name in attributes -%}}"
        "{{ ('' if loop.first else ',') ~ name ~ ':' ~ (attributes[name] | round | int) }}"
        "{%- endfor -%}{{ '\\n' }}{%- endif -%}{%- endset -%}"
    )


def _turns(header: str, end: str) -> str:
    """Return Jinja that writes each message as header, text and end; `header` is a Jinja expression of `role`."""
    return (
        "{%- for message in messages -%}{%- set role = message['role'] -%}"
        f"{{{{ {header} }}}}"
        "{%- if role == 'assistant' and loop.last -%}{{ rating }}{%- endif -%}"
        f"{{{{ (message['content'] | trim) ~ '{end}' }}}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{%- set role = 'assistant' -%}"
        f"{{{{ ({header}) ~ rating }}}}"
        "{%- endif -%}"
    )


_CHATML = _rating("Attributes: ") + _turns(r"'<|im_start|>' ~ role ~ '\n'", r"<|im_end|>\n")
_LLAMA3 = (
    _rating("Attributes: ")
    + "{{ '<|begin_of_text|>' }}"
    + _turns(r"'<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n'", "<|eot_id|>")
)
# The system block is always written, because NeMo-Aligner writes it for an empty system text, too.
_EXTRA_ID = (
    _rating("<extra_id_2>")
    + "{%- if messages[0]['role'] != 'system' -%}{{ '<extra_id_0>System\\n\\n' }}{%- endif -%}"
    + _turns(r"('<extra_id_0>' if role == 'system' else '<extra_id_1>') ~ (role | capitalize) ~ '\n'", r"\n")
)

TEMPLATES: dict[TemplateName, Template] = {
    "chatml": Template(_CHATML, "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "llama3": Template(
        _LLAMA3,
        "<|eot_id|>",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "extra_id": Template(
        _EXTRA_ID,
        "<extra_id_1>",
        ("<extra_id_0>", "<extra_id_1>", "<extra_id_2>"),
        rated_end="<extra_id_2>",
    ),
}
"""Named templates; the name `model` means the tokenizer's own template."""


def set_template(model_dir: Path, name: TemplateName) -> None:
    """Set the chat template of a Hugging Face folder, and add its stop token to those that end generation.

    The template is written to both places from which versions of transformers read it: a separate file, which newer
    versions prefer, and tokenizer_config.json. Additional named templates of the folder are removed, because the
    model was not trained with them. The name `model` changes nothing.

    Raises:
        CheckpointError: there is no readable tokenizer_config.json.
    """
    if name == "model":
        return
    template = TEMPLATES[name]
    config = _read(model_dir / CONFIG_FILE)
    shutil.rmtree(model_dir / NAMED_TEMPLATES, ignore_errors=True)
    (model_dir / TEMPLATE_FILE).write_text(template.jinja, encoding="utf-8")
    _write(model_dir / CONFIG_FILE, {**config, "chat_template": template.jinja})
    add_stop(model_dir, template.stop)


def add_stop(model_dir: Path, stop: str) -> None:
    """Add the text that ends an answer to the tokens that end generation, if it is a single token of the tokenizer."""
    file, stop_id = model_dir / GENERATION_FILE, _token_id(model_dir, stop)
    if stop_id is None:
        return
    config = _read(file if file.is_file() else file.with_name("config.json"))
    if not file.is_file():
        config = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    known = config.get("eos_token_id")
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if stop_id not in ids:
        # Append it, because the first id also serves for padding.
        _write(file, {**config, "eos_token_id": [*ids, stop_id]})


def _token_id(model_dir: Path, token: str) -> int | None:
    """Return the id of an added token, or None if the tokenizer has no single token for it."""
    file = model_dir / "tokenizer.json"
    added = _read(file).get("added_tokens", []) if file.is_file() else []
    return next((found["id"] for found in added if found["content"] == token), None)


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"The file cannot be read: {shortened(error)}",
            where=str(file),
            next_step="The folder needs tokenizer.json and tokenizer_config.json in the format that `export` writes.",
        ) from error


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
