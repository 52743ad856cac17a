"""FSDP2 in the TRL and the HF adapter: one and two processes compute what a plain one does, and end together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import fsdp_utils
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.training_args import ParallelMode

from ranks import run_script, start
from selective_pref_adapters.fsdp import _layers_of, asks_for_fsdp
from selective_pref_adapters.reference_store import ReferenceStore, reference_space
from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer
from tiny import make_model, make_text_and_image_model, text_rows

LOSS_TOLERANCE = 2e-5  # relative, of a float32 loss: measured below 2e-6
WEIGHT_TOLERANCE = 2e-4  # absolute, after steps of 1e-2: Adam magnifies the last bits of small gradients

Once = Callable[[str, Callable[[Path], None]], Path]
Seen = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(once: Once) -> Path:
    """Where all processes have written what they saw."""

    def run(folder: Path) -> None:
        policy = make_model(folder / "policy", seed=1)
        reference = make_model(folder / "reference", seed=2, hidden_size=24, intermediate_size=16)
        script, log = Path(__file__).with_name("fsdp_processes.py"), folder / "log"
        process = start(run_script, script, policy, reference, folder, log=log)
        process.join(2400)
        codes = json.loads((folder / "codes.json").read_text()) if process.exitcode == 0 else {}
        expected = {"plain and alone": [0, 0], "killed trl": [-9, -9], "killed hf": [-9, -9], "two": [0, 0]}
        assert codes == expected, log.read_text()[-6000:]

    return once("fsdp", run)


@pytest.fixture(scope="module")
def seen(folder: Path) -> Seen:
    """{process: {run: what it saw}}"""
    return {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("plain-0", "alone-0", "two-0", "two-1")
    }


def losses(run: dict[str, Any], name: str = "loss") -> list[float]:
    return [line[name] for line in run["log"] if name in line]


def same_numbers(run: dict[str, Any], expected: dict[str, Any], rel: float = LOSS_TOLERANCE) -> None:
    for name in ("loss", "grad_norm", "rewards/margins", "selection/fraction", "eval_loss", "eval_rewards/margins"):
        assert losses(run, name) == pytest.approx(losses(expected, name), rel=rel, abs=5e-6), name
    assert losses(run)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def same_weights(ours: Path, theirs: Path) -> None:
    got, expected = weights_of(ours), weights_of(theirs)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=WEIGHT_TOLERANCE, msg=name)


@pytest.mark.slow
def test_a_plain_process_and_fsdp2_compute_the_same(seen: Seen, folder: Path) -> None:
    """TRL and HF, one and two processes, a running and a stored reference; 5 evaluation pairs over 2 × 2."""
    plain, alone, two = seen["plain-0"], seen["alone-0"], seen["two-0"]
    for run in (alone["trl"], alone["trl store"], two["trl"], two["trl store"], two["trl layers"]):
        same_numbers(run, plain["trl"])
    for run in (alone["hf"], two["hf"], two["hf store"]):
        same_numbers(run, plain["hf"])
    same_numbers(alone["trl experts"], plain["trl experts"])
    same_numbers(two["trl self"], plain["trl self"], rel=2e-4)  # of scores that are nearly tied
    same_numbers(two["trl lora"], plain["trl lora"])
    for door, name in (("trl", "weights"), ("hf", "hf-weights")):
        same_weights(folder / f"{name}-two", folder / f"{name}-plain")
        assert two[door]["log"][-1].keys() >= {"eval_loss", "eval_rewards/margins"}
    same_weights(folder / "lora-two", folder / "lora-plain")
    assert AutoModelForCausalLM.from_pretrained(folder / "weights-two").config.architectures == ["LlamaForCausalLM"]


@pytest.mark.slow
def test_both_models_are_sharded_layer_by_layer(seen: Seen, folder: Path) -> None:
    for run in (seen["two-0"][name] for name in ("trl", "trl self", "trl bf16", "trl resumed", "hf", "hf lora")):
        assert list(run["sharded"].values()) == [True, True]
        assert min(run["units"].values()) > 1  # the whole and its layer; newer ones also its embedding, norm and head
    assert seen["two-0"]["trl"]["shared"] >= 8  # batches whose prompts were computed once
    log = (folder / "log").read_text()
    assert "served by its logits" not in log
    assert "view tensor" not in log


@pytest.mark.slow
def test_log_probs_stay_in_float32_under_bf16(seen: Seen) -> None:
    """accelerate's precision for FSDP2 would round them to bf16, and other tokens would be selected."""
    exact, ours = losses(seen["plain-0"]["trl"]), losses(seen["two-0"]["trl bf16"])
    assert ours == pytest.approx(exact, rel=2e-3)


