"""Dataset of rows that are rendered with a chat template: a prompt, and the answer that follows it in the same text."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset
from nemo_aligner.data.nlp import builders
from omegaconf import DictConfig


class RenderedRows(GPTSFTDataset):  # type: ignore[misc]
    """GPTSFTDataset that tokenizes prompt and answer as one text, as generation, evaluation and DPO do.

    NeMo's class strips spaces from both and tokenizes them separately. Where the first token of an answer depends on
    what precedes it, it would train on other tokens than the model sees and generates.
    """

    def _process_example(self, example: dict[str, Any]) -> dict[str, Any]:
        before, _, _ = self.prompt_template.rpartition(f"{{{self.label_key}}}")
        prompt = before.format(**example)
        together = self.tokenizer.text_to_ids(prompt + example[self.label_key])
        size = len(self.tokenizer.text_to_ids(prompt))
        context, answer = self._multiple_truncation(
            [together[:size], together[size:]], [self.prompt_template_keys[0], self.label_key]
        )
        context = [self.tokenizer.bos_id] * self.add_bos + context + [self.sep_id] * self.add_sep
        ids = context + answer + [self.tokenizer.eos_id] * self.add_eos
        return {
            "input_ids": ids,
            "answer_start_idx": len(context),
            "context_ids": context,
            "context_length": len(context),
            "answer_ids": answer,
            "metadata": {key: value for key, value in example.items() if key not in self.prompt_template_keys},
            "token_count": len(ids),
        }


def rows_dataset(data: DictConfig, tokenizer: Any, *, is_chat: bool = False, model_config: Any = None) -> Any:
    """Return NeMo-Aligner's dataset of a file of rows; rows with `input` and `output` are `RenderedRows`."""
    with patch.object(builders, "GPTSFTDataset", RenderedRows):
        return builders.build_sft_dataset(
            data, tokenizer, None, answer_only_loss=True, is_chat=is_chat, model_cfg=model_config
        )
