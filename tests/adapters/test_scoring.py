"""Filling the store with a local model: each row once, the same bits as a reference beside the policy, and faults."""

from __future__ import annotations

import copy
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ranks import run_cli, run_ranks, run_script, start
from selective_pref import NonFiniteError
from selective_pref_adapters.batch import REF_LOGPS, SCORING_REF_LOGPS, from_bits, to_bits
from selective_pref_adapters.cli import main
from selective_pref_adapters.heads import frozen_per_token_logps, install_fused_head, model_per_token_logps
from selective_pref_adapters.objectives import loss_of_batch, make_objective
from selective_pref_adapters.pairs import PreferenceRow, TokenizedPair, collate, tokenize_pairs
from selective_pref_adapters.reference_store import (
    MissingRowsError,
    ReferenceStore,
    StoreError,
    compare_rows,
    fill_store,
    identity,
    local,
    reference_space,
    rows_of_pairs,
)
from selective_pref_adapters.reference_store.local import local_logps
from selective_pref_adapters.reference_store.spaces import write_identity
from tiny import WORDS, make_model, make_tokenizer, text_rows, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(policy_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(policy_folder)


@pytest.fixture(scope="module")
def pairs(tokenizer: Any) -> list[TokenizedPair]:
    rows = [PreferenceRow(**row, place=f"pairs.jsonl:{n}") for n, row in enumerate(text_rows(24), start=1)]
    return tokenize_pairs(rows, tokenizer, max_length=64)[0]


@pytest.fixture
def teacher(reference_folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(reference_folder)


def count_forwards(model: nn.Module) -> list[int]:
    """A list that grows by the number of rows of every forward pass of the model's body from now on."""
    calls: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])),
        with_kwargs=True,
    )
    return calls


def unique_rows(pairs: list[TokenizedPair]) -> int:
    return len({row.key for row in rows_of_pairs(pairs)})


def distinct_numbers(store: ReferenceStore, pairs: list[TokenizedPair]) -> list[bytes | None]:
    return [None if v is None else v.tobytes() for v in store.values_of(rows_of_pairs(pairs))]


# --- once, and the same ----------------------------------------------------------------------------------------------


def test_a_sweep_reads_what_was_computed_once_and_equals_the_reference_online_bit_by_bit(
    tmp_path: Path, policy_folder: Path, tokenizer: Any, pairs: list[TokenizedPair], teacher: nn.Module
) -> None:
    """20 settings of β and ratio, two epochs each, other orders and batch sizes; then once more after "resuming"."""
    store = ReferenceStore.create(tmp_path, reference_space(teacher, tokenizer))
    report = fill_store(store, pairs, teacher, pad_token_id=0, progress=False)
    assert (report.rows, report.hits, report.computed) == (unique_rows(pairs), 0, unique_rows(pairs))
    prompts = {tuple(pair.chosen_ids[: pair.chosen_prompt_length]) for pair in pairs}
    assert report.forward_passes == len(prompts) < report.computed / 2
    assert report.tokens == sum(len(row.ids) for row in {row.key: row for row in rows_of_pairs(pairs)}.values())

    online, calls = copy.deepcopy(teacher).eval(), count_forwards(teacher)
    start = AutoModelForCausalLM.from_pretrained(policy_folder)
    install_fused_head(start)
    settings = [(beta, ratio) for beta in (0.01, 0.1, 1.0, 5.0) for ratio in (0.2, 0.4, 0.6, 0.8, 1.0)]

    def losses(setting: int, reference: Callable[[Any], torch.Tensor]) -> list[torch.Tensor]:
        beta, ratio = settings[setting]
        objective = make_objective("selective_dpo", beta=beta, selection_ratio=ratio)
        policy, order, size = copy.deepcopy(start), random.Random(setting), 2 + setting % 5
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        seen = []
        for _ in range(2):
            drawn = order.sample(pairs[: 8 + setting % 3], 8)
            for at in range(0, len(drawn), size):
                batch = collate(drawn[at : at + size], pad_token_id=setting % 2)
                out = loss_of_batch(objective, batch, model_per_token_logps(policy, batch), reference(batch))
                optimizer.zero_grad()
                out.loss.backward()
                optimizer.step()
                seen.append(out.losses.detach())
        return seen

    for setting in range(len(settings)):
        with ReferenceStore.open(tmp_path) as opened:  # as every run of a sweep does, and every resumed one
            opened.check(pairs)
            from_store = losses(setting, opened.lookup)
        if setting % 7 == 0:
            beside = losses(setting, lambda batch: frozen_per_token_logps(online, batch))
            for one, other in zip(from_store, beside, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert calls == []
    again = fill_store(ReferenceStore.open(tmp_path), pairs[::-1], teacher, pad_token_id=1, progress=False)
    assert (again.hits, again.computed, again.forward_passes, again.tokens) == (unique_rows(pairs), 0, 0, 0)
    assert calls == []
    more = fill_store(ReferenceStore.open(tmp_path), [*pairs, made_up_pair()], teacher, pad_token_id=0, progress=False)
    assert (more.hits, more.computed, more.forward_passes) == (unique_rows(pairs), 2, 1)
    assert calls == [1, 1]


def test_values_are_those_of_the_models_own_logits(
    tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], teacher: nn.Module
) -> None:
    store = ReferenceStore.create(tmp_path, reference_space(teacher, tokenizer))
    fill_store(store, pairs, teacher, pad_token_id=0, progress=False)
    dense = copy.deepcopy(teacher).double().eval()
    for row, values in zip(rows_of_pairs(pairs), store.values_of(rows_of_pairs(pairs)), strict=True):
        with torch.no_grad():
            logits = dense(input_ids=torch.from_numpy(row.ids).long()[None]).logits[0]
        expected = [logits[t - 1].log_softmax(-1)[row.ids[t]].item() for t in range(1, len(row.ids)) if row.mask[t]]
        assert values.tolist() == pytest.approx(expected, abs=1e-5)


