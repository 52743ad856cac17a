"""Local folders in place of the hub's models and data sets that TRL's DPO tests name.

In: a checkout of TRL. Out: a folder in which `trl-internal-testing/NAME` is a data set or a tiny model, so that a
process started there finds them without a network. TRL's own scripts make them; what those scripts would fetch from the
hub (a tokenizer, a processor, a configuration) is made here, and what they would push is saved.

    python tests/trl_suite/stand_ins.py TRL_CHECKOUT FOLDER
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% elif m['content'] %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_MODELS = {  # script of TRL → what it asks the hub for
    "qwen2_for_causal_lm_2_5": "Qwen/Qwen2.5-32B-Instruct",
    "cohere2_for_causal_lm": "CohereLabs/tiny-aya-earth",
    "glm4_moe_for_causal_lm": "zai-org/GLM-4.5",
    "gpt_oss_for_causal_lm": "openai/gpt-oss-20b",
    "qwen3_moe_for_causal_lm": "Qwen/Qwen3-30B-A3B",
    "nemotron_3_nano_for_causal_lm": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "olmo3_for_causal_lm": "allenai/Olmo-3-7B-Think",
    "lfm2_for_causal_lm": "LiquidAI/LFM2-1.2B",
    "lfm2_for_causal_lm_2_5": "LiquidAI/LFM2.5-230M",
    "remote_for_causal_lm": "meta-llama/Llama-3.2-1B-Instruct",
}
IMAGE_MODELS = {
    "gemma3_for_conditional_generation": ("google/gemma-3-4b-it", "gemma3"),
    "gemma4_for_conditional_generation": ("google/gemma-4-E2B-it", "gemma4"),
    "llava_for_conditional_generation": ("llava-hf/llava-1.5-7b-hf", "llava"),
    "llava_next_for_conditional_generation": ("llava-hf/llava-v1.6-mistral-7b-hf", "llava_next"),
    "qwen2_vl_for_conditional_generation": ("Qwen/Qwen2-VL-2B-Instruct", "qwen2_vl"),
    "qwen2_5_vl_for_conditional_generation": ("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl"),
    "qwen3_vl_for_conditional_generation": ("Qwen/Qwen3-VL-2B-Instruct", "qwen3_vl"),
    "qwen3_5_for_conditional_generation_nothink": ("Qwen/Qwen3.5-0.8B", "qwen3_5"),
    "qwen3_6_for_conditional_generation": ("Qwen/Qwen3.6-35B-A3B", "qwen3_5_moe"),
}
DATA_SETS = ("zen", "zen_image", "zen_multi_image", "harmony", "toolcall")
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<|image|>", "<|boi|>", "<|eoi|>", "<|video|>", "<|audio|>"]
SPECIAL += ["<|endoftext|>", "<unk>", "<s>", "</s>", "<bos>", "<eos>"]  # what classes of tokenizers would add


def make_stand_ins(checkout: Path, folder: Path) -> None:
    """Fills `folder` with everything that TRL's DPO tests read. What fails is listed, and its tests fail later."""
    import os

    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    sys.path.insert(0, str(checkout / "scripts"))
    texts = list(_make_data_sets(checkout))
    failed = []
    _patch_hub_calls()
    for script, base in TEXT_MODELS.items():
        _attempt(failed, script, lambda base=base: make_tokenizer(texts).save_pretrained(base), "for_causal_lm")
    for script, (base, kind) in IMAGE_MODELS.items():
        _attempt(
            failed,
            script,
            lambda base=base, kind=kind: _make_image_base(base, kind, texts),
            "for_conditional_generation",
        )
    for line in failed:
        print(line)
    Path("complete").write_text("\n".join(failed))


def _attempt(failed: list[str], script: str, base: Callable[[], Any], package: str) -> None:
    try:
        base()
        importlib.import_module(f"generate_tiny_models.{package}.{script}")
    except Exception as error:
        failed.append(f"{script}: {type(error).__name__}: {error}"[:300])


def _make_data_sets(checkout: Path) -> Iterable[str]:
    """Runs TRL's scripts for data sets; saves each configuration as parquet files. Returns their texts."""
    import numpy as np
    from datasets import DatasetDict

    configurations: dict[str, list[dict[str, Any]]] = {}
    texts: list[str] = []

    def save(self: Any, repo_id: str, config_name: str = "default", **_: Any) -> None:
        files = []
        for split, rows in self.items():
            path = Path(repo_id) / config_name / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(str(path))
            files.append({"split": split, "path": f"{config_name}/{split}.parquet"})
        texts.extend(json.dumps(row, default=str) for rows in self.values() for row in rows if "image" not in repo_id)
        configurations.setdefault(repo_id, []).append({"config_name": config_name, "data_files": files})

    DatasetDict.push_to_hub = save
    for name in DATA_SETS:
        np.random.seed(0)
        script = importlib.import_module(f"generate_{name}_dataset")
        script.main(0.1, True, script.ScriptArguments().repo_id)
    for repo_id, configs in configurations.items():
        card = "\n".join(["---", json.dumps({"configs": configs}), "---", ""])
        (Path(repo_id) / "README.md").write_text(card)
    return texts


