"""Checkpoint folders: complete or not there, bounded, the newest complete one found whatever stands beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from selective_pref_adapters.deepspeed_loop import checkpoints


def write(folder: Path, step: int, keep: int = 2) -> Path:
    aside = checkpoints.begin(folder, step)
    (aside / "engine").mkdir()
    (aside / "engine" / "weights").write_bytes(b"x" * (step + 1))
    (aside / "run.json").write_text("{}")
    return checkpoints.publish(folder, step, keep)


def test_the_newest_complete_one_is_found_and_the_number_bounded(tmp_path: Path) -> None:
    assert checkpoints.newest_complete(tmp_path / "absent") is None
    for step in (5, 90, 100, 1000):
        newest = write(tmp_path, step, keep=2)
        assert checkpoints.newest_complete(tmp_path) == newest
        assert checkpoints.step_of(newest) == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00001000"]


@pytest.mark.parametrize("damage", ["no marker", "broken marker", "file gone", "file cut short", "begun only"])
def test_what_is_not_whole_is_passed_over(tmp_path: Path, damage: str) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    if damage == "no marker":
        (bad / checkpoints.MARKER).unlink()
    elif damage == "broken marker":
        (bad / checkpoints.MARKER).write_text('{"step": 2, "fil')
    elif damage == "file gone":
        (bad / "engine" / "weights").unlink()
    elif damage == "file cut short":
        (bad / "engine" / "weights").write_bytes(b"")
    else:
        bad.rename(bad.with_name(f".{bad.name}"))
    assert checkpoints.newest_complete(tmp_path) == good
    assert len(checkpoints.incomplete(tmp_path)) == 1
    checkpoints.sweep(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert good.name in left
    assert (len(left) == 1) == (damage in ("no marker", "begun only"))
    assert checkpoints.newest_complete(write(tmp_path, 2).parent) == bad  # and it can be written again
    assert checkpoints.is_complete(bad)


def test_the_marker_is_written_last_and_the_name_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    sync = os.fsync

    def recorded(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        seen.append((path.name, any(tmp_path.glob("step-*"))))
        sync(handle)

    monkeypatch.setattr(os, "fsync", recorded)
    write(tmp_path, 3)
    assert seen == [
        ("weights", False),
        ("run.json", False),
        (checkpoints.MARKER, False),
        (".step-00000003", False),
        (tmp_path.name, True),
    ]


def test_older_ones_go_only_when_the_new_one_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill at the rename must leave the earlier checkpoint."""
    before = write(tmp_path, 1, keep=1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2, keep=1)
    assert checkpoints.newest_complete(tmp_path) == before


def test_what_is_abandoned_is_gone(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (checkpoints.begin(tmp_path, 2) / "half").write_text("x")
    assert not list(checkpoints.begin(tmp_path, 2).iterdir())  # an earlier attempt is no part of this one
    checkpoints.abandon(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
