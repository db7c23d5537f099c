"""Keys of `architecture` that an import does not name: the plan counts them with their defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import explicit_config
from nemo_minitron.hf.checkpoint import read_config
from nemo_minitron.stages.import_model.kind import IMPORT
from nemo_minitron.stages.import_model.params import ImportStage
from nemo_minitron.stages.import_model.run import require_architecture
from tests.support.tiny_models import tiny_model_dir

KEYS = (
    "architectures",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "rope_theta",
)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Return a config.json as an import publishes it."""
    found = explicit_config(read_config(tiny_model_dir(tmp_path, "llama_gqa_tied")))
    (tmp_path / "config.json").write_text(json.dumps(found))
    return found


def test_keys_that_an_architecture_leaves_out_must_have_their_default_in_the_model(config: dict[str, Any]) -> None:
    """Only max_position_embeddings may differ, because no tensor depends on it."""
    whole = {key: config[key] for key in KEYS}
    require_architecture(config, whole, "config.json")
    expected = {key: value for key, value in whole.items() if key not in ("num_key_value_heads", "rope_theta")}
    with pytest.raises(CheckpointError, match="leaves out keys") as caught:
        require_architecture(config, expected, "config.json")
    assert "num_query_groups = 4 (assumed: 8)" in caught.value.what
    assert "rope_theta = 100000.0 (assumed: 10000.0)" in caught.value.what
    assert "max_position_embeddings" not in caught.value.what


def test_the_shape_is_read_from_the_finished_import_while_it_has_the_values_of_the_recipe(
    config: dict[str, Any], tmp_path: Path
) -> None:
    view = MagicMock()
    view.published.return_value = tmp_path / "config.json"
    expected = {key: config[key] for key in KEYS if key != "num_key_value_heads"}
    for change, groups in (({}, 4), ({"num_hidden_layers": 2}, 8), ({"head_dim": 16}, 8)):
        stage = ImportStage(kind="import", source="x", architecture={**expected, **change})
        shape = IMPORT.shape("teacher", stage, view)
        assert shape is not None
        assert shape.num_query_groups == groups
