"""A tiny model made on the spot, with a tokenizer whose words are its tokens, and preference rows it can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = [f"w{number}" for number in range(24)]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def _experts_run() -> bool:
    try:
        torch._grouped_mm(torch.ones(16, 16), torch.ones(1, 16, 16), offs=torch.tensor([16], dtype=torch.int32))
    except NotImplementedError:
        return False
    except (AttributeError, RuntimeError):  # torch that lacks it has a replacement in transformers
        return True
    return True


needs_experts = pytest.mark.skipif(
    not _experts_run(), reason="this torch multiplies the matrices of a mixture of experts on GPUs alone"
)


def make_tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(folder: Path, seed: int, words: list[str] = WORDS, **options: Any) -> Path:
    """Saves a Llama of a few thousand parameters and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(["user", "assistant", *words])
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    LlamaForCausalLM(LlamaConfig(**{**settings, **options})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_mixture(folder: Path, seed: int, **options: Any) -> Path:
    """Saves a Mixtral of a few thousand parameters, four experts in a layer, and its tokenizer."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = make_tokenizer(["user", "assistant", *WORDS])
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    MixtralForCausalLM(MixtralConfig(**{**settings, **options})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_text_and_image_model(folder: Path, seed: int) -> Path:
    """Saves a Gemma 3 of a few thousand parameters: its configuration nests the text model's, as `text_config`."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = make_tokenizer(["user", "assistant", *WORDS])
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "sliding_window": 32,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_model_with_processor(folder: Path, seed: int) -> Path:
    """Saves a Llava of a few thousand parameters and its processor, whose images are read by pillow."""
    import torch
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = make_tokenizer(["<image>", "user", "assistant", *WORDS])
    tokenizer.add_tokens(["<image>"], special_tokens=True)  # a token without spaces around it, too
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.3}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes, **text, **ids),
        vision_config=CLIPVisionConfig(**{**sizes, "num_hidden_layers": 2}, image_size=28, patch_size=14),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    parts = (
        "{% for m in messages %}{{ m['role'] + ' ' }}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
        "<image> {% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    side = {"height": 28, "width": 28}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=parts,
    ).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def text_rows(count: int) -> list[dict[str, str]]:
    """Rows of unequal lengths; five prompts, each with several pairs."""
    import random

    pick = random.Random(0)

    def some(low: int, high: int) -> str:
        return " ".join(pick.choices(WORDS, k=pick.randint(low, high)))

    prompts = [some(2, 6) for _ in range(5)]
    return [{"prompt": prompts[i % 5] + " ", "chosen": some(1, 9), "rejected": some(1, 9)} for i in range(count)]


def weighted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with a weight; their mean is 1."""
    return [{**row, "weight": (0.0, 0.5, 1.0, 2.5)[number % 4]} for number, row in enumerate(rows)]
