"""Keys of the stages that bring models and text into a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.config.schema.base import Inputless, Schema, Seed, StageName


class ImportStage(Schema):
    """Bring a Hugging Face model (folder, hub name or GGUF file) into the run."""

    kind: Literal["import"]
    inputs: Inputless = Inputless()
    source: str
    """`asset:NAME`, `hf:ORG/NAME`, a folder with config.json, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    license: str | None = None
    """SPDX id carried into the exported model card; read from the source when None."""
    architecture: dict[str, Any] | None = None
    """Expected keys of config.json. Lets `plan` count parameters before the download, and is checked at import."""


class AdoptStage(Schema):
    """Use an existing Hugging Face folder as the output of this stage; it is not copied."""

    kind: Literal["adopt"]
    inputs: Inputless = Inputless()
    path: str
    sha256: str | None = None
    """Of model.safetensors, checked when given; of a model in shards, what
    `sha256sum model.safetensors.index.json *.safetensors | sha256sum` prints in its folder."""


class DataSource(Schema):
    """One file, glob or folder of documents."""

    source: str
    """`asset:NAME`, or a path or glob of .txt, .jsonl, .json, .parquet, each also as .gz, .zst, .bz2 or .xz."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Share of training samples drawn from this source, relative to the other sources."""
    text_field: str = "text"
    """Column of jsonl, json and parquet rows; `a.b`: field b inside a."""
    document_separator: Annotated[str, Field(min_length=1)] | None = None
    """Splits .txt files into documents; line ends are read as \\n. None: one document a file."""
    max_documents: PositiveInt | None = None


class TokenizeInputs(Schema):
    tokenizer: StageName = "teacher"


class TokenizeStage(Schema):
    """Text -> Megatron indexed datasets, split into train and validation by document."""

    kind: Literal["tokenize"]
    inputs: TokenizeInputs = TokenizeInputs()
    sources: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    valid_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Share of the documents of each source that is held out."""
    seed: Seed = 1234