def test_batches_by_length_give_the_same_numbers(
    pairs: list[TokenizedPair], teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: rows of like length side by side, no batch beyond its budget, every row once."""
    rows = list({row.key: row for row in rows_of_pairs(pairs)}.values())
    alone = {row.key: values for group in local_logps(rows, teacher, pad_token_id=0) for row, values in group}
    groups = list(local._groups(sorted(rows, key=lambda row: -len(row.ids)), 48))
    assert [row for group in groups for row in group] == sorted(rows, key=lambda row: -len(row.ids))
    assert max(len(group) * max(len(row.ids) for row in group) for group in groups) <= 48
    assert len(groups) < len(rows) / 2
    assert [len(group) for group in local._groups(rows[:3], 1)] == [1, 1, 1]
    for group in groups:
        batch = local._collate(group, 0, torch.device("cpu"))
        with torch.no_grad():
            together = model_per_token_logps(teacher, batch)
        for row, line in zip(group, together, strict=True):
            torch.testing.assert_close(line[: len(row.ids) - 1][row.mask[1:]], torch.from_numpy(alone[row.key]))


def test_the_callers_random_states_modes_and_autocast_do_not_matter_and_do_not_change(
    tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], reference_folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference_folder, attention_dropout=0.5)
    model.train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]

    def states() -> tuple[Any, ...]:
        numpy_state = np.random.get_state()
        return random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()

    store = ReferenceStore.create(tmp_path / "a", reference_space(model, tokenizer))
    before = states()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fill_store(store, pairs, model, pad_token_id=0, progress=False).hits == 0
    assert states() == before
    assert fill_store(store, pairs, model, pad_token_id=0, progress=False).computed == 0
    assert states() == before
    assert [module.training for module in model.modules()] == modes
    plain = ReferenceStore.create(tmp_path / "b", store.space)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    fill_store(plain, pairs, model.eval(), pad_token_id=5, progress=False)
    assert distinct_numbers(store, pairs) == distinct_numbers(plain, pairs)


def test_two_references_one_scores_tokens_the_other_anchors(
    tmp_path: Path, policy_folder: Path, tokenizer: Any, pairs: list[TokenizedPair], teacher: nn.Module
) -> None:
    anchor = AutoModelForCausalLM.from_pretrained(policy_folder)
    for model, label in ((teacher, "teacher"), (anchor, "anchor")):
        store = ReferenceStore.create(tmp_path, reference_space(model, tokenizer, label=label))
        fill_store(store, pairs, model, pad_token_id=0, progress=False)
    anchors, scores = ReferenceStore.open(tmp_path, "anchor"), ReferenceStore.open(tmp_path, "teacher")
    policy = make_policy(policy_folder)
    objective = make_objective("selective_dpo", beta=0.5, selection_ratio=0.4)
    batch = collate(pairs[:6], 0)
    carried = {REF_LOGPS: to_bits(anchors.lookup(batch)), SCORING_REF_LOGPS: to_bits(scores.lookup(batch))}
    logps = model_per_token_logps(policy, batch)
    out = loss_of_batch(objective, batch, logps, *map(from_bits, carried.values()))
    online = [frozen_per_token_logps(model.eval(), batch) for model in (anchor, teacher)]
    torch.testing.assert_close(out.losses, loss_of_batch(objective, batch, logps, *online).losses, rtol=1e-5, atol=1e-6)
    assert not torch.equal(out.losses, loss_of_batch(objective, batch, logps, online[0]).losses)


def make_policy(folder: Path) -> nn.Module:
    policy = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return policy


def test_a_teacher_with_a_padded_vocabulary_and_more_tokens_works(
    tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair]
) -> None:
    folder = make_model(tmp_path / "big", seed=3, words=[*WORDS, "more"], vocab_size=64)
    big = AutoModelForCausalLM.from_pretrained(folder)
    store = ReferenceStore.create(tmp_path / "store", reference_space(big, AutoTokenizer.from_pretrained(folder)))
    store.check_tokenizer(tokenizer)
    assert fill_store(store, pairs, big, pad_token_id=0, progress=False).computed == unique_rows(pairs)
    batch = collate(pairs, 0)
    torch.testing.assert_close(store.lookup(batch), frozen_per_token_logps(big.eval(), batch), rtol=1e-5, atol=1e-5)


# --- who a reference is ----------------------------------------------------------------------------------------------


def test_what_changes_the_numbers_changes_the_space_and_nothing_else_does(
    tmp_path: Path, reference_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(folder: Path = reference_folder, **options: Any) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, **options)

    def name(model: nn.Module, vocabulary: Any = tokenizer) -> str:
        return reference_space(model, vocabulary).name

    base = name(loaded())
    saved = loaded()
    saved.save_pretrained(tmp_path / "saved")
    trained = loaded().train()
    trained.requires_grad_(False)
    install_fused_head(trained)
    assert {name(loaded(tmp_path / "saved")), name(trained), name(copy.deepcopy(saved))} == {base}

    nudged = loaded()
    with torch.no_grad():
        nudged.model.layers[0].mlp.up_proj.weight[3, 2] = torch.nextafter(
            nudged.model.layers[0].mlp.up_proj.weight[3, 2], torch.tensor(10.0)
        )
    swapped = loaded()
    layer = swapped.model.layers[0].self_attn
    layer.k_proj, layer.v_proj = layer.v_proj, layer.k_proj
    warmer = loaded()
    warmer.config.rope_parameters = {**warmer.config.rope_parameters, "rope_theta": 5000.0}
    others = {
        "weights": name(nudged),
        "names": name(swapped),
        "config": name(warmer),
        "dtype": name(loaded(dtype=torch.bfloat16)),
        "attention": name(loaded(attn_implementation="eager")),
        "vocabulary": name(loaded(), make_tokenizer(["user", "assistant", *WORDS[1:], WORDS[0]])),
    }
    monkeypatch.setattr(identity, "LOGPS_VERSION", 2)
    others["scoring version"] = name(loaded())
    assert len({base, *others.values()}) == 1 + len(others), others


def test_a_pad_token_that_a_tokenizer_was_given_is_no_other_reference(
    tmp_path: Path, reference_folder: Path, tokenizer: Any, pairs: list[TokenizedPair]
) -> None:
    """Trainers set the special tokens of a model to those of its tokenizer; no log-prob of a row depends on them."""
    from peft import LoraConfig, get_peft_model

    def loaded(folder: Path = reference_folder) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder)

    base = loaded()
    space = reference_space(base, tokenizer)
    fill_store(ReferenceStore.create(tmp_path / "store", space), pairs, base, pad_token_id=0, progress=False)

    given = loaded()
    given.config.pad_token_id, given.config.eos_token_id, given.config.bos_token_id = 3, [2, 3], None
    given.save_pretrained(tmp_path / "saved")
    under_lora = get_peft_model(loaded(tmp_path / "saved"), LoraConfig(r=2, target_modules=["q_proj"]))
    padding = copy.deepcopy(tokenizer)
    padding.add_special_tokens({"pad_token": "[PAD]"})
    assert len(padding) == len(tokenizer) + 1
    with under_lora.disable_adapter():
        for model, its in ((given, tokenizer), (loaded(tmp_path / "saved"), padding), (under_lora, padding)):
            store = ReferenceStore.create(tmp_path / "store", reference_space(model, its))
            assert fill_store(store, pairs, model, pad_token_id=3, progress=False).computed == 0
            store.check_tokenizer(its)
    padding.eos_token = "[PAD]"  # stands in rows
    assert reference_space(base, padding).name != space.name
    assert ReferenceStore.open(tmp_path / "store").space.identity == space.identity


def test_nested_configurations_and_first_positions_of_a_model() -> None:
    """A text part's special tokens decide nothing either, but RoBERTa counts positions from its pad token's id."""
    from transformers import RobertaConfig, RobertaForCausalLM

    nested = {"text_config": {"pad_token_id": 1, "hidden_size": 8, "_name_or_path": "x"}, "vision": {"dtype": "a"}}
    assert identity._deciding(nested) == {"text_config": {"hidden_size": 8}, "vision": {}}
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaConfig(**sizes, intermediate_size=8, max_position_embeddings=16, is_decoder=True, pad_token_id=1)
    models = []
    for pad in (1, 2):
        torch.manual_seed(0)
        roberta.pad_token_id = pad
        models.append(RobertaForCausalLM(roberta))
        with torch.no_grad():  # the row of the padding is made 0, which would tell them apart by their weights
            for parameter in models[-1].parameters():
                parameter.fill_(0.5)
    one, two = map(identity.model_identity, models)
    assert one["weights"] == two["weights"]
    assert one["config"] != two["config"]


def test_every_byte_of_a_large_tensor_is_in_the_identity() -> None:
    """A weight is read from its device in pieces of 64 MiB: what stands behind the first counts as well."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2**18 + 2**17, tie_word_embeddings=True, **sizes))
    weight = model.get_input_embeddings().weight
    assert weight.numel() * weight.element_size() > 64 << 20
    weights = set()
    for row in (0, len(weight) - 1):
        weights.add(identity.model_identity(model)["weights"])
        with torch.no_grad():
            weight[row, 0] += 1.0
    weights.add(identity.model_identity(model)["weights"])
    assert len(weights) == 3


def test_adapters_count_where_they_are_on_and_do_not_where_they_are_off(
    tmp_path: Path, reference_folder: Path, tokenizer: Any, pairs: list[TokenizedPair]
) -> None:
    from peft import LoraConfig, get_peft_model

    def loaded() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(reference_folder)

    def name(model: nn.Module) -> str:
        return reference_space(model, tokenizer).name

    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"], "lora_dropout": 0.5}
    model: Any = get_peft_model(loaded(), LoraConfig(**lora, init_lora_weights=False))
    model.add_adapter("ref", LoraConfig(**lora, init_lora_weights=False))
    names = {"default": name(model)}
    with model.disable_adapter():
        assert name(model) == name(loaded())  # so the bare base model's rows are found
        store = ReferenceStore.create(tmp_path, reference_space(model, tokenizer))
        fill_store(store, pairs, model, pad_token_id=0, progress=False)
    batch = collate(pairs, 0)
    torch.testing.assert_close(
        store.lookup(batch), frozen_per_token_logps(loaded().eval(), batch), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(StoreError, match=r"belongs to another reference. Different: adapter \(none, not"):
        fill_store(store, [made_up_pair()], model, pad_token_id=0, progress=False)

    model.set_adapter("ref")
    names["ref"] = name(model)
    with torch.no_grad():  # the adapter that is trained is not the one that is the reference
        for parameter_name, parameter in model.named_parameters():
            if ".default" in parameter_name:
                parameter.add_(1.0)
    assert name(model) == names["ref"]
    model.set_adapter("default")
    names["default, trained"] = name(model)
    next(m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)).scaling["default"] *= 2
    names["default, scaled"] = name(model)
    model.merge_adapter()
    names["merged"] = name(model)
    names["none"] = name(loaded())
    assert len(set(names.values())) == len(names), names


def made_up_pair() -> TokenizedPair:
    ids = {"chosen_ids": [9, 8, 7, 6], "rejected_ids": [9, 8, 6]}
    return TokenizedPair(**ids, chosen_prompt_length=2, rejected_prompt_length=2, place="made up")


def test_references_that_cannot_be_one(teacher: nn.Module, tokenizer: Any, reference_folder: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    prompted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(reference_folder),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    with pytest.raises(StoreError, match="PromptTuningConfig puts virtual tokens before a row"):
        reference_space(prompted, tokenizer)
    with pytest.raises(StoreError, match=r"weights of .* are not here"):
        reference_space(teacher.to("meta"), tokenizer)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_store_of_another_model_is_refused_and_untouched(
    tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], teacher: nn.Module, policy_folder: Path
) -> None:
    store = ReferenceStore.create(tmp_path, reference_space(teacher, tokenizer))
    other = AutoModelForCausalLM.from_pretrained(policy_folder)
    with pytest.raises(StoreError, match=r"belongs to another reference\. Different: config .*weights"):
        fill_store(store, pairs, other, pad_token_id=0, progress=False)
    assert store.stat().rows == 0


def test_nan_from_the_model_names_the_row_and_keeps_what_was_computed(
    tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], teacher: nn.Module
) -> None:
    word = tokenizer.convert_tokens_to_ids("w23")
    with torch.no_grad():
        teacher.get_input_embeddings().weight[word] = torch.nan
    good = [pair for pair in pairs if word not in pair.chosen_ids + pair.rejected_ids]
    assert len(good) > 5
    bad = TokenizedPair(
        chosen_ids=[4, word, 7], rejected_ids=[4, 5], chosen_prompt_length=1, rejected_prompt_length=1, place="bad:7"
    )
    store = ReferenceStore.create(tmp_path, reference_space(teacher, tokenizer))
    with pytest.raises(NonFiniteError, match=r"bad:7, chosen: the reference gives nan to token 1 \(id 29\); 2 of 2"):
        fill_store(store, [*good, bad], teacher, pad_token_id=0, progress=False)
    reader = ReferenceStore.open(tmp_path)
    longer = [row for row in rows_of_pairs(good) if len(row.ids) > 3]  # the longest come first
    assert reader.missing_rows(longer) == []
    assert reader.missing([bad]) == [bad]
    finite = [pair for pair in good if min(len(pair.chosen_ids), len(pair.rejected_ids)) > 3]
    assert bool(torch.isfinite(reader.lookup(collate(finite, 0))).all())


