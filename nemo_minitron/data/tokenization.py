"""Documents -> token ids, with the teacher's tokenizer."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.data.readers import Text
from nemo_minitron.errors import CheckpointError, DataError, EnvironmentProblem
from nemo_minitron.hf.tokenizer import load_tokenizer

BATCH_CHARS = 1 << 18
"""Text that goes to a process at a time."""
CHARS_PER_PROCESS = 1 << 22
"""A process takes a third of a second to start: it has to have this much to do."""
EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>")
"""What base models were trained to see between documents. Chat models keep it, but have another eos."""


@dataclass(frozen=True)
class Document:
    """One tokenized document."""

    ids: NDArray[np.int64]
    """Token ids, ending in eod."""
    num_bytes: int
    """UTF-8 size of the text."""
    position_bytes: int = 0
    """Of the text (see Text)."""


@dataclass(frozen=True)
class DocumentTokenizer:
    """A tokenizer bound to a model's vocabulary."""

    definition: str
    """JSON of the `tokenizers` library; goes to the worker processes."""
    vocab_size: int
    """Of the model; the tokenizer may know fewer tokens, never more."""
    eod_id: int

    @classmethod
    def load(cls, model_dir: Path, vocab_size: int) -> DocumentTokenizer:
        """The tokenizer of a Hugging Face folder.

        Documents end in `<|endoftext|>` or `<|end_of_text|>` when the vocabulary has it, else in the eos token.

        Raises:
            CheckpointError: there is no readable tokenizer.
            DataError: its end-of-document token is beyond the model's vocabulary.
        """
        tokenizer = load_tokenizer(model_dir)
        backend = tokenizer.backend_tokenizer
        known = [backend.token_to_id(token) for token in EOD_TOKENS]
        eod_id = next((number for number in known if number is not None), tokenizer.eos_token_id)
        if eod_id is None:
            raise CheckpointError("The tokenizer has no end-of-text token.", where=str(model_dir))
        _require_known(int(eod_id), vocab_size, str(model_dir))
        return cls(backend.to_str(), vocab_size, int(eod_id))

    def documents(self, texts: Iterable[Text], *, where: str, num_processes: int = 1) -> Iterator[Document]:
        """Tokenize in order; the number of processes changes nothing but the time.

        Raises:
            DataError: an id beyond the model's vocabulary (tokenizer of another model).
            EnvironmentProblem: a process was killed.
        """
        with _encoder(self.definition, num_processes) as encode:
            for batch, rows in encode(_batches(texts)):
                for text, ids in zip(batch, rows, strict=True):
                    _require_known(int(ids.max(initial=0)), self.vocab_size, where)
                    closed = np.append(ids, self.eod_id).astype(np.int64)
                    yield Document(closed, len(text.text.encode("utf-8")), text.position_bytes)


def processes_for(size_bytes: int, workers: int | None) -> int:
    """How many processes are worth starting for so much text; 1: this one.

    Args:
        workers: at most so many; None: as many as there are cores.
    """
    return max(1, min(workers or os.cpu_count() or 1, size_bytes // CHARS_PER_PROCESS))


def is_heldout(seed: int, source: int, document: int, fraction: float) -> bool:
    """Whether a document belongs to the validation split; depends on nothing but its number."""
    digest = hashlib.blake2b(f"{seed}:{source}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _require_known(token_id: int, vocab_size: int, where: str) -> None:
    if token_id >= vocab_size:
        raise DataError(
            f"Tokenizer mismatch: token id {token_id} is beyond the model's vocabulary of {vocab_size}.",
            where=where,
            next_step="The tokenizer is of another model: check the files beside the weights.",
        )


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- processes ----------------------------------------------------------------------------------

Ids = NDArray[np.int32]
Encoded = Iterator[tuple[list[Text], Sequence[Ids]]]
_worker_tokenizer: Any = None
"""Set once in each worker process, which does nothing else."""


@contextmanager
def _encoder(definition: str, num_processes: int) -> Iterator[Callable[[Iterator[list[Text]]], Encoded]]:
    """A function from batches of text to their ids, in order."""
    if num_processes == 1:
        tokenizer = _open_tokenizer(definition)
        yield lambda batches: ((batch, _encode(tokenizer, [text.text for text in batch])) for batch in batches)
        return
    # Spawned, not forked: torch and tokenizers hold threads and locks that do not survive a fork.
    pool = ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(definition,)
    )
    try:
        yield lambda batches: _encode_in(pool, batches, 2 * num_processes)
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "A tokenizer process was killed.",
            next_step="Is there enough memory? execution.workers sets the number of processes.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_in(pool: ProcessPoolExecutor, batches: Iterator[list[Text]], ahead: int) -> Encoded:
    """At most `ahead` batches are under way, so that memory stays bounded."""
    waiting: deque[tuple[list[Text], Future[list[Ids]]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_encode_here, [text.text for text in batch])))
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _start_worker(definition: str) -> None:
    global _worker_tokenizer
    # One thread a process.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = _open_tokenizer(definition)


def _encode_here(texts: list[str]) -> list[Ids]:
    return _encode(_worker_tokenizer, texts)


def _open_tokenizer(definition: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _encode(tokenizer: Any, texts: list[str]) -> list[Ids]:
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(row.ids, dtype=np.int32) for row in encoded]
