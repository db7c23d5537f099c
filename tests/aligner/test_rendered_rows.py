"""SFT and offline distillation train on the tokens that generation and evaluation use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.backends.alignment.nemo_aligner.config import base_config
from nemo_minitron.backends.alignment.nemo_aligner.environment import ENTRY, aligner_python
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from tests.conftest import REPO

SAVED_BY = REPO / "tests/data/saved_by/4.57.6"
JINJA = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ROWS = [
    {"input": "x o\n", "output": "he 12</s>"},  # a tokenizer of words would begin one after the line end
    {"input": "x: ", "output": "he</s>"},
    {"input": "x:", "output": " he</s>"},
]
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import cpu
cpu.enable()
from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer
from omegaconf import OmegaConf
from rendered_rows import rows_dataset

tokenizer = get_nmt_tokenizer(library="huggingface", model_name=sys.argv[2], use_fast=True)
dataset = rows_dataset(OmegaConf.create(json.loads(sys.argv[3])), tokenizer)
rows = [dataset[index] for index in range(len(dataset))]
batch = dataset.collate_fn(rows)
found = [{"ids": row["input_ids"], "prompt": row["answer_start_idx"]} for row in rows]
print(json.dumps({"rows": found, "loss_mask": batch["loss_mask"].tolist()}))
"""


def read_by_nemo(tokenizer: Path, rows: Path, max_tokens: int = 64) -> dict[str, Any]:
    """Return token ids, numbers of prompt tokens and loss mask of the rows, with the keys of the stage sft."""
    keys = base_config("sft")["model"]["data"]["train_ds"]
    data = {**keys, "file_path": str(rows), "max_seq_length": max_tokens, "global_batch_size": 1, "micro_batch_size": 1}
    command = [str(aligner_python()), "-c", SCRIPT, str(ENTRY), str(tokenizer), json.dumps(data)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("saved", ["llama", "qwen2"])
def test_prompt_and_answer_have_the_tokens_of_evaluation(saved: str, tmp_path: Path) -> None:
    shutil.copytree(SAVED_BY / saved, tmp_path / "tokenizer")
    (tmp_path / "tokenizer/chat_template.jinja").write_text(JINJA)
    template = ChatTemplate.load(tmp_path / "tokenizer", "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = read_by_nemo(tmp_path / "tokenizer", rows)
    for row, of_nemo, mask in zip(ROWS, found["rows"], found["loss_mask"], strict=True):
        together, prompt = template.ids(row["input"] + row["output"]), len(template.ids(row["input"]))
        assert of_nemo == {"ids": together, "prompt": prompt}, row
        assert [place for place, counts in enumerate(mask) if counts] == list(range(prompt - 1, len(together) - 1))