def test_rows_that_the_model_cannot_read_are_refused_before_any_is_computed(
    tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], teacher: nn.Module
) -> None:
    store = ReferenceStore.create(tmp_path, reference_space(teacher, tokenizer))
    calls = count_forwards(teacher)
    for ids, message in (
        ([5] * 65, r"long:3, rejected: 65 tokens are more than the reference can read \(64\).*max_length"),
        ([5, 600], r"long:3, rejected: token id 600 is outside the reference's vocabulary of 30"),
        ([5, -1], "outside the reference's vocabulary"),
    ):
        pair = TokenizedPair(
            chosen_ids=[4, 5], rejected_ids=ids, chosen_prompt_length=1, rejected_prompt_length=1, place="long:3"
        )
        with pytest.raises(StoreError, match=message):
            fill_store(store, [*pairs, pair], teacher, pad_token_id=0, progress=False)
    assert calls == []
    assert store.stat().rows == 0


def test_compare_finds_rows_that_this_reference_did_not_give(
    tmp_path: Path, tokenizer: Any, pairs: list[TokenizedPair], teacher: nn.Module
) -> None:
    def source(rows: Any) -> Any:
        return local_logps(rows, teacher, pad_token_id=0)

    store = ReferenceStore.create(tmp_path, reference_space(teacher, tokenizer))
    rows = rows_of_pairs(pairs)
    with pytest.raises(StoreError, match="nothing to compare"):
        compare_rows(store, rows, source, sample=3, seed=0)
    fill_store(store, pairs, teacher, pad_token_id=0, progress=False)
    seen = compare_rows(store, rows, source, sample=10, seed=0)
    assert (seen.rows, seen.identical, seen.max_difference) == (10, 10, 0.0)
    extra = rows_of_pairs([made_up_pair()])
    with store.writer() as writer:
        for row in extra:
            writer.add(row, np.full(row.values, -1.5, dtype=np.float32))
    seen = compare_rows(store, [*rows, *extra], source, sample=1000, seed=0)
    assert seen.rows == unique_rows(pairs) + 2 == seen.identical + 2
    assert seen.worst.startswith("made up")
    assert seen.max_difference > 0.1 > seen.mean_difference


