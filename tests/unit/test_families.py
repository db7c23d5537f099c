"""Conversion of config.json to a shape and back, and the axis table compared with transformers' models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import (
    explicit_config,
    num_params,
    parameters,
    read_shape,
    rows,
    tensor_shape,
    write_config,
)
from tests.support.tiny_models import FAMILY_CASES, load_transformers, tiny_config, tiny_model, tiny_model_dir

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
NEMOTRON: dict[str, Any] = {
    **LLAMA,
    "architectures": ["NemotronForCausalLM"],
    "vocab_size": 256000,
    "head_dim": 128,
}
SIZE_KEYS = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}


@pytest.fixture(params=FAMILY_CASES)
def model_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_model_dir(tmp_path, request.param)


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def test_parameter_count_is_that_of_transformers(model_dir: Path) -> None:
    model = load_transformers(model_dir)
    assert num_params(read_shape(_config(model_dir))) == sum(p.numel() for p in model.parameters())


def test_every_tensor_of_the_file_matches_exactly_one_row_with_its_shape(model_dir: Path) -> None:
    shape = read_shape(_config(model_dir))
    listed = [(parameter.hf, tensor_shape(shape, parameter.row)) for parameter in parameters(shape)]
    with safe_open(model_dir / "model.safetensors", framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert len(listed) == len(dict(listed)), "a tensor is matched by two rows"
    assert dict(listed) == found


def test_non_embedding_count_leaves_out_exactly_the_tensors_over_the_vocabulary(model_dir: Path) -> None:
    shape = read_shape(_config(model_dir))
    tables = 1 if shape.tied_embeddings else 2
    assert num_params(shape) - num_params(shape, embeddings=False) == tables * shape.vocab_size * shape.hidden_size


def test_a_width_pruned_shape_written_to_config_has_the_counted_parameters_in_transformers(model_dir: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _config(model_dir)
    shape = read_shape(config)
    heads = max(shape.num_query_groups, shape.num_attention_heads // 2)
    target = shape.resized(num_layers=3, hidden_size=48, ffn_hidden_size=80, num_attention_heads=heads)
    written = write_config(config, target)
    (model_dir / "config.json").write_text(json.dumps(written))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    assert sum(p.numel() for p in model.parameters()) == num_params(target)
    assert written["head_dim"] == shape.kv_channels
    assert read_shape(written) == target


def test_a_config_without_optional_keys_reads_as_transformers_fills_them_in() -> None:
    for case in FAMILY_CASES:
        full = tiny_config(case)
        architecture = [type(tiny_model(case)).__name__]
        sizes = {key: getattr(full, key) for key in SIZE_KEYS}
        heads = {
            "num_attention_heads": 64,
            "hidden_size": 64 * 64,
        }  # 32 and 8 groups, Qwen's and Mistral's defaults, fit
        defaults = type(full)(**{**sizes, **heads})
        shape = read_shape({"architectures": architecture, **sizes, **heads})
        groups = getattr(defaults, "num_key_value_heads", None) or defaults.num_attention_heads
        assert shape.num_query_groups == groups, case
        assert shape.kv_channels == (getattr(defaults, "head_dim", None) or 64), case
        assert shape.norm_eps == (defaults.norm_eps if shape.family == "nemotron" else defaults.rms_norm_eps), case
        rope = {**vars(defaults), **(getattr(defaults, "rope_parameters", None) or {})}  # since 5.0 in rope_parameters
        assert shape.rope_theta == rope["rope_theta"], case
        assert shape.max_position_embeddings == defaults.max_position_embeddings, case
        assert shape.tied_embeddings is defaults.tie_word_embeddings, case
        assert shape.rotary_fraction == rope.get("partial_rotary_factor", 1.0), case
        window = defaults.sliding_window if shape.family == "mistral" else None
        assert shape.sliding_window_tokens == window, case


# Published sizes, each summed by hand: embeddings + layers * (attention + MLP + norms) + final norm (+ head).
PUBLISHED = {
    "llama 3.1 8B": (
        LLAMA,
        {},
        # 2 * 128256*4096 + 32 * (2*4096*4096 + 2*1024*4096 + 3*4096*14336 + 2*4096) + 4096
        1_050_673_152 + 32 * (33_554_432 + 8_388_608 + 176_160_768 + 8_192) + 4_096,
        8_030_261_248,
    ),
    "llama 3.1 minitron 4B width": (
        LLAMA,
        {"hidden_size": 3072, "ffn_hidden_size": 9216},
        # 2 * 128256*3072 + 32 * (2*4096*3072 + 2*1024*3072 + 3*3072*9216 + 2*3072) + 3072
        788_004_864 + 32 * (25_165_824 + 6_291_456 + 84_934_656 + 6_144) + 3_072,
        4_512_746_496,
    ),
    "llama 3.1 minitron 4B depth": (
        LLAMA,
        {"num_layers": 16},
        1_050_673_152 + 16 * (33_554_432 + 8_388_608 + 176_160_768 + 8_192) + 4_096,
        4_540_469_248,
    ),
    "mistral nemo minitron 8B": (
        {
            **LLAMA,
            "architectures": ["MistralForCausalLM"],
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "vocab_size": 131072,
            "head_dim": 128,
            "sliding_window": None,
        },
        {"hidden_size": 4096, "ffn_hidden_size": 11520},
        # 2 * 131072*4096 + 40 * (2*4096*4096 + 2*1024*4096 + 3*4096*11520 + 2*4096) + 4096
        1_073_741_824 + 40 * (33_554_432 + 8_388_608 + 141_557_760 + 8_192) + 4_096,
        8_414_105_600,
    ),
    "nemotron-4 15B": (
        {**NEMOTRON, "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 48},
        {},
        # 2 * 256000*6144 + 32 * (2*6144*6144 + 2*1024*6144 + 2*6144*24576 + 4*6144) + 2*6144; norms have biases
        3_145_728_000 + 32 * (75_497_472 + 12_582_912 + 301_989_888 + 24_576) + 12_288,
        15_628_775_424,
    ),
    "minitron 8B": (
        {**NEMOTRON, "intermediate_size": 16384, "num_attention_heads": 48},
        {},
        # 2 * 256000*4096 + 32 * (2*6144*4096 + 2*1024*4096 + 2*4096*16384 + 4*4096) + 2*4096
        2_097_152_000 + 32 * (50_331_648 + 8_388_608 + 134_217_728 + 16_384) + 8_192,
        8_271_699_968,
    ),
    "minitron 4B": (
        {**NEMOTRON, "intermediate_size": 24576, "hidden_size": 6144, "num_attention_heads": 48},
        {"hidden_size": 3072, "ffn_hidden_size": 9216, "num_attention_heads": 24},
        # 2 * 256000*3072 + 32 * (2*3072*3072 + 2*1024*3072 + 2*3072*9216 + 4*3072) + 2*3072
        1_572_864_000 + 32 * (18_874_368 + 6_291_456 + 56_623_104 + 12_288) + 6_144,
        4_190_509_056,
    ),
    "smollm2 135M": (
        {
            **LLAMA,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        {},
        # 49152*576 + 30 * (2*576*576 + 2*192*576 + 3*576*1536 + 2*576) + 576
        28_311_552 + 30 * (663_552 + 221_184 + 2_654_208 + 1_152) + 576,
        134_515_008,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name: str) -> None:
    config, target, by_hand, published = PUBLISHED[name]
    assert by_hand == published
    assert num_params(read_shape(config).resized(**target)) == published


def test_rows_of_one_model_have_unique_names() -> None:
    for config in (LLAMA, NEMOTRON, {**LLAMA, "architectures": ["Qwen3ForCausalLM"]}):
        names = [row.hf for row in rows(read_shape(config))]
        assert len(names) == len(set(names))


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPE_SPELLINGS: dict[str, dict[str, Any]] = {
    "transformers 4": {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
    "transformers 4, old key": {
        "rope_theta": 500000,
        "rope_scaling": {"type": "llama3", **{key: v for key, v in LLAMA3_ROPE.items() if key != "rope_type"}},
    },
    "transformers 5": {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
    "transformers 5, theta outside": {"rope_parameters": LLAMA3_ROPE, "rope_theta": 5e5},
    "both": {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
    "scaling null": {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}, "rope_scaling": None},
    "by type of layer": {"rope_parameters": {"full_attention": {**LLAMA3_ROPE, "rope_theta": 5e5}}},
    "a type that no layer has": {
        "layer_types": ["full_attention"] * 32,
        "rope_parameters": {
            "full_attention": {**LLAMA3_ROPE, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "the other constants left out": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 32, "rope_theta": 5e5, "original_max_position_embeddings": 8192
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("case", ROPE_SPELLINGS)
def test_every_spelling_of_rope_is_read_alike_and_written_for_transformers_4_and_5(case: str) -> None:
    config = {**LLAMA, "max_position_embeddings": 131072, **ROPE_SPELLINGS[case]}
    shape = read_shape(config)
    assert shape.rope_theta == 500000.0
    assert shape.rope_scaling is not None
    assert shape.rope_scaling.factor == 32.0
    written = explicit_config(config)
    assert (written["rope_theta"], written["rope_scaling"]) == (500000.0, LLAMA3_ROPE)
    assert written["rope_parameters"] == {**LLAMA3_ROPE, "rope_theta": 500000.0}
    assert read_shape(written) == shape
    assert explicit_config(written) == written


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_theta": 10000}, "rope_theta": 10000.0},
        {"rope_theta": None},
        {"partial_rotary_factor": 1.0},
    ],
)
def test_no_scaling_has_many_spellings(keys: dict[str, Any]) -> None:
    written = explicit_config({**LLAMA, **keys})
    assert written["rope_scaling"] is None
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert read_shape({**LLAMA, **keys}) == read_shape(LLAMA)


def test_the_rotary_part_of_a_head_may_be_in_rope_parameters() -> None:
    inside = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}
    written = explicit_config({**NEMOTRON, **inside})
    assert read_shape({**NEMOTRON, **inside}).rotary_fraction == 0.25
    assert written["partial_rotary_factor"] == written["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert read_shape(NEMOTRON).rotary_fraction == 0.5
    whole = explicit_config({**NEMOTRON, "partial_rotary_factor": 1.0})
    assert whole["partial_rotary_factor"] == 1.0


SAME_MODEL: dict[str, dict[str, Any]] = {
    "no architectures": {"architectures": None, "model_type": "llama"},
    "groups null": {"num_key_value_heads": None, "num_attention_heads": 8},
    "head size null": {"head_dim": None},
    "activation spelled otherwise": {"hidden_act": "swish"},
    "tied null": {"tie_word_embeddings": None},
    "nothing quantized": {"quantization_config": None},
    "several ends": {"eos_token_id": [128001, 128008, 128009]},
    "layer types longer than the model": {"layer_types": ["full_attention"] * 40},
}


@pytest.mark.parametrize("case", SAME_MODEL)
def test_keys_that_are_left_out_or_null_are_written_out(case: str) -> None:
    config = {**LLAMA, **SAME_MODEL[case]}
    written, shape = explicit_config(config), read_shape(config)
    assert (written["architectures"], written["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert written["num_key_value_heads"] == shape.num_query_groups == 8
    assert written["head_dim"] == shape.kv_channels
    assert written["hidden_act"] == "silu"
    assert written["tie_word_embeddings"] is False
    assert written.get("eos_token_id") == config.get("eos_token_id")
    assert "quantization_config" not in written
    assert len(written.get("layer_types") or ["full_attention"] * 32) == 32


def test_a_qwen_whose_layers_are_all_below_the_window_has_no_window() -> None:
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 4096}
    assert explicit_config({**qwen, "max_window_layers": 32})["use_sliding_window"] is False
    with pytest.raises(CheckpointError, match="max_window_layers = 28"):
        read_shape({**qwen, "max_window_layers": 28})
    explicit_config({**qwen, "max_window_layers": 28, "layer_types": ["full_attention"] * 32})


def test_sliding_window_counts_only_where_transformers_applies_it() -> None:
    assert read_shape({**LLAMA, "sliding_window": 4096}).sliding_window_tokens is None
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert read_shape({**mistral, "sliding_window": 512}).sliding_window_tokens == 512
    assert read_shape({**mistral, "sliding_window": None}).sliding_window_tokens is None
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 512}
    assert read_shape(qwen).sliding_window_tokens is None


REFUSED = {
    "unknown architecture": ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    "no architecture": ({"architectures": None}, "(none)"),
    "missing size": ({"hidden_size": None}, "hidden_size"),
    "size that is text": ({"hidden_size": "big"}, "'big'"),
    "size of zero": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "heads that do not fit the groups": ({"num_key_value_heads": 5}, "multiple"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    "llama3 rope of another length": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4096}},
        "original_max_position_embeddings",
    ),
    "llama3 rope without factor": ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "other activation": ({"hidden_act": "gelu"}, "gelu"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "quantized weights": ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
    "sliding layers": ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
    "qwen sliding window": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 4096},
        "use_sliding_window",
    ),
    "two architectures": ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "LlamaForCausalLM, Mistral"),
    "architectures as text": ({"architectures": "GPT2LMHeadModel"}, "GPT2LMHeadModel"),
    "unknown model type": ({"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2'"),
    "another model type": ({"model_type": "mistral"}, "model_type is 'mistral'"),
    "multimodal": ({"architectures": ["LlavaForConditionalGeneration"], "text_config": {"a": 1}}, "inside text_config"),
    "rope_scaling a word": ({"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
    "rope_scaling a list": ({"rope_scaling": [1]}, "rope_scaling = [1]"),
    "rope_parameters a word": ({"rope_parameters": "default"}, "rope_parameters = 'default'"),
    "linear": ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "'linear'"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "'longrope'"),
    "two rope types": ({"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}}, "two types"),
    "factor without type": ({"rope_scaling": {"factor": 4.0}}, "has a factor, 4.0, and no rope_type"),
    "two thetas": ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000.0 and 1000000.0"),
    "two scalings": (
        {"rope_parameters": LLAMA3_ROPE, "rope_scaling": {**LLAMA3_ROPE, "factor": 8.0}},
        "rope_parameters and rope_scaling disagree",
    ),
    "original length of the whole model": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}, "max_position_embeddings": 131072},
        "original_max_position_embeddings = 131072",
    ),
    "original length outside": (
        {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 4096},
        "original_max_position_embeddings = 4096",
    ),
    "rope by type of layer": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        "full_attention, sliding_attention",
    ),
    "rope by type and flat": ({"rope_parameters": {"full_attention": {}, "rope_theta": 1e4}}, "rope_theta"),
    "theta as text": ({"rope_theta": "10000"}, "rope_theta = '10000'"),
    "theta negative": ({"rope_theta": -1}, "rope_theta = -1"),
    "theta true": ({"rope_theta": True}, "rope_theta = True"),
    "theta beyond all numbers": ({"rope_theta": 10**400}, "rope_theta = 1000"),
    "eps not a number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
    "size as a fraction": ({"hidden_size": 4096.0}, "hidden_size = 4096.0"),
    "size true": ({"vocab_size": True}, "vocab_size = True"),
    "groups zero": ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
    "head size zero": ({"head_dim": 0}, "head_dim = 0"),
    "more layers than any model has": ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
    "tied as text": ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false'"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "window as text": ({"architectures": ["MistralForCausalLM"], "sliding_window": "4k"}, "sliding_window = '4k'"),
    "layer types as text": ({"layer_types": "full_attention"}, "is not a list"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "quantized (quantization_config: fp8)"),
    "compressed tensors": ({"compression_config": {"format": "pack"}}, "quantized"),
    "end as text": ({"eos_token_id": "</s>"}, "eos_token_id = '</s>'"),
    "partial rotary inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_with_its_name(case: str) -> None:
    keys, word = REFUSED[case]
    with pytest.raises(CheckpointError, match="where: somewhere") as caught:
        read_shape({**LLAMA, **keys}, where="somewhere")
    assert word in caught.value.what
