"""Fuzzed readers of files from other people. Another reader is one line of READERS."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.schema.data import DataSource
from tests.conftest import REPO
from tests.support import fuzz_archives as archives
from tests.support.fuzz import Reader, as_json, damaged_bytes

TOY_MODEL = REPO / "nemo_minitron" / "toy" / "model"
BUILDING = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


# --- models ---------------------------------------------------------------------------------------


def _good_config(folder: Path) -> Any:
    shutil.copy(TOY_MODEL / "config.json", folder)
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return [
        config,
        {**config, "rope_scaling": {**scaling, "original_max_position_embeddings": 8192}},
        {**config, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "layer_types": ["full_attention"] * 4},
        {**config, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
    ]


def _bad_config(rng: random.Random, good: Any, folder: Path) -> None:
    (folder / "config.json").write_bytes(as_json(rng, rng.choice(good)))


def _read_config(folder: Path) -> None:
    from nemo_minitron.families import explicit_config, num_params
    from nemo_minitron.families.hf_config import read_shape
    from nemo_minitron.hf.checkpoint import read_config

    config = read_config(folder)
    num_params(read_shape(explicit_config(config)))


def _good_safetensors(folder: Path) -> bytes:
    import torch
    from safetensors.torch import save_file

    tensors = {f"model.layers.{i}.weight": torch.arange(6.0).reshape(2, 3) for i in range(3)}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return (folder / "model.safetensors").read_bytes()


def _bad_safetensors(rng: random.Random, good: bytes, folder: Path) -> None:
    length = int.from_bytes(good[:8], "little")
    if rng.random() < 0.5:
        data = damaged_bytes(rng, good, 8 + length)
    else:
        header = as_json(rng, json.loads(good[8 : 8 + length]))
        data = len(header).to_bytes(8, "little") + header + good[8 + length :]
    (folder / "model.safetensors").write_bytes(data)


def _read_safetensors(folder: Path) -> None:
    from nemo_minitron.hf.weight_files import opened, stored_tensors

    for name, tensor in stored_tensors(folder).items():
        with opened(tensor.file) as file:
            file.get_tensor(name)


def _good_index(folder: Path) -> Any:
    import torch
    from safetensors.torch import save_file

    names = {f"model-0000{i}-of-00002.safetensors": [f"a.{i}.{j}" for j in range(3)] for i in (1, 2)}
    for file, inside in names.items():
        save_file({name: torch.zeros(2) for name in inside}, str(folder / file))
    index = {"metadata": {"total_size": 48}, "weight_map": {one: file for file, all_ in names.items() for one in all_}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def _bad_index(rng: random.Random, good: Any, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(as_json(rng, good))


def _good_gguf(folder: Path) -> bytes:
    from tests.support.tiny_gguf import tiny_gguf
    from tests.support.tiny_models import tiny_model_dir

    model = tiny_model_dir(folder / "source", "llama_mha", num_hidden_layers=1)
    return tiny_gguf(model, folder / "model.gguf").read_bytes()


def _bad_gguf(rng: random.Random, good: bytes, folder: Path) -> None:
    extent = rng.choice([64, 600, 600, 16000, len(good)])
    (folder / "model.gguf").write_bytes(damaged_bytes(rng, good, extent))


def _read_gguf(folder: Path) -> None:
    from nemo_minitron.hf.gguf_header import read_header, require_model
    from nemo_minitron.hf.gguf_rope import rope_config
    from nemo_minitron.hf.gguf_tokenizer import save_tokenizer

    header = read_header(folder / "model.gguf")
    require_model(header)
    rope_config(header)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    save_tokenizer(header.fields, header.file, out)


def _good_tokenizer(folder: Path) -> Any:
    for name in BUILDING:
        shutil.copy(TOY_MODEL / name, folder)
    found = {name: json.loads((folder / name).read_text()) for name in BUILDING[1:]}
    # The vocabulary is the longest part, and the least interesting one.
    model = found["tokenizer.json"]["model"]
    model["merges"] = model["merges"][:50]
    return found


def _bad_tokenizer(rng: random.Random, good: Any, folder: Path) -> None:
    chosen = rng.choice(list(good))
    for name, content in good.items():
        data = as_json(rng, content) if name == chosen else json.dumps(content).encode()
        (folder / name).write_bytes(data)


def _read_tokenizer(folder: Path) -> None:
    from nemo_minitron.errors import MinitronError
    from nemo_minitron.hf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    try:
        tokenizer.backend_tokenizer.encode("Hello world, this is 2026.")
    except Exception as error:
        raise MinitronError("A tokenizer that fails on a text fails in the stage that uses it.") from error


def _bad_card(rng: random.Random, good: str, folder: Path) -> None:
    (folder / "README.md").write_bytes(damaged_bytes(rng, good.encode()))


def _good_card(folder: Path) -> str:
    (folder / "README.md").write_text(_CARD)
    return _CARD


_CARD = "---\nlicense: apache-2.0\ntags: &a [x, y]\nmore: {a: *a, b: [*a, *a]}\ndate: 2024-01-01\n---\n# Card\n"


def _read_card(folder: Path) -> None:
    from nemo_minitron.hf.license import read_license

    read_license(folder)


# --- recipes --------------------------------------------------------------------------------------


def _good_recipe(folder: Path) -> list[Any]:
    texts = [(REPO / "recipes" / f"toy/{name}.yaml").read_text() for name in ("width", "aligned", "search")]
    (folder / "mine.yaml").write_text(texts[0])
    return texts


def _bad_recipe(rng: random.Random, good: list[str], folder: Path) -> None:
    text = rng.choice(good)
    # JSON is YAML.
    data = damaged_bytes(rng, text.encode()) if rng.random() < 0.5 else as_json(rng, yaml.safe_load(text))
    (folder / "mine.yaml").write_bytes(data)


def _read_recipe(folder: Path) -> None:
    from nemo_minitron.config.compose import compose
    from nemo_minitron.config.explain import validate

    file = folder / "mine.yaml"
    validate(compose(file), where=str(file))


def _read_yaml(folder: Path) -> None:
    from nemo_minitron.config.extends import load_mapping
    from nemo_minitron.system.bounded import bounded

    with bounded("mine.yaml"):
        load_mapping(folder / "mine.yaml", "recipe")


# --- rows and texts -------------------------------------------------------------------------------

_TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
_ROWS: list[dict[str, Any]] = [
    {"messages": _TURNS, "system": "Be kind."},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    {"prompt": "Hi", "chosen": "Ho", "rejected": "Hu", "chosen_reward": 1.5, "rejected_reward": 0},
    {"prompt": _TURNS[:1], "chosen": _TURNS, "rejected": _TURNS},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant: Hu"},
    {"question": "1+1?", "answer": "It is 2.\n#### 2"},
    {"prompt": "Hi", "response": "Ho", "helpfulness": 4, "correctness": 3, "coherence": 4},
    {"instruction": "Say", "input": "it", "output": "it", "history": [["a", "b"]]},
    {"messages": json.dumps(_TURNS)},
]
for _row in _ROWS:
    _row["text"] = "One."


def _good_rows(folder: Path) -> list[Any]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
    return _ROWS


def _bad_rows(rng: random.Random, good: list[Any], folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes(b"".join(as_json(rng, rng.choice(good)) + b"\n" for _ in range(3)))


def _require_short(reason: Exception) -> None:
    if len(str(reason)) > 2000:
        raise AssertionError(f"a long reason: {str(reason)[:300]}")


def _read_chats(folder: Path) -> None:
    from nemo_minitron.data.chat.fields import Fields
    from nemo_minitron.data.chat.files import read_rows
    from nemo_minitron.data.chat.formats import FORMATS
    from nemo_minitron.data.chat.rows import BadRow

    for row in read_rows(folder / "rows.jsonl"):
        for form in FORMATS.values():
            if isinstance(row.content, BadRow):
                continue
            try:
                form.read(Fields(row.content), {})
            except BadRow as reason:
                _require_short(reason)


def _read_texts(folder: Path, name: str, **options: Any) -> None:
    from nemo_minitron.data.readers import read_documents

    for _ in read_documents(folder / name, DataSource(source=name, **options)):
        pass


def _packed(suffix: str, folder: Path) -> bytes:
    import bz2
    import gzip
    import lzma

    import zstandard

    pack: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }
    data = pack[suffix]("".join(json.dumps({"text": f"Text {i} of many."}) + "\n" for i in range(300)).encode())
    (folder / f"rows.jsonl{suffix}").write_bytes(data)
    return data


def _bad_packed(suffix: str, rng: random.Random, good: bytes, folder: Path) -> None:
    extent = rng.choice([16, 64, len(good)])
    (folder / f"rows.jsonl{suffix}").write_bytes(damaged_bytes(rng, good, extent))


def _good_parquet(folder: Path) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": [f"Text {i}" for i in range(50)], "more": [[i, i] for i in range(50)]})
    pq.write_table(table, folder / "rows.parquet", compression="zstd")
    return (folder / "rows.parquet").read_bytes()


def _bad_parquet(rng: random.Random, good: bytes, folder: Path) -> None:
    # The footer has most of the facts that a reader trusts.
    tail = min(len(good), rng.choice([200, 800, len(good)]))
    (folder / "rows.parquet").write_bytes(good[: len(good) - tail] + damaged_bytes(rng, good[len(good) - tail :]))


# --- templates ------------------------------------------------------------------------------------


def _good_template(folder: Path) -> Any:
    from nemo_minitron.data.chat.templates import TEMPLATES

    for name in BUILDING:
        shutil.copy(TOY_MODEL / name, folder)
    texts = [TEMPLATES[name].jinja for name in ("chatml", "llama3")]
    (folder / "chat_template.jinja").write_text(texts[0])
    return texts


_ODD_JINJA = (
    "{% for a in range(99999) %}{% for b in range(9) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 1000 }}",
    "{{ 2 ** 9 }}",
    "{{ '%0999999d' % 1 }}",
    "{{ 'x'.center(99999999) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages[9].x.y }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__ }}",
    "{{ 1 / 0 }}",
    "{{ [] | first }}",
    "{%",
    "}}",
)


def _bad_template(rng: random.Random, good: Any, folder: Path) -> None:
    text = rng.choice(good)
    at = rng.randrange(len(text))
    data = (text[:at] + rng.choice(_ODD_JINJA) + text[at:]).encode()
    (folder / "chat_template.jinja").write_bytes(damaged_bytes(rng, data) if rng.random() < 0.7 else data)


_BOUND: dict[Path, Any] = {}


def _read_template(folder: Path) -> None:
    from nemo_minitron.data.chat.rows import BadRow
    from nemo_minitron.data.chat.tokenizing import ChatTemplate
    from nemo_minitron.hf.tokenizer import load_tokenizer

    if folder not in _BOUND:
        _BOUND[folder] = load_tokenizer(folder)
    tokenizer = _BOUND[folder]
    tokenizer.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    template = ChatTemplate.bind(tokenizer, "model", whole_markers=False, where=str(folder))
    try:
        prompt = template.prompt(_TURNS[:1])
        template.require_boundary(prompt, template.answer(prompt, _TURNS))
    except BadRow as reason:
        _require_short(reason)


def _texts(suffix: str, count: int) -> Reader:
    return Reader(
        partial(_packed, suffix), partial(_bad_packed, suffix), partial(_read_texts, name=f"rows.jsonl{suffix}"), count
    )


READERS: dict[str, Reader] = {
    "config": Reader(_good_config, _bad_config, _read_config, 5000),
    "safetensors": Reader(_good_safetensors, _bad_safetensors, _read_safetensors, 3000),
    "index": Reader(_good_index, _bad_index, _read_safetensors, 2000),
    "gguf": Reader(_good_gguf, _bad_gguf, _read_gguf, 1500),
    "tokenizer": Reader(_good_tokenizer, _bad_tokenizer, _read_tokenizer, 1000),
    "card": Reader(_good_card, _bad_card, _read_card, 1000),
    "recipe": Reader(_good_recipe, _bad_recipe, _read_recipe, 300),
    "yaml": Reader(_good_recipe, _bad_recipe, _read_yaml, 1000),
    "chats": Reader(_good_rows, _bad_rows, _read_chats, 2500),
    "jsonl": Reader(_good_rows, _bad_rows, partial(_read_texts, name="rows.jsonl", text_field="text"), 2000),
    "parquet": Reader(_good_parquet, _bad_parquet, partial(_read_texts, name="rows.parquet"), 1500),
    "zst": _texts(".zst", 1000),
    "gz": _texts(".gz", 500),
    "bz2": _texts(".bz2", 500),
    "xz": _texts(".xz", 500),
    "template": Reader(_good_template, _bad_template, _read_template, 400),
    "nemo": Reader(archives.good_nemo, archives.bad_nemo, archives.read_nemo, 2000),
    "checkpoint": Reader(archives.good_checkpoint, archives.bad_checkpoint, archives.read_checkpoint, 1500),
    "bundle": Reader(archives.good_bundle, archives.bad_bundle, archives.read_bundle, 500),
}
"""Name -> reader; together more than 20,000 inputs."""
