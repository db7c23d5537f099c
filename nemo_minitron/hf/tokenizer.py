"""Loading of tokenizers; all parts of the package use `load_tokenizer`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError, DataError, MinitronError
from nemo_minitron.hf.links import require_inside
from nemo_minitron.hf.tokenizer_bounds import require_bounded_rules
from nemo_minitron.hf.tokenizer_files import CONFIG_FILE, TOKENIZER_FILE, Repairs, repairs

_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*chat_template*")
_SENTENCEPIECE = "tokenizer.model"
_MAX_REASON_CHARS = 200


def load_tokenizer(model_dir: Path) -> Any:
    """Load the transformers tokenizer of a folder.

    It never truncates or pads a text, or appends tokens to it, regardless of the settings in the files. tokenizer.json
    alone is sufficient. Code in the folder is never run.

    Raises:
        CheckpointError: there is no readable tokenizer, or it has no fast version.
    """
    _require_files(model_dir)
    found = repairs(model_dir)
    require_bounded_rules(found.definition, model_dir)
    tokenizer = _load(model_dir, found)
    if not tokenizer.is_fast:
        raise CheckpointError(
            "The tokenizer has no fast version.",
            where=str(model_dir),
            next_step=f"Add {TOKENIZER_FILE} of the model.",
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    try:
        _keep_prefix_only(tokenizer)
    except (MinitronError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizer loads, but cannot tokenize
        raise _unreadable(model_dir, error) from error
    tokenizer.name_or_path = str(model_dir)
    return tokenizer


def require_known_ids(ids: Iterable[int], vocab_size: int | None, tokenizer: Any, where: str) -> None:
    """Check that every token id has a row in the embeddings of the model.

    Args:
        vocab_size: vocabulary size of the model; None: unknown, nothing is checked.

    Raises:
        DataError: a token id is too large.
    """
    largest = max(ids, default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise beyond_vocabulary(f"Token {tokenizer.convert_ids_to_tokens(largest)!r}", largest, vocab_size, where)


def beyond_vocabulary(what: str, token_id: int, vocab_size: int, where: str) -> DataError:
    """Return the error for a token without an embedding in the model."""
    return DataError(
        f"{what} has id {token_id}, beyond the model's vocabulary of {vocab_size}.",
        where=where or None,
        next_step="Use the tokenizer of this model. If tokens were added to the tokenizer only, resize the embeddings; "
        "if the token is from the chat template, choose another template.",
    )


def _keep_prefix_only(tokenizer: Any) -> None:
    """Stop the tokenizer from appending tokens to a text, and keep the tokens that it puts in front.

    Some tokenizers append an eos token to every text, after which no model continues the text.
    """
    from tokenizers import processors

    mark = "a"
    whole, alone = (tokenizer.encode(mark, add_special_tokens=special) for special in (True, False))
    starts = range(len(whole) - len(alone) + 1)
    start = next((start for start in starts if whole[start : start + len(alone)] == alone), 0)
    if whole[start:] == alone:
        return
    prefix = [(tokenizer.convert_ids_to_tokens(number), number) for number in whole[:start]]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(f"{token}:0" for token, _ in prefix), "$A:0"],
        pair=[*(f"{token}:0" for token, _ in prefix), "$A:0", "$B:1"],
        special_tokens=prefix,
    )


def _require_files(model_dir: Path) -> None:
    present = {file.name for file in model_dir.iterdir()} if model_dir.is_dir() else set()
    if TOKENIZER_FILE in present:
        return
    if _SENTENCEPIECE in present:
        if find_spec("sentencepiece") is None:
            raise CheckpointError(
                f"There is no {TOKENIZER_FILE}, and sentencepiece, which reads {_SENTENCEPIECE}, is not installed.",
                where=str(model_dir),
                next_step=f"pip install sentencepiece, or add {TOKENIZER_FILE} of the model.",
            )
        return
    if not present & {"vocab.json", "vocab.txt"}:
        raise CheckpointError(
            "The model folder has no tokenizer.",
            where=str(model_dir),
            next_step=f"Add {TOKENIZER_FILE} and {CONFIG_FILE} of the model.",
        )


def _load(model_dir: Path, found: Repairs) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    has_definition = (model_dir / TOKENIZER_FILE).is_file()
    options: dict[str, Any] = {
        "local_files_only": True,
        # The files are repaired already; without this option transformers also warns about correct tokenizers.
        "fix_mistral_regex": False,
    }
    try:
        with _view(model_dir, found, with_config=not has_definition) as folder:
            # The repaired files specify this class, but `AutoTokenizer` would also consider the model type.
            loader: Any = PreTrainedTokenizerFast if has_definition else AutoTokenizer
            return loader.from_pretrained(str(folder), trust_remote_code=False, **options)
    except (MinitronError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers package is not an Exception
        raise _unreadable(model_dir, error) from error


def _unreadable(model_dir: Path, error: BaseException) -> CheckpointError:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    short = line if len(line) <= _MAX_REASON_CHARS else line[:_MAX_REASON_CHARS] + "..."
    return CheckpointError(
        f"The tokenizer cannot be loaded: {short}",
        where=str(model_dir),
        next_step=f"Add {TOKENIZER_FILE} and {CONFIG_FILE} of the model, or download them again.",
    )


@contextmanager
def _view(model_dir: Path, found: Repairs, *, with_config: bool) -> Iterator[Path]:
    """Create a temporary folder with links to the tokenizer files, and repaired copies of those that need repairs.

    Args:
        with_config: also link config.json, which determines the class of a tokenizer without tokenizer.json.
    """
    with tempfile.TemporaryDirectory(prefix="minitron-tokenizer-") as name:
        view = Path(name)
        patterns = [*_PATTERNS, "config.json"] if with_config else _PATTERNS
        for file in {file for pattern in patterns for file in model_dir.glob(pattern)}:
            require_inside(file, model_dir)
            if file.name not in found.files:
                (view / file.name).symlink_to(file.resolve())
        found.write(view)
        yield view
