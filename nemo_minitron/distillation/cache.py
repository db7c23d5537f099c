"""The teacher cache: sparse distributions of a teacher on disk, compact, with checksums, and indexed by sample.

A cache is a folder of shards (safetensors) and cache.json. Each sample of S tokens is stored separately, so that it can
be read in any order, batch or parallel layout. Each entry that is read is compared with its checksum and with the text
of the sample: a wrong or damaged entry is an error, and never changes the loss.

Format: a draw has 3 bytes, 18 bits of id and 6 of count - 1 (draws of one token are merged). A top-k entry has 4 bytes,
18 bits of id and 14 of log-probability, with an error of at most 0.07 %, down to e^-20. Each token also has the number
of its entries (1 byte) and the negative entropy (2 bytes, fp16), which shifts the loss but is not in its gradient.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from nemo_minitron.distillation.sparse import SparseTeacher
from nemo_minitron.errors import ArtifactError, PlanError
from nemo_minitron.schema.losses import Sampled, TopK
from nemo_minitron.schema.training import Distillation

FORMAT_VERSION = 1
FACTS_FILE, SHARDS = "cache.json", "shard_*.safetensors"
SAMPLES_PER_SHARD = 64
ID_BITS = 18
MAX_VOCAB_SIZE = 1 << ID_BITS
LOG_PROB_STEPS, MOST_NEGATIVE_LOG_PROB = (1 << 14) - 1, -20.0
OPEN_SHARDS = 16


@dataclass(frozen=True)
class CacheFacts:
    """Description of the content of a cache: the fields of cache.json."""

    sparse: dict[str, Any]
    temperature: float
    vocab_size: int
    seq_len_tokens: int
    num_samples: int
    seed: int
    """Seed of the order of the samples, and of the draws."""
    reset_attention_mask: bool = False
    """Whether tokens did not attend to earlier documents of the same sample."""
    valid_num_tokens: int | None = None
    """Number of held-out tokens for `valid_teacher_loss`."""
    valid_teacher_loss: float | None = None
    """Held-out loss of the teacher, nats per token."""
    num_heldout: int = 0
    """Number of windows of the held-out text, which have shards of their own after those of the samples; 0 if the
    entries do not determine the KL."""
    format_version: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        return _shards(self.num_samples) + _shards(self.num_heldout)

    @property
    def first_heldout(self) -> int:
        """Index of the first held-out window; windows are numbered after the samples."""
        return _shards(self.num_samples) * SAMPLES_PER_SHARD

    def has(self, sample: int) -> bool:
        return 0 <= sample < self.num_samples or 0 <= sample - self.first_heldout < self.num_heldout

    def samples_of(self, shard: int) -> range:
        """Return the indices of the samples, or held-out windows, in a shard."""
        first = shard * SAMPLES_PER_SHARD
        end = self.num_samples if first < self.first_heldout else self.first_heldout + self.num_heldout
        return range(first, min(first + SAMPLES_PER_SHARD, end))

    def teacher_loss(self, params: Distillation) -> float | None:
        """Return the teacher's held-out loss if it was measured on as much text as the student's; otherwise None."""
        return self.valid_teacher_loss if self.valid_num_tokens == params.valid_num_tokens else None


def _shards(num_samples: int) -> int:
    return -(-num_samples // SAMPLES_PER_SHARD)


def gives_kl(sparse: Sampled | TopK, temperature: float) -> bool:
    """Return whether the entries determine the KL at temperature 1, or, with a tail, a lower bound of it."""
    return temperature == 1.0 and (isinstance(sparse, Sampled) or sparse.tail == "ghost")


@dataclass(frozen=True)
class Entry:
    """One sample in the stored format."""

    payload: bytes
    per_token: NDArray[np.uint8]
    """Number of entries of each token [S]."""
    negative_entropy: NDArray[np.float16]
    """Negative entropy of each token's distribution [S]."""
    text_hash: int

    @property
    def checksum(self) -> int:
        return crc32(self.payload, crc32(self.per_token.tobytes(), crc32(self.negative_entropy.tobytes())))


def require_vocabulary(vocab_size: int) -> None:
    """Require a vocabulary whose ids fit into the format.

    Raises:
        PlanError: the vocabulary is too large.
    """
    if vocab_size > MAX_VOCAB_SIZE:
        raise PlanError(
            f"A vocabulary of {vocab_size:,} does not fit into a teacher cache.", allowed=f"at most {MAX_VOCAB_SIZE:,}"
        )


def shard_name(shard: int) -> str:
    return f"shard_{shard:06d}.safetensors"


