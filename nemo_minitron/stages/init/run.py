"""Create a model with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import ConfigError
from nemo_minitron.stages.artifacts import Model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.init.params import SAME_VOCABULARY, InitStage, NewTokenizer, vocabulary_problem
from nemo_minitron.stages.kind import Result

if TYPE_CHECKING:
    import torch

    from nemo_minitron.families import ModelShape, Parameter

END_OF_TEXT = "<|endoftext|>"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_WRITES_TO_RESIDUAL = ("o_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    like: Model | None = None


def init(params: InitStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Write a Hugging Face folder with the sizes and tokenizer of another model, or those of the recipe.

    Raises:
        ConfigError: the tokenizer and the architecture have vocabularies of different sizes.
        CheckpointError: the architecture is not supported.
    """
    from nemo_minitron.families import explicit_config
    from nemo_minitron.hf.checkpoint import CONFIG_FILE, copy_side_files, model_facts, read_config

    like = inputs.like
    if like is not None:
        config, where = read_config(like.path), str(like.path / CONFIG_FILE)
        copy_side_files(like.path, ctx.out_dir)
    else:
        assert params.architecture is not None
        assert params.tokenizer is not None
        config, where = _with_ends(params.architecture), f"stages.{ctx.name}.architecture"
        _require_vocabulary(params, ctx.name)
        train_tokenizer(params.tokenizer, ctx)
    _write_weights(params, explicit_config(config, where=where), ctx.out_dir)
    license_id = params.license or (like.license if like is not None else None)
    return {**model_facts(ctx.out_dir), "license": license_id}


def _with_ends(architecture: dict[str, Any]) -> dict[str, Any]:
    """Set all ids of special tokens to that of the end-of-text token, which is the first one of the new tokenizer.

    Ids in `architecture` come from a config.json that belongs to another tokenizer.
    """
    given = [key for key in TOKEN_IDS if key in architecture]
    return {"bos_token_id": 0, "eos_token_id": 0, **architecture, **dict.fromkeys(given, 0)}


def _require_vocabulary(params: InitStage, stage: str) -> None:
    problem = vocabulary_problem(params)
    if problem is not None:
        raise ConfigError(problem, where=f"stages.{stage}", next_step=SAME_VOCABULARY)


def train_tokenizer(params: NewTokenizer, ctx: StageContext) -> None:
    """Train a byte-level BPE tokenizer and save it in the format of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from nemo_minitron.hf.tokenizer_writer import write_tokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=params.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(params, ctx), trainer)
    write_tokenizer(ctx.out_dir, tokenizer, dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT))


def _texts(params: NewTokenizer, ctx: StageContext) -> Iterator[str]:
    from nemo_minitron.data.readers import read_documents, require_separator_is_used
    from nemo_minitron.stages.common.source_files import files_of

    for number, source in enumerate(params.sources):
        count = 0
        files = files_of(source.source, ctx)
        require_separator_is_used(files, source, f"stages.{ctx.name}.tokenizer.sources.{number}")
        for file in files:
            for document in read_documents(file, source):
                yield document.text
                count += 1
                if count == source.max_documents:
                    break
            if count == source.max_documents:
                break


def _write_weights(params: InitStage, config: dict[str, Any], out_dir: Path) -> None:
    import torch

    from nemo_minitron.families import parameters, read_shape
    from nemo_minitron.hf.checkpoint import CheckpointWriter

    shape = read_shape(config)
    generator = torch.Generator().manual_seed(params.seed)
    writer = CheckpointWriter(out_dir, config, dtype=getattr(torch, params.dtype))
    for parameter in parameters(shape):
        writer.add(parameter.hf, random_tensor(parameter, shape, params.init_std, generator))
    writer.close()


def random_tensor(parameter: Parameter, shape: ModelShape, init_std: float, generator: torch.Generator) -> torch.Tensor:
    """Return a tensor for a parameter: matrices from a normal distribution, norms at one, biases at zero."""
    import torch

    from nemo_minitron.families import tensor_shape

    size = tensor_shape(shape, parameter.row)
    if len(size) == 1:
        at_one = parameter.hf.endswith("weight") and shape.norm != "layernorm1p"
        return torch.ones(size) if at_one else torch.zeros(size)
    std = init_std
    if parameter.hf.endswith(_WRITES_TO_RESIDUAL):
        std /= (2 * shape.num_layers) ** 0.5
    return torch.randn(size, generator=generator) * std
