"""Tokenizers of every kind, made on the spot, and the chat templates that people use."""

from __future__ import annotations

from functools import cache
from typing import Any

WORDS = "the egg boils for five minutes in a pot, and then the cook asks: why so long? Because it is hard. yes no maybe"

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "headers": (
        "{{ bos_token }}"
        "{% for m in messages %}{{ '[' + m['role'] + ']\n\n' + m['content'] | trim + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
    ),
    "marked": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Like Qwen3's: reasoning stays in what follows the last question, tools and calls are written as JSON.
    "reasoning": (
        "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
        "{% set last = namespace(at=0) %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{% set last.at = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% set content = m['content'] %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1] if '</think>' in content else '' %}"
        "{% set content = content.split('</think>')[-1].lstrip() %}"
        "{% if loop.index0 > last.at and (loop.last or thought) %}"
        "{{ '<think>\n' + thought.strip() + '\n</think>\n\n' }}{% endif %}{{ content }}"
        "{% for call in m['tool_calls'] or [] %}"
        "{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}{% endfor %}"
        "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "reasoning dropped": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1] | trim }}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
KINDS = ("byte-level BPE", "byte-level BPE, prefix space", "WordPiece", "Unigram, byte fallback", "WordLevel")
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]


@cache
def small_tokenizer(kind: str, *, adds_bos: bool = False, adds_eos: bool = False, template: str = "chatml") -> Any:
    """A fast tokenizer of a kind, that puts BOS and EOS around every text by itself, or not."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = _backend(kind)
    single = ("<s> " if adds_bos else "") + "$A" + (" </s>" if adds_eos else "")
    backend.post_processor = TemplateProcessing(
        single=single, special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def _backend(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    letters = "abcdefghijklmnopqrstuvwxyzBY0123456789.,:?!'\"<>/|_[]{} \n"
    corpus = [WORDS, letters] * 4
    if kind.startswith("byte-level"):
        backend = Tokenizer(models.BPE())
        backend.decoder = decoders.ByteLevel()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="prefix" in kind)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=400, special_tokens=_SPECIAL, initial_alphabet=alphabet)
    elif kind == "WordPiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=_SPECIAL)
    elif kind == "WordLevel":
        backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=_SPECIAL)
    else:
        pieces = [(token, 0.0) for token in _SPECIAL] + [(f"<0x{byte:02X}>", -12.0) for byte in range(256)]
        words = {"▁" + word for word in WORDS.split()} | set("▁abcdefghijklmnopqrstuvwxyz")
        pieces += [(word, -6.0 - 0.1 * len(word)) for word in sorted(words)]
        backend = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        return backend
    backend.train_from_iterator(corpus, trainer)
    return backend