def hash_of(tokens_S: NDArray[np.integer]) -> int:
    """Return a 64-bit hash of the token ids of a sample."""
    digest = blake2b(np.ascontiguousarray(tokens_S, dtype="<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# --- packing ----------------------------------------------------------------------------------------


def pack(teacher: SparseTeacher, tokens_S: NDArray[np.integer], sparse: Sampled | TopK) -> Entry:
    """Pack the distributions [S, K] of one sample."""
    ids = teacher.ids.cpu().numpy().astype(np.uint32)
    if isinstance(sparse, Sampled):
        payload, per_token = _pack_draws(ids)
    else:
        payload, per_token = _pack_top_k(ids, teacher.probs.cpu().double().log().numpy())
    entropy = teacher.negative_entropy.cpu().numpy().astype(np.float16)
    return Entry(payload, per_token, entropy, hash_of(tokens_S))


def _pack_draws(ids_SR: NDArray[np.uint32]) -> tuple[bytes, NDArray[np.uint8]]:
    ordered = np.sort(ids_SR, axis=1)
    first = np.ones_like(ordered, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(first)
    counts = np.diff(np.append(starts, ordered.size)).astype(np.uint32)
    words = ordered.ravel()[starts] | (counts - 1) << ID_BITS
    return words.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes(), first.sum(1).astype(np.uint8)


def _pack_top_k(ids_SK: NDArray[np.uint32], log_probs_SK: NDArray[np.float64]) -> tuple[bytes, NDArray[np.uint8]]:
    clipped = np.clip(log_probs_SK, MOST_NEGATIVE_LOG_PROB, 0.0)
    levels = np.rint(clipped / MOST_NEGATIVE_LOG_PROB * LOG_PROB_STEPS).astype(np.uint32)
    words = ids_SK | levels << ID_BITS
    return words.astype("<u4").tobytes(), np.zeros(len(ids_SK), dtype=np.uint8)


def unpack(entry: Entry, sparse: Sampled | TopK) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return (ids, probabilities) [S, K]; tokens with fewer entries are padded with probability 0."""
    if isinstance(sparse, TopK):
        words = np.frombuffer(entry.payload, dtype="<u4").reshape(len(entry.per_token), -1)
        levels = (words >> ID_BITS).astype(np.float32)
        return _ids(words), np.exp(levels * np.float32(MOST_NEGATIVE_LOG_PROB / LOG_PROB_STEPS))
    packed = np.frombuffer(entry.payload, dtype=np.uint8).reshape(-1, 3)
    words = packed.astype(np.uint32) @ np.array([1, 1 << 8, 1 << 16], dtype=np.uint32)
    num_tokens, most = len(entry.per_token), int(entry.per_token.max(initial=1))
    row = np.repeat(np.arange(num_tokens), entry.per_token)
    first = np.cumsum(entry.per_token, dtype=np.int64) - entry.per_token
    column = np.arange(len(words)) - np.repeat(first, entry.per_token)
    ids, probs = np.zeros((num_tokens, most), np.int64), np.zeros((num_tokens, most), np.float32)
    ids[row, column] = _ids(words)
    probs[row, column] = ((words >> ID_BITS) + 1) / sparse.rounds
    return ids, probs


def _ids(words: NDArray[np.uint32]) -> NDArray[np.int64]:
    return (words & (MAX_VOCAB_SIZE - 1)).astype(np.int64)


# --- files ------------------------------------------------------------------------------------------


def write_shard(folder: Path, shard: int, entries: list[Entry]) -> None:
    """Write all samples of a shard. The file gets its name when it is complete."""
    payloads = [np.frombuffer(entry.payload, dtype=np.uint8) for entry in entries]
    tensors: dict[str, NDArray[Any]] = {
        "payload": np.concatenate(payloads),
        "offset": np.cumsum([0, *map(len, payloads)], dtype=np.int64),
        "per_token": np.stack([entry.per_token for entry in entries]),
        "negative_entropy": np.stack([entry.negative_entropy for entry in entries]),
        "text_hash": np.array([entry.text_hash for entry in entries], dtype=np.int64),
        "checksum": np.array([entry.checksum for entry in entries], dtype=np.int64),
    }
    partial = folder / f".{shard_name(shard)}.partial"
    save_file(tensors, partial)
    partial.rename(folder / shard_name(shard))


def require_same_keys(facts: CacheFacts, params: Distillation, folder: Path) -> None:
    """Require a cache that was made with the settings of a distillation.

    The plan compares the recipes of both. Only this check finds a recipe that was changed after the cache was made
    (--accept-drift).

    Raises:
        ArtifactError: a setting differs, or the cache has too few samples.
    """
    loss = params.loss.logits
    wanted = {
        "sparse": loss and loss.sparse and loss.sparse.model_dump(mode="json"),
        "temperature": loss and loss.temperature,
        "seq_len_tokens": params.seq_len_tokens,
        "seed": params.seed,
        "reset_attention_mask": params.reset_attention_mask,
    }
    had = asdict(facts)
    other = [f"{key} = {value}, the cache has {had[key]}" for key, value in wanted.items() if value != had[key]]
    needed = params.num_steps * params.global_batch_size
    if needed > facts.num_samples:
        other.append(f"num_steps * global_batch_size = {needed}, the cache has {facts.num_samples} samples")
    if other:
        raise ArtifactError(
            f"The teacher cache does not fit this distillation: {'; '.join(other)}.",
            where=str(folder),
            next_step="Give both the same values.",
        )


def write_facts(folder: Path, facts: CacheFacts) -> None:
    (folder / FACTS_FILE).write_text(json.dumps(asdict(facts), indent=2) + "\n")


class TeacherCache:
    """Reader of a finished cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = _read_facts(folder)
        self.sparse: Sampled | TopK = (
            Sampled.model_validate(self.facts.sparse)
            if self.facts.sparse.get("kind") == "sampled"
            else TopK.model_validate(self.facts.sparse)
        )
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def read(self, sample_ids: list[int], tokens_BS: NDArray[np.integer]) -> SparseTeacher:
        """Return the teacher's distributions of these samples [B * S, K].

        Raises:
            ArtifactError: the cache does not have a sample, has it with another text, or is damaged.
        """
        ids, probs, entropies = [], [], []
        for number, tokens in zip(sample_ids, tokens_BS, strict=True):
            entry = self._checked_entry(number, tokens)
            of_sample = unpack(entry, self.sparse)
            ids.append(torch.from_numpy(of_sample[0]))
            probs.append(torch.from_numpy(self._normalized(of_sample[1])))
            entropies.append(torch.from_numpy(entry.negative_entropy.astype(np.float32)))
        has_tail = isinstance(self.sparse, TopK) and self.sparse.tail == "ghost"
        return SparseTeacher(_padded(ids), _padded(probs), torch.cat(entropies), may_have_tail=has_tail)

    def _normalized(self, probs_SK: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalize probabilities without a tail, which do not sum to 1 after rounding."""
        if isinstance(self.sparse, TopK) and (self.sparse.tail == "drop" or self.sparse.k >= self.facts.vocab_size):
            return probs_SK / probs_SK.sum(axis=1, keepdims=True)
        return probs_SK

    def _checked_entry(self, number: int, tokens_S: NDArray[np.integer]) -> Entry:
        if not self.facts.has(number):
            raise ArtifactError(
                f"The teacher cache has no sample {number}.",
                where=str(self.folder),
                allowed=f"0 to {self.facts.num_samples - 1}",
                next_step="Raise num_samples of the cache to num_steps * global_batch_size.",
            )
        where = self.folder / shard_name(number // SAMPLES_PER_SHARD)
        try:
            entry, checksum = _read_entry(self._open(number // SAMPLES_PER_SHARD), number % SAMPLES_PER_SHARD)
        except (OSError, SafetensorError, ValueError) as error:
            raise _damaged(where, f"{type(error).__name__}: {error}") from error
        if entry.checksum != checksum:
            raise _damaged(where, f"checksum of sample {number}")
        if entry.text_hash != hash_of(tokens_S):
            raise ArtifactError(
                f"Sample {number} of the teacher cache has another text.",
                where=str(where),
                next_step="The data, its seed or its length has changed since the cache was made.",
            )
        return entry

    def _open_shard(self, shard: int) -> Any:
        return safe_open(self.folder / shard_name(shard), framework="np")


def _read_entry(shard: Any, index: int) -> tuple[Entry, int]:
    start, stop = shard.get_slice("offset")[index : index + 2].tolist()
    entry = Entry(
        payload=shard.get_slice("payload")[start:stop].tobytes(),
        per_token=shard.get_slice("per_token")[index],
        negative_entropy=shard.get_slice("negative_entropy")[index],
        text_hash=int(shard.get_slice("text_hash")[index]),
    )
    return entry, int(shard.get_slice("checksum")[index])


def _padded(parts: list[Tensor]) -> Tensor:
    most = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, most - part.shape[1])) for part in parts])


def _read_facts(folder: Path) -> CacheFacts:
    file = folder / FACTS_FILE
    try:
        fields = dict(json.loads(file.read_text()))
        # Check the version first: another version may have other fields.
        version = fields.get("format_version")
        if version == FORMAT_VERSION:
            return CacheFacts(**fields)
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    raise ArtifactError(
        f"The teacher cache has format {version}.",
        where=str(file),
        allowed=str(FORMAT_VERSION),
    )


def _damaged(where: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"The teacher cache is damaged: {reason}.", where=str(where))
