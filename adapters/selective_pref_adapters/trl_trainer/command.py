"""`selective-pref dpo`: TRL's `trl dpo` with a selection of tokens. In: flags and a YAML file. Out: a trained model.

The flags are those of `ScriptArguments`, `SelectiveDPOConfig`, `ModelConfig` and `DatasetMixtureConfig` together, read
by `TrlParser`: names in a YAML file are the flags, flags given by hand win, and unknown names are errors. The recipes
in `recipes/dpo` may be named by their file name alone.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from selective_pref_adapters.launching.processes import meeting, place_alone
from selective_pref_adapters.launching.together import own_folder
from selective_pref_adapters.models import load_tokenizer
from selective_pref_adapters.pairs import SKIP, PreferenceRow, RowError, parse_columns, scan_rows
from selective_pref_adapters.pairs.files import KINDS, is_local, kind_of, raw_rows, splits_of
from selective_pref_adapters.pairs.large.naming import code_digest, content_of
from selective_pref_adapters.recipes import bare_word, config_file
from selective_pref_adapters.trl_trainer.config import SelectiveDPOConfig
from selective_pref_adapters.trl_trainer.data import READ_ROW
from selective_pref_adapters.trl_trainer.trainer import SelectiveDPOTrainer


@dataclass
class SelectiveDPOArguments(ScriptArguments):
    """`ScriptArguments` with a reference.

    Attributes:
        ref_model_name_or_path: folder or hub id of the reference; the stronger the better. None: the initial policy,
            or what `reference_store` holds.
    """

    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference model: a folder or hub id with the policy's tokenizer."}
    )


def main(arguments: Sequence[str]) -> None:
    """Trains as the flags say, saves the model to `--output_dir`."""
    parser = TrlParser(
        (SelectiveDPOArguments, SelectiveDPOConfig, ModelConfig, DatasetMixtureConfig),
        prog="selective-pref dpo",
        description="DPO on the tokens that matter, with TRL's trainer. --config FILE.yaml reads these flags from a "
        "file (or from a recipe that comes with this package, as trl_paper.yaml); flags on the command line win.",
    )
    words = with_config_file(parser, arguments)
    engine = _deepspeed(_value_of("deepspeed", words, parser))
    with_peft = any(word.replace("-", "_") == "__use_peft" for word in words)
    for flag, asked, module in (
        ("--deepspeed", engine is not None, "deepspeed"),
        ("--use_peft", with_peft, "peft"),
    ):
        if asked and importlib.util.find_spec(module) is None:
            raise ValueError(f"{flag} needs {module}, which is not installed: pip install 'selective-pref[{module}]'")
    by_accelerate = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"  # its configuration asks for DeepSpeed
    seconds = str(_value_of("ddp_timeout", words, parser))
    minutes = int(seconds if seconds.isdigit() else 1800) / 60  # what is no number, the parser says
    with meeting(minutes):
        if engine is not None or by_accelerate:
            start_deepspeed(minutes)
        try:
            script, args, model, mixture = parser.parse_args_and_config(args=words)
        except json.JSONDecodeError as error:
            raise ValueError(f"an option that takes JSON, as --fsdp_config, cannot be read: {error}") from error
    if not model.model_name_or_path:
        raise ValueError("no policy: give --model_name_or_path FOLDER_OR_HUB_ID")
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    if (settings := getattr(args, "hf_deepspeed_config", None)) is not None and settings.is_zero3():
        settings.config["zero_optimization"].setdefault(GATHER, True)
    if str(args.resume_from_checkpoint).lower() == "true":  # the newest in output_dir
        args.resume_from_checkpoint = True
    with own_folder(Path(str(args.output_dir)), {}):
        try:
            trainer = _trained(script, args, model, mixture)
        except AssertionError as error:  # DeepSpeed's, of sizes that do not go together
            if engine is None:
                raise
            raise ValueError(f"DeepSpeed refuses its settings ({engine}): {error}") from error
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


def _trained(
    script: SelectiveDPOArguments, args: SelectiveDPOConfig, model: ModelConfig, mixture: DatasetMixtureConfig
) -> SelectiveDPOTrainer:
    """The trainer, when it has saved its model."""
    name = str(model.model_name_or_path)
    if Path(name).is_dir() and not args.trust_remote_code:
        load_tokenizer(name)
    splits = load_splits(script, mixture, args)
    trainer = SelectiveDPOTrainer(
        model=name,
        ref_model=script.ref_model_name_or_path,
        args=args,
        train_dataset=split_of(splits, script.dataset_train_split),
        eval_dataset=split_of(splits, script.dataset_test_split) if args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    if script.ignore_bias_buffers:  # boolean masks that some architectures keep as buffers; DDP would send them around
        masks = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = masks
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(_saved(Path(str(args.output_dir))))
    return trainer


def _saved(folder: Path) -> str:
    """What to say at the end; ZeRO-3 writes its parts alone where its settings ask for no whole model."""
    if any(folder.glob("*.safetensors")) or not (folder / "zero_to_fp32.py").is_file():
        return f"model saved to {folder}"
    return (
        f"DeepSpeed's parts of the model saved to {folder}: no program loads them as they are. Join them: "
        f'python {folder / "zero_to_fp32.py"} {folder} {folder}; or leave "{GATHER}": false out of the settings'
    )


GATHER = "stage3_gather_16bit_weights_on_model_save"
"""DeepSpeed's setting by which ZeRO-3 writes a whole model, layer by layer in the first process; here it is on."""


