"""Folders and files that the adapter tests share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tiny import make_model, text_rows, write_jsonl

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_CACHES = tempfile.TemporaryDirectory(prefix="selective-pref-tests-")  # for as long as the tests run
os.environ["HF_DATASETS_CACHE"] = _CACHES.name

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("policy"), seed=1)


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("reference"), seed=2, hidden_size=24, intermediate_size=16)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", text_rows(40))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the folder with real data and models is not there")
    return SHARED