def make_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer of a few hundred tokens, trained on the data sets' texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        extra_special_tokens={
            "image_token": "<|image|>",
            "video_token": "<|video|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio|>",
            "eoa_token": "<|audio|>",
            "boi_token": "<|boi|>",
            "eoi_token": "<|eoi|>",
            "vision_bos_token": "<|boi|>",
            "vision_eos_token": "<|eoi|>",
        },
    )
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", "")
    generation = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    save = tokenizer.save_pretrained

    def save_both(folder: str, **options: Any) -> Any:
        generation.save_pretrained(folder)
        return save(folder, **options)

    tokenizer.save_pretrained = save_both
    return tokenizer


def _make_image_base(folder: str, kind: str, texts: list[str]) -> None:
    """A processor and a configuration under the name of the model that a script of TRL shrinks."""
    from transformers import AutoConfig, GenerationConfig
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: F401

    tokenizer = make_tokenizer(texts)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    template = CHAT_TEMPLATE.replace("IMAGE", _PLACEHOLDER.get(kind, "<|image|>"))
    processor = _processor(kind, tokenizer, template)
    processor.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    numbers = {
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "vision_start_token_id": ids["<|boi|>"],
        "vision_end_token_id": ids["<|eoi|>"],
        "image_token_index": ids["<|image|>"],
        "boi_token_index": ids["<|boi|>"],
        "eoi_token_index": ids["<|eoi|>"],
        "boi_token_id": ids["<|boi|>"],
        "eoi_token_id": ids["<|eoi|>"],
    }
    config = AutoConfig.for_model(kind, **_HUB_SIZES.get(kind, {}))
    for name, value in numbers.items():
        if hasattr(config, name):
            setattr(config, name, value)
    text = config.get_text_config()
    text.vocab_size, text.pad_token_id = len(tokenizer), ids["<pad>"]
    text.bos_token_id, text.eos_token_id = ids["<|im_start|>"], ids["<|im_end|>"]
    if hasattr(text, "vocab_size_per_layer_input"):
        text.vocab_size_per_layer_input = len(tokenizer)
    config.save_pretrained(folder)


_HUB_SIZES = {  # where the hub's configuration differs from its class's defaults
    "gemma3": {"vision_config": {"patch_size": 14, "image_size": 896, "vision_use_head": False}},
    "gemma4": {
        "vision_config": {},
        "text_config": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    },
}
_PLACEHOLDER = {
    kind: "<|boi|><|image|><|eoi|>" for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe")
} | {"gemma3": "<|boi|>"}


def _processor(kind: str, tokenizer: Any, template: str) -> Any:
    import transformers as t

    options: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": template}
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe"):
        name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}.get(kind, "Qwen3VL")
        patch = 14 if kind in ("qwen2_vl", "qwen2_5_vl") else 16
        size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (4 * patch) ** 2}
        images = t.Qwen2VLImageProcessor(patch_size=patch, size=size)
        video = t.Qwen2VLVideoProcessor() if name != "Qwen3VL" else t.Qwen3VLVideoProcessor()
        return getattr(t, f"{name}Processor")(image_processor=images, video_processor=video, **options)
    if kind == "gemma3":
        images = t.Gemma3ImageProcessor(size={"height": 224, "width": 224})
        return t.Gemma3Processor(image_processor=images, image_seq_length=256, **options)
    if kind == "gemma4":
        return t.Gemma4Processor(
            image_processor=t.Gemma4ImageProcessor(),
            feature_extractor=t.Gemma4AudioFeatureExtractor(),
            video_processor=t.Gemma4VideoProcessor(),
            **options,
        )
    options |= {"patch_size": 14, "vision_feature_select_strategy": "default", "image_token": "<|image|>"}
    options |= {"num_additional_image_tokens": 1}
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    if kind == "llava":
        return t.LlavaProcessor(image_processor=t.CLIPImageProcessor(**size), **options)
    return t.LlavaNextProcessor(image_processor=t.LlavaNextImageProcessor(**size), **options)


def _patch_hub_calls() -> None:
    """TRL's scripts save what they would push, and compare nothing with the hub."""
    import torch
    import transformers

    common = importlib.import_module("generate_tiny_models._common")

    def save(
        model: Any, tokenizer: Any, generation_config: Any, prefix: str, suffix: str | None = None, **_: Any
    ) -> None:
        name = type(model).__name__
        folder = Path("trl-internal-testing") / "-".join(filter(None, [prefix, name, suffix]))
        if generation_config is not None:
            model.generation_config = generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    common.push_to_hub = save
    for name in ("check_transformers_version", "check_dtype_pattern", "print_config_diff", "smoke_test"):
        setattr(common, name, lambda *_, **__: None)
    torch.manual_seed(0)
    own = transformers.Olmo3Config.__init__  # TRL's script names ids of the tokenizer that the stand-in replaces
    ids = {"eos_token_id": 2, "pad_token_id": 0}
    transformers.Olmo3Config.__init__ = lambda self, **options: own(self, **{**options, **ids})


if __name__ == "__main__":
    make_stand_ins(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
