"""Writes what the first steps need, without a network: pairs.jsonl, and two tiny models, policy/ and teacher/.

The task: a prompt names an animal, an answer holds the digit that belongs to the animal, both among filler words. Only
the digit can be right or wrong. The teacher has seen right digits only; the policy is the same model after texts
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
backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def prompt(animal):
    return " ".join([*random.choices(fillers, k=3), animal, ": "])


def answer(digit):
    return " ".join([*random.choices(fillers, k=2), digit, random.choice(fillers)])


def wrong_digit(animal):
    return random.choice([digit for digit in digits if digit != digit_of[animal]])


def train(share_wrong, steps):
    """Trains the model below on texts of which a share has a wrong digit."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        texts = []
        for animal in random.choices(animals, k=32):
            digit = wrong_digit(animal) if random.random() < share_wrong else digit_of[animal]
            texts.append(prompt(animal) + answer(digit) + " </s>")
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]  # all texts have the same length
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def save(folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


with open("pairs.jsonl", "w", encoding="utf-8") as file:
    for animal in random.choices(animals, k=400):
        row = {"prompt": prompt(animal), "chosen": answer(digit_of[animal]), "rejected": answer(wrong_digit(animal))}
        file.write(json.dumps(row) + "\n")

size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=32, **size, **special))
train(share_wrong=0.0, steps=200)
save("teacher")
train(share_wrong=0.7, steps=60)
save("policy")
