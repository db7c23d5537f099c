"""Writing of new tokenizers into model folders, with the same bytes under every version of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.hf.json_file import write_json
from nemo_minitron.hf.side_files import TEMPLATES_DIR
from nemo_minitron.hf.tokenizer_classes import plain_config
from nemo_minitron.hf.tokenizer_files import CONFIG_FILE, TOKENIZER_FILE

TEMPLATE_FILE = "chat_template.jinja"
_DEFAULT = "default"
_NAME = re.compile(r"\w[\w.-]{0,63}", re.ASCII)


def write_tokenizer(
    folder: Path,
    tokenizer: Any,
    special: Mapping[str, str],
    *,
    chat_template: str | Mapping[str, str] | None = None,
    max_length: int | None = None,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat templates.

    Args:
        tokenizer: object of the tokenizers package; missing tokens of `special` are added to it.
        special: transformers name, such as eos_token, -> token.
        chat_template: a template, or name -> template; the one named "default" becomes the default of the folder.
        max_length: maximum length of the model in tokens.

    Raises:
        ValueError: the name of a template is not a valid file name.
    """
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    tokenizer.save(str(folder / TOKENIZER_FILE))
    length = {} if max_length is None else {"model_max_length": max_length}
    config = {"clean_up_tokenization_spaces": False, **length, **special}
    write_json(folder / CONFIG_FILE, plain_config(config, {}, {}))
    named = {_DEFAULT: chat_template} if isinstance(chat_template, str) else dict(chat_template or {})
    for name, text in named.items():
        if name == _DEFAULT:
            (folder / TEMPLATE_FILE).write_text(text, encoding="utf-8")
            continue
        if not _NAME.fullmatch(name):
            raise ValueError(f"a chat template has the invalid name {name!r}")
        (folder / TEMPLATES_DIR).mkdir(exist_ok=True)
        (folder / TEMPLATES_DIR / f"{name}.jinja").write_text(text, encoding="utf-8")
