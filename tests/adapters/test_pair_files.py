"""Files and folders of rows, as people have them: packed, in any case, with BOMs, in lists, lines and objects."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub import hub
from selective_pref_adapters.pairs import RowError, read_rows
from tiny import text_rows, write_jsonl

ROWS = text_rows(6)
EXPECTED = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
TALK = {
    "prompt": [{"role": "user", "content": "w0"}],
    "chosen": [{"role": "assistant", "content": "w1"}],
    "rejected": [{"role": "assistant", "content": "w2"}],
}


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(rows: list[Any], folder: Path) -> bytes:
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(str(folder / "made.parquet"))
    return (folder / "made.parquet").read_bytes()


def zst(data: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def read(path: Path) -> list[tuple[Any, Any, Any]]:
    return [(row.prompt, row.chosen, row.rejected) for row in read_rows(path)]


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zst], ids=["plain", "gz", "zst"])
def test_every_form_gives_the_same_rows(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """The text of a file has the same rows whatever the suffix's case, BOM, line ends or packing."""
    suffix = {gzip.compress: ".gz", zst: ".zst"}.get(pack, "")
    rows = json.dumps(ROWS).encode()
    forms = {
        "a.jsonl": lines(ROWS),
        "bom.jsonl": b"\xef\xbb\xbf" + lines(ROWS),
        "crlf.JSONL": lines(ROWS).replace(b"\n", b"\r\n"),
        "blank.jsonl": b"\n\n" + lines(ROWS).replace(b"\n", b"\n\n"),
        "list.json": rows,
        "bom.json": b"\xef\xbb\xbf" + rows,
        "pretty.Json": json.dumps(ROWS, indent=2).encode(),
        "lines.json": b"\xef\xbb\xbf" + lines(ROWS),
        "object.json": json.dumps({"version": 1, "data": ROWS}).encode(),
        "pretty_object.json": json.dumps({"data": ROWS}, indent=2).encode(),
        "a.parquet": parquet(ROWS, tmp_path),
        "a.csv": table(tmp_path / "made.csv", ROWS).read_bytes(),
    }
    for name, data in forms.items():
        (tmp_path / (name + suffix)).write_bytes(pack(data))
        assert read(tmp_path / (name + suffix)) == EXPECTED, name


def test_one_row_alone_in_a_json_file(tmp_path: Path) -> None:
    for row in (ROWS[0], {"conversations": [{"from": "human", "value": "a"}], "chosen": "b", "rejected": "c"}):
        for indent in (None, 2):
            (tmp_path / "a.json").write_text(json.dumps(row, indent=indent))
            assert len(read_rows(tmp_path / "a.json")) == 1


def test_tables_hold_messages_as_json_and_cells_with_line_breaks(tmp_path: Path) -> None:
    talk = {name: json.dumps(value) for name, value in TALK.items()}
    (row,) = read_rows(table(tmp_path / "talk.csv", [talk]))
    assert (row.prompt, row.chosen, row.rejected) == tuple(TALK.values())
    broken = [{"prompt": "one\ntwo", "chosen": 'says "yes", twice', "rejected": ""}]
    (row,) = read_rows(table(tmp_path / "text.csv", broken))
    assert {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} == broken[0]
    assert row.place == "text.csv:3"
    (tmp_path / "short.csv").write_text("prompt,chosen,rejected\na,b,c\na,b\na,b,c,d\n")
    malformed: list[str] = []
    assert len(read_rows(tmp_path / "short.csv", malformed)) == 1
    assert [m.split(" expected")[0] for m in malformed] == ["short.csv:3:", "short.csv:4:"]


def test_everything_in_a_folder_is_read_or_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[:1]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[1:2])))
    (tmp_path / "c.JSONL").write_bytes(lines(ROWS[2:3]))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.parquet").write_bytes(parquet(ROWS[3:6], tmp_path.parent))
    (tmp_path / "README.md").write_text("words")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "e.jsonl").write_text("not a row")
    notes: list[str] = []
    rows = read_rows(tmp_path, notes=notes)
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == EXPECTED
    assert notes[0] == f"{tmp_path.name}: read a.jsonl, b.jsonl.gz, c.JSONL, more/d.parquet; not read: README.md"
    assert rows[3].place == "more/d.parquet, row 0"


