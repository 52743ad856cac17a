"""Writes what the first steps need, without a network: pairs.jsonl, and two
tiny models, policy/ and teacher/.

The task: a prompt names an animal, an answer holds the digit that belongs to
the animal, both among filler words. Only the digit can be right or wrong. The
teacher has seen right digits only; the policy is the same model after texts
in which most digits were wrong.
"""

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

random.seed(0)
torch.manual_seed(0)
animals = "owl fox elk hen cat dog".split()
fillers = "well so hm er oh now".split()
digits = list("0123456789")
digit_of = dict(zip(animals, digits, strict=False))

words = ["<pad>", "<s>", "</s>", ":", *animals, *fillers, *digits]
vocabulary = {word: number for number, word in enumerate(words)}
backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<pad>",
)


def prompt(animal):
    return " ".join([*random.choices(fillers, k=3), animal, ": "])


def answer(digit):
    before, after = random.choices(fillers, k=2), random.choice(fillers)
    return " ".join([*before, digit, after])


def wrong_digit(animal):
    right = digit_of[animal]
    return random.choice([digit for digit in digits if digit != right])


def train(share_wrong, steps):
    """Trains the model below on texts of which a share has a wrong digit."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        texts = []
        for animal in random.choices(animals, k=32):
            wrong = random.random() < share_wrong
            digit = wrong_digit(animal) if wrong else digit_of[animal]
            texts.append(prompt(animal) + answer(digit) + " </s>")
        # all texts have the same length
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def save(folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


with open("pairs.jsonl", "w", encoding="utf-8") as file:
    for animal in random.choices(animals, k=400):
        row = {
            "prompt": prompt(animal),
            "chosen": answer(digit_of[animal]),
            "rejected": answer(wrong_digit(animal)),
        }
        file.write(json.dumps(row) + "\n")

size = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
config = LlamaConfig(vocab_size=len(words), **size, **special)
model = LlamaForCausalLM(config)
train(share_wrong=0.0, steps=200)
save("teacher")
train(share_wrong=0.7, steps=60)
save("policy")
