"""Train the toy model that ships with the package: `python benchmarks/make_toy_teacher.py BOOK.txt OUT_DIR`.

The shipped one was made from Arthur Conan Doyle, The Hound of the Baskervilles (1902, public domain).
The documents that the toy recipes hold out are not trained on. It takes about three minutes on one core
and always makes the same model on the same machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_minitron.data.tokenization import is_heldout

STEPS, BATCH, SEQ_LEN, LR = 1500, 16, 128, 3e-3
PARAGRAPHS_PER_DOCUMENT = 2
SPLIT_SEED, VALID_FRACTION = 1234, 0.05
"""As in configs/data/toy_text.yaml; a test compares them."""
EOD = "<|endoftext|>"


def documents_of(book: str) -> list[str]:
    """Groups of neighbouring paragraphs."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in book.split("\n\n") if paragraph.strip()]
    groups = range(0, len(paragraphs), PARAGRAPHS_PER_DOCUMENT)
    return ["\n\n".join(paragraphs[i : i + PARAGRAPHS_PER_DOCUMENT]) for i in groups]


def training_documents(documents: list[str]) -> list[str]:
    """Those that the toy recipes do not hold out."""
    return [text for i, text in enumerate(documents) if not is_heldout(SPLIT_SEED, 0, i, VALID_FRACTION)]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[EOD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD, bos_token=EOD, pad_token=EOD)


def train_model(ids: torch.Tensor) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS, pct_start=0.05)
    for step in range(STEPS):
        starts = torch.randint(0, len(ids) - SEQ_LEN, (BATCH,))
        batch = torch.stack([ids[start : start + SEQ_LEN] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 0 or step == STEPS - 1:
            print(f"step {step} loss {loss.item():.3f}", file=sys.stderr)
    return model


def main(book: Path, out: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    documents = documents_of(book.read_text(encoding="utf-8"))
    seen = training_documents(documents)
    tokenizer = train_tokenizer(seen)
    ids = torch.tensor([token for text in seen for token in [*tokenizer(text).input_ids, 0]])
    print(f"{len(documents)} documents, {len(seen)} to train on, {len(ids)} tokens", file=sys.stderr)
    model = train_model(ids)
    model.bfloat16().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    (out / "text.jsonl.zst").write_bytes(zstandard.ZstdCompressor(level=19).compress(rows.encode()))
    for file in out.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