def test_splits_of_a_folder(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train-00000.jsonl", ROWS[:4])
    write_jsonl(tmp_path / "data" / "test-00000.jsonl", ROWS[4:])
    notes: list[str] = []
    assert len(read_rows(tmp_path / "data", notes=notes)) == 4
    assert notes[0] == "data: read train-00000.jsonl; not read: test-00000.jsonl"
    assert len(read_rows(f"{tmp_path / 'data'}:test")) == 2
    with pytest.raises(ValueError, match=r"no files of a split 'dev'; splits by file names: \['test', 'train'\]"):
        read_rows(f"{tmp_path / 'data'}:dev")
    DatasetDict(test=Dataset.from_list(ROWS[:2])).save_to_disk(str(tmp_path / "saved"))
    assert len(read_rows(f"{tmp_path / 'saved'}:test")) == 2
    with pytest.raises(ValueError, match=r"holds the splits \['test'\]: name one"):
        read_rows(tmp_path / "saved")
    with pytest.raises(ValueError, match="is one file and has no splits"):
        read_rows(f"{tmp_path / 'data' / 'train-00000.jsonl'}:test")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", b"not packed", r"cannot be read as a \.jsonl\.gz file"),
        ("a.jsonl.zst", b"not packed", r"cannot be read as a \.jsonl\.zst file"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-9], r"cannot be read as a \.jsonl\.gz file"),
        ("a.parquet", b"no table", r"not a readable Parquet file"),
        ("a.csv", b'prompt,chosen,rejected\n"a,b,c\n', r"a\.csv:1: not readable as CSV"),
        ("a.csv", "prompt,chosen,rejected\na,é,c\n".encode("latin-1"), r"not readable as CSV in UTF-8"),
        ("a.json", b'{"train": [], "test": []}', r"expected a list of rows.*got an object with the lists"),
        ("a.json", b'{"a": 1}', r"got an object with \['a'\]"),
        ("a.json", b"[{", r"a\.json: not valid JSON"),
        ("a.jsonl", "\ufeff{}\n".encode("utf-16-le"), r"a\.jsonl:1: not valid JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def test_a_broken_line_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(lines(ROWS[:2]) + b"{broken\n" + lines(ROWS[2:]))
        with pytest.raises(RowError, match=rf"{name}:3: not valid JSON.*--skip-malformed-rows"):
            read_rows(tmp_path / name)
        malformed: list[str] = []
        assert len(read_rows(tmp_path / name, malformed)) == len(ROWS)
        assert len(malformed) == 1


def test_what_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no preference pairs at"):
        read_rows(tmp_path / "absent")
    with pytest.raises(
        FileNotFoundError, match=r"no preference pairs at nobody/nothing:train: .* The hub does not give"
    ):
        read_rows("nobody/nothing:train")


def test_data_sets_of_the_hub_and_what_it_does_not_give(tmp_path: Path) -> None:
    """In a process of its own, which is told that the hub is a server on this machine."""
    program = """
import sys
from selective_pref_adapters.pairs import read_rows
for source in sys.argv[1:]:
    notes = []
    try:
        rows = read_rows(source, notes=notes)
        print(len(rows), rows[0].place, *notes)
    except (ValueError, OSError) as error:
        print(type(error).__name__, error)
"""
    sets = {
        "some/pairs": {"README.md": b"# pairs", "train.jsonl": lines(ROWS), "test.jsonl": lines(ROWS[:1])},
        "some/broken": {"README.md": b"# broken", "train.jsonl": lines(ROWS) + b"{broken\n"},
    }
    asked = ("some/pairs", "some/pairs:test", "some/pairs:other", "some/broken", "some/absent")
    with hub(sets) as endpoint:
        settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", program, *asked],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            check=True,
        )
    train, test, other, broken, absent = done.stdout.splitlines()
    assert train == f"{len(ROWS)} some/pairs:train, row 0 pairs: TRL standard rows: {len(ROWS)}"
    assert test.startswith("1 some/pairs:test, row 0")
    assert other.startswith("FileNotFoundError no preference pairs at some/pairs:other")
    assert "Unknown split" in other
    if "Expected object or value" in broken:  # datasets 4.7: no error of its own where a table cannot be made
        assert broken.startswith("FileNotFoundError no preference pairs at some/broken")
    else:
        assert broken.startswith("ValueError some/broken: the files of this data set cannot be read as one table: ")
        assert "hf download --repo-type dataset some/broken --local-dir FOLDER" in broken
    assert "The hub does not give it either: Dataset 'some/absent' doesn't exist" in absent