@pytest.mark.slow
def test_an_evaluation_comes_before_training(seen: Seen) -> None:
    first = seen["two-0"]["trl evaluated first"]
    assert math.isfinite(first["before"])
    assert losses(first) == pytest.approx(losses(seen["plain-0"]["trl"]), rel=LOSS_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("door", "weights"), [("trl", "weights"), ("hf", "hf-weights")])
def test_a_killed_run_is_resumed(seen: Seen, folder: Path, door: str, weights: str) -> None:
    """Both processes are killed in the third step, with whole weights in the checkpoints (TRL) or parts (HF)."""
    assert losses(seen["two-0"][f"{door} resumed"]) == pytest.approx(losses(seen["two-0"][door]), rel=1e-6)
    same_weights(folder / f"resumed-{door}", folder / f"{weights}-plain")
    assert (folder / "killed-hf" / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()


@pytest.mark.slow
def test_a_sharded_reference_fills_the_store(seen: Seen, folder: Path) -> None:
    """The store is the whole model's; and where one process meets a broken row, both end."""
    whole = folder / "reference"
    space = reference_space(AutoModelForCausalLM.from_pretrained(whole), AutoTokenizer.from_pretrained(whole))
    spaces = [ReferenceStore.open(folder / name).space for name in ("store", "store-alone")]
    assert [found.identity for found in spaces] == [space.identity] * 2
    raised = sorted(seen[process]["broken"].split(":")[0] for process in ("two-0", "two-1"))
    assert raised == ["NonFiniteError", "StoreError"]


@pytest.mark.slow
def test_self_reference_is_seen(folder: Path) -> None:
    """A copy of the policy, and adapters that have learnt nothing; said once, by the first process."""
    log = (folder / "log").read_text()
    assert log.count("the reference equals the initial policy") == 2 + 2 + 1  # TRL: plain, over two. HF: its adapters


# --- what is refused, before a model is loaded -----------------------------------------------------------------------


def asked(**changed: Any) -> Any:
    """Arguments of a Trainer that a launcher has started with FSDP2."""
    common = {
        "fsdp_plugin_args": {"fsdp_version": 2},
        "parallel_mode": ParallelMode.DISTRIBUTED,
        "accelerator_config": SimpleNamespace(even_batches=True),
    }
    return SimpleNamespace(**{**common, **changed})


def test_what_fsdp2_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asks_for_fsdp(asked())
    assert not asks_for_fsdp(asked(fsdp_plugin_args=None))
    with pytest.raises(ValueError, match=r"FSDP1 is not supported.*fsdp_version: 2"):
        asks_for_fsdp(asked(fsdp_plugin_args={"fsdp_version": 1}))
    with pytest.raises(ValueError, match="torchrun --nproc_per_node"):
        asks_for_fsdp(asked(parallel_mode=ParallelMode.NOT_DISTRIBUTED))
    with pytest.raises(ValueError, match="even_batches to True"):
        asks_for_fsdp(asked(accelerator_config=SimpleNamespace(even_batches=False)))
    monkeypatch.delattr(fsdp_utils, "fsdp2_prepare_model")
    with pytest.raises(ImportError, match="pip install --upgrade torch accelerate"):
        asks_for_fsdp(asked())


def test_layers_to_shard_by_are_those_that_are_there(tmp_path: Path) -> None:
    """A model of text and images names layers of its image encoder's text model, too, which it does not have."""
    model: Any = AutoModelForImageTextToText.from_pretrained(make_text_and_image_model(tmp_path / "model", seed=1))
    there = {type(module).__name__ for module in model.modules()}
    named = set(model._no_split_modules)
    assert named - there
    assert set(_layers_of(model) or ()) == named & there != set()
    assert _layers_of(torch.nn.Linear(1, 1)) is None


def test_accelerates_configuration_asks_for_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP1 is not supported"):  # accelerate's default
        asks_for_fsdp(asked(fsdp_plugin_args=None))
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert asks_for_fsdp(asked(fsdp_plugin_args=None))


def test_a_wrong_fsdp_is_said_before_a_model_is_loaded(
    tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's folder holds no weights, and nobody has noticed."""
    alone = property(lambda _: ParallelMode.NOT_DISTRIBUTED)  # whatever other tests have started in this process
    monkeypatch.setattr(SelectiveDPOConfig, "parallel_mode", alone)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((policy_folder / name).read_bytes())
    args = SelectiveDPOConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, fsdp=True, fsdp_config={"version": 2}
    )
    with pytest.raises(ValueError, match="this one runs alone"):
        SelectiveDPOTrainer(
            model=str(tmp_path),
            args=args,
            train_dataset=Dataset.from_list(text_rows(4)),
            processing_class=AutoTokenizer.from_pretrained(policy_folder),
        )
