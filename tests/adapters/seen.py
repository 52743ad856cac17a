"""What the tests of `seeing` show: a tokenizer whose tokens are bytes, and losses of texts with given scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from selective_pref import PreferenceLoss, Response, selective_dpo_loss

HOSTILE = "Hi <script>alert(1)</script> </style> ]]> &amp; \x00\x1b[31m\u202eabc\r\n\tend </textarea>\u2028"
SCRIPTS = "日本語 한국어 👩‍👩‍👧 🇩🇪 e\u0301 n\u0303 مرحبا שלום नमस्ते"
PROMPT = "say "


def byte_tokenizer() -> Any:
    """Every byte is a token, so that most characters outside ASCII are spread over several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def batch_of(tokenizer: Any, texts: Sequence[str], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids [2B T+1], mask [2B T]) of responses behind one prompt, chosen ones first."""
    prompt = len(tokenizer(PROMPT)["input_ids"])
    rows = [tokenizer(PROMPT + text + "</s>")["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids[number, start : start + len(row)] = torch.tensor(row)
        mask[number, start + prompt : start + len(row)] = True
    return ids, mask[:, 1:]


def loss_of(mask: torch.Tensor, *, seed: int = 0, ratio: float = 0.4, tied: bool = True) -> PreferenceLoss:
    """A loss with random log-probs; rounded ones, so that scores are tied, unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    logps = [-4 * torch.rand(mask.shape, generator=generator) for _ in range(2)]
    policy, reference = [(2 * some).round() / 2 for some in logps] if tied else logps
    sides = Response.from_stacked(per_token_logps=policy, mask=mask, ref_per_token_logps=reference)
    return selective_dpo_loss(*sides, beta=0.1, selection_ratio=ratio)
