"""Models and data of a stage must have one tokenizer: what may differ, and what is an error."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.errors import DataError
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.hf.tokenizer_identity import TokenizerIdentity, tokenizer_fingerprint
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.artifacts import Model, TokenizedText
from nemo_minitron.stages.common.one_tokenizer import require_one_tokenizer, require_tokenizer_of
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.stages.search.candidate import Inputs, candidate
from nemo_minitron.stages.search.params import CandidateStage
from nemo_minitron.system.progress import Progress
from tests.support.saved_by import edit, saved
from tests.support.tiny_data import add_document


def context(folder: Path, output: list[str]) -> StageContext:
    progress = Progress(silent=True)
    progress.warn = output.append  # type: ignore[method-assign]
    return StageContext("distill", "test", folder, folder, Execution(), progress)


def renamed(folder: Path, **names: str) -> Path:
    """Rename added tokens that are not in the vocabulary."""
    saved(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    start = max(content["model"]["vocab"].values()) + 1
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    content["added_tokens"] += [
        {"id": start + number, "content": names.get(name, f"<{name}>"), "special": True, **flags}
        for number, name in enumerate(("one", "two"))
    ]
    file.write_text(json.dumps(content))
    return folder


def inputs_of(tmp_path: Path, ids: list[int], **folders: Path) -> tuple[dict[str, Model], TokenizedText]:
    from nemo_minitron.backends.megatron.data.indexed import indexed_writers

    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    with indexed_writers(data / "train_00", vocab_size=512) as (writer,):
        add_document(writer, np.array(ids), 3)
    first = next(iter(folders.values()))
    result = {"tokenizer_sha256": tokenizer_fingerprint(first)}
    models = {role: Model(role, "import", folder, "", {}) for role, folder in folders.items()}
    return models, TokenizedText("data", "tokenize", data, "", result)


def test_different_added_tokens_are_an_error_if_the_data_use_them_and_otherwise_a_warning(tmp_path: Path) -> None:
    teacher, student = renamed(tmp_path / "teacher"), renamed(tmp_path / "student", two="<User>")
    number = load_tokenizer(teacher).convert_tokens_to_ids("<two>")
    output: list[str] = []
    require_one_tokenizer(
        *inputs_of(tmp_path, [5, number - 1, 0], teacher=teacher, student=student), context(tmp_path, output)
    )
    assert any(f"{number} (teacher <two>, student <User>)" in text for text in output)
    assert not any("<one>" in text for text in output)
    with pytest.raises(DataError, match=rf"contain them: {number} \(teacher <two>, student <User>\)"):
        require_one_tokenizer(
            *inputs_of(tmp_path, [5, number, 0], teacher=teacher, student=student), context(tmp_path, [])
        )


@pytest.mark.parametrize("name", ["<User>", "<\uff5cUser\uff5c>", '<"User\\">'])
def test_rendered_rows_count_as_use_without_other_data(tmp_path: Path, name: str) -> None:
    teacher, student = renamed(tmp_path / "teacher"), renamed(tmp_path / "student", two=name)
    models = {role: Model(role, "import", path, "", {}) for role, path in (("model", student), ("teacher", teacher))}
    rows = tmp_path / "rows.jsonl"
    for text, used in (("<one> says", False), (f"{name} says", True)):
        rows.write_text(json.dumps({"input": text}) + "\n")
        if used:
            with pytest.raises(DataError, match="contain them"):
                require_one_tokenizer(models, None, context(tmp_path, []), texts=(rows,))
        else:
            require_one_tokenizer(models, None, context(tmp_path, []), texts=(rows,))


def test_different_merges_are_an_error_and_another_notation_is_not(tmp_path: Path) -> None:
    teacher, student = saved(tmp_path / "teacher"), saved(tmp_path / "student")
    content = json.loads((student / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [" ".join(merge) for merge in merges]
    (student / "tokenizer.json").write_text(json.dumps(content))
    output: list[str] = []
    both = inputs_of(tmp_path, [5, 0], teacher=teacher, student=student)
    require_one_tokenizer(*both, context(tmp_path, output))
    assert output == []
    content["model"]["merges"] = merges[::-1]
    (student / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="teacher and student have different merges"):
        require_one_tokenizer(*both, context(tmp_path, []))
    shutil.copyfile(teacher / "tokenizer.json", student / "tokenizer.json")
    edit(student / "tokenizer.json", normalizer={"type": "NFC"})
    require_one_tokenizer(*both, context(tmp_path, output))
    assert any("normalize or split text differently" in text for text in output)


def test_manifests_of_older_versions_contain_only_the_vocabulary(tmp_path: Path) -> None:
    found = TokenizerIdentity.of(saved(tmp_path / "model"))
    old = TokenizerIdentity.parse(found.vocab)
    assert found.differences(old) == []
    assert TokenizerIdentity.parse(str(found)) == found
    assert TokenizerIdentity.parse("0" * 64).differences(found) == ["vocab"]


def test_a_measured_model_must_have_the_tokenizer_of_the_text(tmp_path: Path) -> None:
    model, other = saved(tmp_path / "model"), saved(tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    models, text = inputs_of(tmp_path, [5, 0], model=model, other=other)
    require_tokenizer_of(models["model"], text, context(tmp_path, []))
    with pytest.raises(DataError, match=r"The model and the data .* have different vocabularies") as caught:
        require_tokenizer_of(models["other"], text, context(tmp_path, []))
    assert "inputs.tokenizer" in str(caught.value)
    (other / "tokenizer.json").unlink()
    require_tokenizer_of(models["other"], text, context(tmp_path, []))


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("check_teacher", {"max_loss": 3.0}),
        ("evaluate", {"label": "x", "inputs": {"model": "teacher"}}),
        ("score", {}),
        ("score_reconstruction", {}),
    ],
)
def test_a_stage_that_measures_refuses_text_of_another_tokenizer(
    kind: str, keys: dict[str, object], tmp_path: Path
) -> None:
    models, text = inputs_of(tmp_path, [5, 0], model=saved(tmp_path / "model"))
    text = replace(text, result={"tokenizer_sha256": "0" * 64})
    function = STAGES[kind].load_function()
    role = next(role for role in STAGES[kind].inputs if role != "data")
    inputs = sys.modules[function.__module__].Inputs(**{role: models["model"], "data": text})
    with pytest.raises(DataError, match="different vocabularies"):
        function(STAGES[kind].params.model_validate({"kind": kind, **keys}), inputs, context(tmp_path, []))


@pytest.mark.parametrize("role", ["data", "heldout"])
def test_a_candidate_checks_all_its_texts_before_it_computes_anything(role: str, tmp_path: Path) -> None:
    models, text = inputs_of(tmp_path, [5, 0], model=saved(tmp_path / "model"))
    texts = {"data": text, "heldout": text, role: replace(text, result={"tokenizer_sha256": "0" * 64})}
    keys = {"kind": "candidate", "inputs": {"model": "m", "teacher": "m", "data": "d", "heldout": "h"}, "rung": 1}
    training = {"lr": 1e-3, "global_batch_size": 4, "seq_len_tokens": 16}
    params = CandidateStage.model_validate(
        {**keys, "num_steps": 1, "selection": {}, "retraining": training, "compensation": {}}
    )
    own = Inputs(model=models["model"], teacher=models["model"], **texts)
    # A context without a session: nothing has started.
    with pytest.raises(DataError, match="different vocabularies"):
        candidate(params, own, context(tmp_path / "run", []))
    assert not (tmp_path / "run").exists()