def with_config_file(parser: TrlParser, arguments: Sequence[str]) -> list[str]:
    """The arguments without `--config NAME`, whose settings become the parser's defaults, as `TrlParser` has them.

    A file of DeepSpeed settings that the YAML file names is found beside it.

    Raises:
        FileNotFoundError: neither a file of that name nor a recipe of this command.
        ValueError: the file is no mapping of options to values, or names an option that there is not.
    """
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words[:-1]:
        return words
    index = words.index("--config")
    path = config_file(words[index + 1], "dpo")
    del words[index : index + 2]
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not isinstance(settings.get("env", {}), dict):
        raise ValueError(f"{path} must hold 'name: value' lines ('env' holds such lines, too)")
    os.environ.update({str(name): str(value) for name, value in settings.pop("env", {}).items()})
    options = {action.dest: action for action in reversed(parser._actions)}  # of --x and --no_x the first
    for name, value in settings.items():
        if name not in options:
            near = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
            meant = f": did you mean {near[0]!r}?" if near else "; --help lists them all"
            raise ValueError(f"{path}: there is no option {name!r}{meant}")
        option = options[name]
        switch = option.nargs == "?" or getattr(option.type, "__name__", None) == "string_to_bool"  # TRL's, or its copy
        if isinstance(value, bool) and not switch:
            place = f"{path}: {name}"
            settings[name] = bare_word(place, value, choices=option.choices or (), default=option.default)
    beside = path.parent / str(settings.get("deepspeed"))
    if (
        not any(word.partition("=")[0] == "--deepspeed" for word in words)
        and beside.is_file()
        and beside.suffix == ".json"
    ):
        words += ["--deepspeed", str(beside)]
    parser.set_defaults_with_config(**settings)
    return words


def _value_of(option: str, words: Sequence[str], parser: TrlParser) -> Any:
    """What an option is set to, by a flag or a YAML file."""
    value = parser.get_default(option)
    for index, word in enumerate(words):
        name, given, after = word.partition("=")
        if name.replace("-", "_") == f"__{option}":
            value = after if given else next(iter(words[index + 1 :]), None)
    return value


