"""Check that all models and data of a stage have the same tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

from nemo_minitron.errors import DataError
from nemo_minitron.hf.tokenizer_identity import TokenizerIdentity, differing_added_tokens, has_tokenizer
from nemo_minitron.stages.artifacts import Model, TokenizedText
from nemo_minitron.stages.context import StageContext

_MAX_NAMED = 8
_WORDS = {"vocab": "vocabularies", "merges": "merges"}
_DATA_ROLE = "data"
AddedTokens = Mapping[int, tuple[str | None, str | None]]


def require_one_tokenizer(
    models: Mapping[str, Model], data: TokenizedText | None, ctx: StageContext, texts: tuple[Path, ...] = ()
) -> None:
    """Check that the models and the data share one tokenizer.

    Vocabulary and merges must be equal. Added tokens may differ if neither the data nor `texts` contain one of the
    differing tokens. Such a difference, or different rules for splitting text, causes a warning: both models are
    trained on the same ids, but the student's own tokenizer may produce other ids later.

    Args:
        models: input role -> model.
        data: tokens that the models read; None if they read texts.
        texts: files of rendered rows that both models read if there is no tokenized data.

    Raises:
        DataError: the models and the data do not share one tokenizer.
    """
    identities = {role: TokenizerIdentity.of(model.path) for role, model in models.items()}
    folders = {role: model.path for role, model in models.items()}
    if data is not None and data.tokenizer_identity is not None:
        identities[_DATA_ROLE] = TokenizerIdentity.parse(data.tokenizer_identity)
        folders[_DATA_ROLE] = data.path
    for one, other in combinations(identities, 2):
        parts = identities[one].differences(identities[other])
        broken = [_WORDS[part] for part in parts if part in _WORDS]
        if broken:
            raise _different(folders, identities, one, other, broken)
        if "rules" in parts:
            _warn(ctx, f"the tokenizers of {one} and {other} normalize or split text differently.")
        if "added" in parts:
            _check_added(folders, data, one, other, ctx, texts)


def require_tokenizer_of(model: Model, data: TokenizedText, ctx: StageContext) -> None:
    """Check that a model that is measured on tokenized text has the tokenizer of the text, if it has any.

    Raises:
        DataError: the tokens of the text mean something else to the model.
    """
    if has_tokenizer(model.path):
        require_one_tokenizer({"model": model}, data, ctx)


def _different(
    folders: Mapping[str, Path], identities: Mapping[str, TokenizerIdentity], one: str, other: str, broken: list[str]
) -> DataError:
    several = len(identities.keys() - {_DATA_ROLE}) > 1
    owners = "Teacher, student and data" if several else f"The {one} and the data"
    return DataError(
        f"{owners} were made with different tokenizers: {one} and {other} have different {' and '.join(broken)}.",
        where=", ".join(f"{role} {folders[role]} ({found.vocab[:8]})" for role, found in identities.items()),
        next_step="Both models must share one vocabulary: tokenize the data with the teacher's tokenizer."
        if several
        else f"In inputs.data, name a tokenize stage whose inputs.tokenizer is the stage of the {one}.",
    )


def _check_added(
    folders: Mapping[str, Path],
    data: TokenizedText | None,
    one: str,
    other: str,
    ctx: StageContext,
    texts: tuple[Path, ...],
) -> None:
    if other == _DATA_ROLE:
        _warn(ctx, f"the data were tokenized with added tokens that differ from those of {one}.")
        return
    tokens = differing_added_tokens(folders[one], folders[other])
    used = _used(data, tokens, texts)
    if used:
        raise DataError(
            f"{one} and {other} have different added tokens, and the training data contain them: "
            f"{_named(used, one, other)}.",
            where=f"{one} {folders[one]}, {other} {folders[other]}",
            next_step="Use the same tokenizer files for both models, or remove these tokens from the texts.",
        )
    unused = _named(tokens, one, other)
    _warn(ctx, f"{one} and {other} have different added tokens, which the training data do not contain: {unused}.")


def _used(data: TokenizedText | None, tokens: AddedTokens, texts: tuple[Path, ...]) -> AddedTokens:
    """Return the tokens whose ids occur in the tokenized data or whose names occur in the texts, which are JSON."""
    found: set[int] = set()
    if data is not None:
        from nemo_minitron.backends.megatron.data.used_ids import used_ids

        found = used_ids(data.path, tokens.keys())
    # JSON escapes characters beyond ASCII, quotes and backslashes.
    written = {number: [json.dumps(name)[1:-1] for name in names if name] for number, names in tokens.items()}
    for file in texts:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                found |= {number for number, names in written.items() if any(name in line for name in names)}
    return {number: names for number, names in tokens.items() if number in found}


def _named(tokens: AddedTokens, one: str, other: str) -> str:
    named = [
        f"{number} ({one} {mine or 'none'}, {other} {theirs or 'none'})" for number, (mine, theirs) in tokens.items()
    ]
    more = [f"and {len(named) - _MAX_NAMED} more"] if len(named) > _MAX_NAMED else []
    return ", ".join([*named[:_MAX_NAMED], *more])


def _warn(ctx: StageContext, text: str) -> None:
    if ctx.is_main:
        ctx.progress.warn(text)
