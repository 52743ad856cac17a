"""Models of the miniature: made, trained on answers alone, saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_scheduler,
)

from selective_pref import per_token_logps
from selective_pref_adapters.batch import labels_of
from selective_pref_adapters.replication.miniature.language import EOS

SUPERVISED_BATCH = 64
SUPERVISED_RATE = 3e-3


def make_model(tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> LlamaForCausalLM:
    """A Llama of two layers with hidden size `size` and random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            intermediate_size=2 * size,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.1,  # at this width the usual 0.02 learns late
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def supervised_batch(tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """(prompt, answer) → input_ids and attention_mask [B T+1], completion_mask 1 on the answer and its EOS."""
    batch = tokenizer([prompt + answer + EOS for prompt, answer in texts], padding=True, return_tensors="pt")
    completion_mask = batch["attention_mask"].clone()
    for row, (prompt, _) in enumerate(texts):
        completion_mask[row, : len(tokenizer(prompt)["input_ids"])] = 0
    return {**batch, "completion_mask": completion_mask}


def train_supervised(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]], name: str
) -> None:
    """One pass over `texts` with AdamW: mean −log π of the answers' tokens, EOS included. Changes `model`."""
    steps = len(texts) // SUPERVISED_BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=SUPERVISED_RATE, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    model.train()
    for step in (bar := tqdm(range(steps), desc=f"supervised {name}", unit="step", leave=False)):
        batch = supervised_batch(tokenizer, texts[step * SUPERVISED_BATCH : (step + 1) * SUPERVISED_BATCH])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        logps, mask = per_token_logps(logits, labels_of(batch))
        loss = -logps.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()