def _deepspeed(value: Any) -> str | None:
    """Where the settings of DeepSpeed are, for messages; None where there are none.

    Raises:
        ValueError: they are no JSON object, or their file is not there.
    """
    if not value:
        return None
    if isinstance(value, dict):
        return "deepspeed"
    where = "--deepspeed" if value.lstrip().startswith("{") else f"--deepspeed {value}"
    try:
        settings = json.loads(value if where == "--deepspeed" else Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({error.strerror}): give a file of its settings, in JSON") from error
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise ValueError(f"{where} must hold a JSON object, with zero_optimization as one")
    return where


def start_deepspeed(minutes: float) -> None:
    """Makes a place for a process that is alone; on CPUs joins the processes of `torchrun` over gloo.

    DeepSpeed would look for MPI, and compile an all-reduce of its own for a minute.
    """
    place_alone()
    if torch.cuda.is_available():
        return
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with meeting(minutes, RuntimeError):
        deepspeed.init_distributed("gloo", verbose=False, timeout=timedelta(minutes=minutes))


def rows_on_disk(source: str, columns: str | None, skip_malformed: bool) -> tuple[Dataset, list[str]]:
    """(the rows of a file or folder as `prepared` takes them, how they were read), in the cache of `datasets`.

    They are read once, by one process, into Arrow under a name made of all that decides them; every process maps the
    same file into its memory, and so do later runs.

    Raises:
        RowError: a row is no preference pair, and such rows are not to be skipped.
        ValueError: a file cannot be read, or holds no rows.
        OSError: the cache cannot be written to.
    """
    notes: list[str] = []
    about: list[str] = []
    with closing(raw_rows(source, notes)) as raw:
        if next(raw, None) is None:  # which also says what is read of a folder
            raise ValueError(f"{source} holds no rows")
    how = {"source": source, "columns": columns, "skip": skip_malformed}
    what = {"content": content_of(source), "reader": code_digest()}
    try:
        rows = Dataset.from_generator(
            _read, features=Features({READ_ROW: Value("large_string"), _SCHEMA: Value("string")}), gen_kwargs=how | what
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise
    counts = {one["values"]: one["counts"] for one in pc.value_counts(rows.data[_SCHEMA]).to_pylist()}
    malformed = counts.pop(_MALFORMED, 0)
    if malformed:
        wrong = pc.index(rows.data[_SCHEMA], _MALFORMED).as_py()
        about.append(f"{malformed} malformed rows left out, the first: {rows[wrong][READ_ROW]}")
        rows = rows.select(
            np.flatnonzero(pc.not_equal(rows.data[_SCHEMA].combine_chunks(), _MALFORMED).to_numpy(False))
        )
    if not len(rows):
        raise ValueError(f"{source} holds no rows" + (f" but {malformed} malformed ones" if malformed else ""))
    read = ", ".join(f"{schema} rows: {count}" for schema, count in Counter(counts).most_common())
    return rows.remove_columns(_SCHEMA), [*notes, f"{Path(source).name}: {read}", *about]


_SCHEMA, _MALFORMED = "schema", "malformed"


def _read(source: str, columns: str | None, skip: bool, **_: str) -> Iterator[dict[str, str]]:
    for row in scan_rows(source, columns=parse_columns(columns)):
        if isinstance(row, PreferenceRow):
            yield {READ_ROW: json.dumps(asdict(row)), _SCHEMA: row.schema}
        elif skip:
            yield {READ_ROW: str(row), _SCHEMA: _MALFORMED}
        else:
            raise RowError(f"{row}. {SKIP}", row.kind) from row


class LocalSplits(Mapping[str, Any]):
    """Split → rows of a file or folder, read when they are asked for; "train" is what `read_rows` reads by default."""

    def __init__(self, source: str, args: SelectiveDPOConfig) -> None:
        self._source = source
        self._args = args
        self._names = {"train", *splits_of(source)}

    def __getitem__(self, split: str) -> Any:
        if split not in self._names:
            raise KeyError(split)
        source = self._source if split == "train" else f"{self._source}:{split}"
        rows, notes = rows_on_disk(source, self._args.columns, self._args.skip_malformed_rows)
        if PartialState().is_main_process:
            print(*(f"note: {note}" for note in notes), sep="\n", file=sys.stderr)
        return rows

    def __contains__(self, split: object) -> bool:  # without reading it
        return split in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def load_splits(script: SelectiveDPOArguments, mixture: DatasetMixtureConfig, args: SelectiveDPOConfig) -> Any:
    """The splits of the data set that was named: on the hub, in a folder, in one file, or a mixture."""
    if mixture.datasets and script.dataset_name:
        raise ValueError("dataset_name and datasets (a mixture) are both given: leave one of them out")
    if mixture.datasets:
        return get_dataset(mixture)
    if not script.dataset_name:
        raise ValueError("no preference pairs: give --dataset_name, a file, a folder or a hub id")
    path = Path(script.dataset_name)
    if is_local(script.dataset_name) and not script.dataset_streaming and not args.stock_tokenization:
        return LocalSplits(script.dataset_name, args)
    if path.is_file():  # what `load_dataset` reads
        kind, _ = kind_of(path)
        if not kind:
            raise ValueError(f"cannot read {path}: expected {', '.join(KINDS)}, a folder or a hub id")
        builder = {".jsonl": "json"}.get(kind, kind.removeprefix("."))
        return load_dataset(builder, data_files=str(path), streaming=script.dataset_streaming)
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def split_of(splits: Any, name: str) -> Any:
    """One split, or an error that lists those there are."""
    if name not in splits:
        raise ValueError(
            f"the data set has no split {name!r}, only {sorted(splits)}: name another (--dataset_train_split, "
            "--dataset_test_split), or switch evaluation off (--eval_strategy no)"
        )
    return splits[name]
