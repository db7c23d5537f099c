"""The one way in which this package loads a tokenizer."""

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
    """The transformers tokenizer of a folder, as every part of the package uses it.

    Nothing is cut off, padded, or put behind a text, whatever the files ask for. tokenizer.json alone is enough. Code
    beside a tokenizer is never run.

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
            next_step=f"Add the model's {TOKENIZER_FILE}.",
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    try:
        _keep_prefix_only(tokenizer)
    except (MinitronError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it loads, but cannot tokenize
        raise _unreadable(model_dir, error) from error
    tokenizer.name_or_path = str(model_dir)
    return tokenizer


def require_known_ids(ids: Iterable[int], vocab_size: int | None, tokenizer: Any, where: str) -> None:
    """Raises DataError if a token id has no row in the embeddings of the model.

    Args:
        vocab_size: of the model; None: not known, nothing is checked.
    """
    largest = max(ids, default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise beyond_vocabulary(f"Token {tokenizer.convert_ids_to_tokens(largest)!r}", largest, vocab_size, where)


def beyond_vocabulary(what: str, token_id: int, vocab_size: int, where: str) -> DataError:
    """The error for a token that the model has no embedding for."""
    return DataError(
        f"{what} has id {token_id}, beyond the model's vocabulary of {vocab_size}.",
        where=where or None,
        next_step="The tokenizer is of another model, or tokens were added to it alone: resize the embeddings, "
        "or choose another chat template if it is one of the template's tokens.",
    )


def _keep_prefix_only(tokenizer: Any) -> None:
    """Let the tokenizer put nothing behind a text.

    Some put an eos token behind every text; no model would go on after it. What they put before a text stays.
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
                next_step=f"pip install sentencepiece, or add the model's {TOKENIZER_FILE}.",
            )
        return
    if not present & {"vocab.json", "vocab.txt"}:
        raise CheckpointError(
            "There is no tokenizer beside the model.",
            where=str(model_dir),
            next_step=f"Add the model's {TOKENIZER_FILE} and {CONFIG_FILE}.",
        )


def _load(model_dir: Path, found: Repairs) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    has_definition = (model_dir / TOKENIZER_FILE).is_file()
    options: dict[str, Any] = {
        "local_files_only": True,
        # Repaired in the files already; asking for nothing keeps transformers from warning about sound tokenizers.
        "fix_mistral_regex": False,
    }
    try:
        with _view(model_dir, found, with_config=not has_definition) as folder:
            # The repaired files name the plain class; `AutoTokenizer` chooses by the kind of the model, too.
            loader: Any = PreTrainedTokenizerFast if has_definition else AutoTokenizer
            return loader.from_pretrained(str(folder), trust_remote_code=False, **options)
    except (MinitronError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # any type, a panic of tokenizers among them, which is no Exception
        raise _unreadable(model_dir, error) from error


def _unreadable(model_dir: Path, error: BaseException) -> CheckpointError:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    short = line if len(line) <= _MAX_REASON_CHARS else line[:_MAX_REASON_CHARS] + "..."
    return CheckpointError(
        f"The tokenizer cannot be loaded: {short}",
        where=str(model_dir),
        next_step=f"Add the model's {TOKENIZER_FILE} and {CONFIG_FILE}, or download them again.",
    )


@contextmanager
def _view(model_dir: Path, found: Repairs, *, with_config: bool) -> Iterator[Path]:
    """A folder with links to the tokenizer's files and repaired copies of those that need it.

    Args:
        with_config: link config.json too, which says the class of a tokenizer without tokenizer.json.
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