# --- the command -----------------------------------------------------------------------------------------------------


def command(model: Path, pairs: Path, store: Path, *more: str) -> list[str]:
    return ["score", "--ref-model", str(model), "--pairs", str(pairs), "--store", str(store), *more]


def test_the_command_computes_once_verifies_counts_and_tidies_up(
    tmp_path: Path, reference_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    assert main(command(reference_folder, pairs_file, store)) == 0
    shown = capsys.readouterr()
    assert "40 pairs, 80 different rows: 0 were stored, 80 computed" in shown.out
    assert "log-probs: 100%" in shown.err
    assert main(command(reference_folder, pairs_file, store)) == 0
    assert "80 were stored, 0 computed" in capsys.readouterr().out
    assert main(command(reference_folder, pairs_file, store, "--verify", "--verify-rows", "9")) == 0
    assert "9 stored rows computed again: 9 equal bit by bit" in capsys.readouterr().out
    assert main(["score", "--store", str(store), "--stat"]) == 0
    assert "80" in capsys.readouterr().out

    more = write_jsonl(tmp_path / "more.jsonl", [*text_rows(40), {"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}])
    assert main(command(reference_folder, more, store, "--stat")) == 0
    assert "2 of 82" in capsys.readouterr().out
    fewer = write_jsonl(tmp_path / "fewer.jsonl", text_rows(10))
    assert main(command(reference_folder, fewer, store, "--prune")) == 0
    assert "20 rows kept, 60 removed" in capsys.readouterr().out

    opened = ReferenceStore.open(store)
    tampered = rows_of_pairs(tokenized(reference_folder, more, 64))[-1:]
    with opened.writer() as writer:
        writer.add(tampered[0], np.full(tampered[0].values, -0.5, dtype=np.float32))
    assert main(command(reference_folder, more, store, "--verify")) == 1
    assert "more.jsonl:41, rejected: more than 0.001" in capsys.readouterr().err


def test_rows_that_are_cut_at_other_lengths_are_said_to_be(
    tmp_path: Path, reference_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`score` keeps what the reference can read (64 tokens), a trainer cut at 12: the error and --stat name both."""
    store = tmp_path / "store"
    assert main(command(reference_folder, pairs_file, store)) == 0
    with pytest.raises(MissingRowsError) as caught:
        ReferenceStore.open(store).check(tokenized(reference_folder, pairs_file, 12))
    for said in (
        "rows that were asked for have 12 tokens and none has more: is max_length 12?",
        "The store was filled with max_length 64 (keep_start).",
        "--max-length N --truncation-mode MODE, as in training",
    ):
        assert said in str(caught.value)
    capsys.readouterr()
    assert main(command(reference_folder, pairs_file, store, "--stat", "--max-length", "12")) == 0
    shown = capsys.readouterr().out
    assert "These pairs were cut at max_length 12 (keep_start)." in shown
    assert "The store was filled with max_length 64 (keep_start)." in shown
    assert main(command(reference_folder, pairs_file, store, "--stat")) == 0
    assert "cut at" not in capsys.readouterr().out


def test_the_command_removes_references_without_rows(
    tmp_path: Path, reference_folder: Path, tokenizer: Any, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    assert main(command(reference_folder, pairs_file, store)) == 0
    bare = AutoModelForCausalLM.from_pretrained(reference_folder, dtype=torch.bfloat16)
    empty = ReferenceStore.create(store, reference_space(bare, tokenizer, label="interrupted"))
    write_identity(empty.folder, empty.space)  # as earlier versions did before the first row
    opened = ReferenceStore.open(store)
    assert main(["score", "--store", str(store), "--stat"]) == 0
    assert f"1 without rows, left out: {empty.folder.name[:8]}. --prune removes them" in capsys.readouterr().out
    assert main(["score", "--store", str(store), "--prune", "--space", opened.space.name]) == 0
    assert empty.folder.exists()
    assert main(["score", "--store", str(store), "--prune"]) == 0
    assert f"{empty.folder.name[:8]}: removed, it held no rows" in capsys.readouterr().out
    assert [folder.name for folder in store.iterdir()] == [opened.space.name]
    others = write_jsonl(tmp_path / "others.jsonl", [{"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}])
    assert main(command(reference_folder, others, store, "--prune")) == 0
    shown = capsys.readouterr().out
    assert "0 rows kept, 80 removed" in shown
    assert f"{opened.space.name[:8]}: removed, it held no rows" in shown
    assert list(store.iterdir()) == []


def tokenized(model: Path, file: Path, max_length: int) -> list[TokenizedPair]:
    from selective_pref_adapters.pairs import read_rows

    return tokenize_pairs(read_rows(file), AutoTokenizer.from_pretrained(model), max_length=max_length)[0]


def test_words_that_make_no_sense(
    tmp_path: Path, reference_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    other = make_model(tmp_path / "other", seed=0, words=[*WORDS[1:], WORDS[0]])
    for arguments, message in (
        (["score", "--store", str(store)], "give --ref-model"),
        (["score", "--store", str(store), "--stat"], "no reference store at"),
        (["score", "--store", str(store), "--stat", "--prune"], "--stat and --prune are two different things"),
        (["score", "--store", str(store), "--prune", "--pairs", "p.jsonl"], "give --tokenizer"),
        (command(reference_folder, tmp_path / "no.jsonl", store), "no preference pairs at"),
        (command(tmp_path / "no", pairs_file, store), "there is no such folder, nor a hub model at hand"),
        (command(reference_folder, pairs_file, store, "--max-length", "65"), "longer than the reference can read (64"),
        (command(reference_folder, pairs_file, store, "--verify-rows", "0"), "verify_rows must be at least 1"),
        (command(reference_folder, pairs_file, store, "--tokenizer", str(other)), "tokenize differently: id 6"),
        (command(reference_folder, pairs_file, store, "--url", "http://x/v1"), "give --revision"),
        (command(reference_folder, pairs_file, pairs_file), "cannot write to the reference store"),
        (command(reference_folder, pairs_file, store, "--verify"), "there is nothing to compare"),
    ):
        assert main(arguments) == 1, message
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not store.exists()
    with pytest.raises(SystemExit) as end:
        main(["score", "--help"])
    assert end.value.code == 0
    assert "--ref-model" in capsys.readouterr().out


@pytest.fixture
def many_pairs(tmp_path: Path) -> Path:
    pick = random.Random(3)

    def words(count: int) -> str:
        return " ".join(pick.choices(WORDS, k=count))

    rows = [{"prompt": words(8) + " ", "chosen": words(40), "rejected": words(40)} for _ in range(1500)]
    return write_jsonl(tmp_path / "many.jsonl", rows)


def test_killed_half_way_it_goes_on_where_it_was(
    tmp_path: Path, reference_folder: Path, many_pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    arguments = command(reference_folder, many_pairs, store, "--flush-seconds", "0.05")
    running = start(run_cli, arguments)
    deadline = time.monotonic() + 120
    while len(list(store.glob("*/*.safetensors"))) < 3 and running.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    running.kill()
    running.join(30)
    assert running.exitcode == -signal.SIGKILL
    left = ReferenceStore.open(store).stat()
    assert left.damaged == {}
    assert 0 < left.rows < 3000
    assert main(arguments) == 0
    assert f"3000 different rows: {left.rows} were stored, {3000 - left.rows} computed" in capsys.readouterr().out
    assert main([*arguments, "--verify"]) == 0
    assert "64 equal bit by bit" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path, reference_folder: Path, pairs_file: Path) -> None:
    """Each computes its half with its own copy into its own shards; together they give what one process gives."""
    report = tmp_path / "report.json"
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    arguments = (reference_folder, pairs_file, tmp_path / "store", report)
    assert run_ranks(run_script, script, *arguments, log=tmp_path / "log") == [0, 0]
    printed = (tmp_path / "log").read_text()
    assert printed.count("40 pairs, 80 different rows: 0 were stored, 80 computed") == 1
    seen = json.loads(report.read_text())
    assert seen["second"] == {"hits": 80, "computed": 0, "forward_passes": 0}
    assert "computing log-probs failed on 1 other processes" in seen["failure seen by the other"]

    store = ReferenceStore.open(tmp_path / "store")
    assert store.stat().shards == 2
    pairs = tokenized(reference_folder, pairs_file, 64)
    model = AutoModelForCausalLM.from_pretrained(reference_folder).eval()
    install_fused_head(model)
    batch = collate(pairs, 0)
    torch.testing.assert_close(store.lookup(batch), frozen_per_token_logps(model, batch), rtol=1e-5, atol=1e-5)


TWO_PROCESSES = """
import json, os, sys
from selective_pref_adapters.reference_store.command import score
from selective_pref_adapters.options import ScoreConfig
from selective_pref_adapters.reference_store import fill_rows
from selective_pref_adapters.reference_store import ReferenceStore, rows_of_pairs
from selective_pref_adapters.pairs import TokenizedPair

model, pairs, folder, report = sys.argv[1:]
rank = int(os.environ["RANK"])
config = ScoreConfig(ref_model=model, pairs=pairs, store=folder)
assert score(config).forward_passes <= 80
second = score(config)
seen = {"second": {name: getattr(second, name) for name in ("hits", "computed", "forward_passes")}}

def fails_on_rank_0(rows):
    if rank == 0:
        raise ValueError("broken here")
    return []

new = [TokenizedPair(chosen_ids=[4, n, 5], rejected_ids=[4, n, 6], chosen_prompt_length=1, rejected_prompt_length=1)
       for n in range(4)]
try:
    fill_rows(ReferenceStore.open(folder), rows_of_pairs(new), fails_on_rank_0, progress=False)
except ValueError as error:
    seen["failure seen by the other"] = str(error)
if rank == 0:
    assert seen["failure seen by the other"] == "broken here"
else:
    open(report, "w").write(json.dumps(seen))
"""


def test_nan_in_a_saved_model_is_one_line(tmp_path: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = make_model(tmp_path / "broken", seed=2)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert main(command(broken, pairs_file, tmp_path / "store")) == 1
    error = capsys.readouterr().err
    assert "the reference gives nan to token" in error
    assert "pairs.jsonl:" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("length", [None, 24])
def test_the_default_length_is_that_of_training(
    tmp_path: Path, pairs_file: Path, reference_folder: Path, length: int | None
) -> None:
    """A policy with a short context: `score --tokenizer POLICY` cuts rows as `train` and `dpo` do by default."""
    from dataclasses import replace

    from selective_pref_adapters.options import ScoreConfig
    from selective_pref_adapters.pairs import read_rows
    from selective_pref_adapters.reference_store.command import score

    policy = make_model(tmp_path / "short", seed=4, max_position_embeddings=12)
    config = ScoreConfig(
        ref_model=str(reference_folder), tokenizer=str(policy), pairs=str(pairs_file), store=str(tmp_path / "store")
    )
    if length is not None:
        with pytest.raises(ValueError, match="max_length 24 is longer than the policy can read \\(12 tokens\\)"):
            score(replace(config, max_length=length))
        return
    score(config)
    pairs, _ = tokenize_pairs(read_rows(pairs_file), AutoTokenizer.from_pretrained(policy), max_length=12)
    ReferenceStore.open(tmp_path / "store").check(pairs)
