"""The files that assets are expected to have. `assets.py` makes them; whoever reads an asset compares them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nemo_minitron.artifacts.manifest import sha256_of
from nemo_minitron.errors import EnvironmentProblem

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class File:
    """Expected checksum and size of a file of an asset."""

    sha256: str
    size_bytes: int


_EVAL_FILES = {
    "arc_challenge": File("4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90", 98_080),
    "arc_easy": File("44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b", 158_824),
    "boolq": File("f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9", 1_999_832),
    "hellaswag": File("5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b", 11_186_432),
    "openbookqa": File("07155b012c9420605fc5677a589ba673f3aa9122c5e8408f5c3f0f320b88690f", 96_872),
    "piqa": File("6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222", 465_608),
    "sciq": File("656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd", 555_448),
    "winogrande": File("992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830", 165_504),
}
ASSET_FILES: dict[str, dict[str, File]] = {
    "smollm2-135m-instruct": {
        GGUF_NAME: File("b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 98_362_432)
    },
    "benchmark-train-passages": {
        "passages.jsonl": File("ae0816c094e266a889d1375a0ce9584cb6a76d37edc63170879c31278711f151", 31_065_276)
    },
    "benchmark-train-answers": {
        "answers.jsonl": File("5f67a5a94ac2261d1e793b69369762b1ca6a4179f678710580a6e2ef2ed4b759", 7_606_408)
    },
    "benchmark-train-pairs": {
        "pairs.jsonl": File("ea287056388bbeff6d7c5aff2d4dbb5bfc443fd717963c45fdbc19403a73387a", 11_491_817)
    },
    "benchmark-train-instructions": {
        "instructions.jsonl": File("5de70c1b1d3658a18abe72e199229a28c1a3bd025916aa38f4eb3c4bd06ef0f4", 12_952_018)
    },
    "offline-eval-tasks": {f"{task}/validation.arrow": file for task, file in _EVAL_FILES.items()},
}
"""Asset -> path in its folder -> expected checksum and size. Assets that ship with the package are not listed."""


def require_expected_files(name: str, folder: Path) -> None:
    """Refuse an asset whose files differ from the published ones. Each file is hashed once per process.

    Raises:
        EnvironmentProblem: naming the file.
    """
    wrong = wrong_file(ASSET_FILES.get(name, {}), folder)
    if wrong is not None:
        raise EnvironmentProblem(
            f"{wrong} of asset {name} is missing, or is another file than the one that was published.",
            where=str(folder),
            next_step=f"Make it again: minitron assets fetch {name}",
        )


def wrong_file(files: Mapping[str, File], folder: Path) -> str | None:
    """Return the first file that is missing or has another size or checksum, or None."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected.size_bytes or _known_sha256(file) != expected.sha256:
            return name
    return None


def _known_sha256(file: Path) -> str:
    found = file.stat()
    return _sha256_of_state(file, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=64)
def _sha256_of_state(file: Path, *state: int) -> str:
    """Hash a file; the state is part of the cache key, so a changed file is hashed again."""
    return sha256_of(file)
