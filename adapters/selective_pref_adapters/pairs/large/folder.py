"""The cache on the disk: an entry for each source, tokenizer and way of cutting, made once and read by all.

    FOLDER/9a41…/            named by the digest of all that decides the ids (`naming`)
      pairs.arrow            the fields of `TokenizedPair`, a line for each row
      about.arrow            what is known of each row beside its ids
      entry.json             written last: notes, counts, sizes of the files, what the name is the digest of
    FOLDER/9a41….lock        held by the process that makes the entry; the others wait for it, and then read

An entry is written under another name, flushed, and renamed when it is whole. Nothing of it is ever changed: a process
that reads it is not disturbed by any other. Two processes that make the same one, as on two machines whose file system
has no locks, both end with the same content, and one of them is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selective_pref_adapters.pairs.large.entry import opened
from selective_pref_adapters.pairs.large.naming import Making, name_of
from selective_pref_adapters.pairs.large.table import TokenizedRows
from selective_pref_adapters.pairs.large.writing import REMEDY, Maker, no_rows
from selective_pref_adapters.pairs.rendering import Tokenizer
from selective_pref_adapters.pairs.rows import SKIP, RowError
from selective_pref_adapters.pairs.tokenize import check_truncation

logger = logging.getLogger(__name__)

AUTO = "auto"
"""The cache is in `default_folder()`."""
OFF = "off"
"""There is no cache: every process makes the ids, and holds them in memory."""


def default_folder() -> Path:
    """`selective_pref` in the cache of the `datasets` library (`HF_DATASETS_CACHE`)."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "selective_pref"


def tokenized_rows(
    source: str | Path,
    tokenizer: Tokenizer,
    making: Making,
    *,
    cache: str | Path = AUTO,
    workers: int = 1,
    skip_malformed: bool = False,
    progress: bool = False,
) -> TokenizedRows:
    """The token ids of a source's rows: from the cache, where they are, else made and kept there.

    Args:
        source: as in `read_rows`.
        tokenizer: a Hugging Face tokenizer.
        making: how rows are read and cut.
        cache: the folder of the cache, `AUTO` or `OFF`.
        workers: processes that tokenise, where that is to be done.
        skip_malformed: leave out, and count, rows that are no preference pairs, instead of raising at the first.
        progress: show a bar.

    Raises:
        FileNotFoundError, RowError, ValueError: as `read_rows` and `tokenize_pairs`; or `workers` is below 1, or the
            source has changed while it was read.
        OSError: the cache's folder cannot be written to. Nothing is left there that could be read later.
    """
    check_truncation(making.max_length, making.truncation_mode)
    if workers < 1:
        raise ValueError(f"data_workers, the processes that tokenise, must be at least 1; got {workers}")
    make = Maker(source, tokenizer, making, workers, skip_malformed, progress)
    if cache == OFF:
        return _checked(make.in_memory(), source, skip_malformed)
    folder = default_folder() if cache == AUTO else Path(cache)
    name, identity = name_of(source, tokenizer, making)
    entry = folder / name
    rows = opened(entry, making)
    if rows is None:
        with _alone(folder, name):
            rows = opened(entry, making)
            if rows is None:
                make.on_disk(folder, name, identity)
                rows = opened(entry, making)
    if rows is None:
        raise OSError(f"the data cache {entry} cannot be read although it was just written: {REMEDY}")
    return _checked(rows, source, skip_malformed)


def _checked(rows: TokenizedRows, source: str | Path, skip_malformed: bool) -> TokenizedRows:
    """The rows, unless there are malformed ones that are not to be skipped, or none at all."""
    if rows.unread and not skip_malformed:
        raise RowError(f"{rows.first_unread}. {SKIP}")
    if not len(rows):
        raise ValueError(no_rows(source, rows.unread, rows.first_unread))
    return rows


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """While no other process of this machine makes the entry; of all machines, where the file system has locks."""
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        lock.acquire()
    except NotImplementedError:  # the entry is given its name as a whole, so no harm is done
        logger.warning("%s is on a file system without locks: every process that finds no ids makes them", folder)
    except OSError as error:
        raise OSError(f"the data cache {folder} cannot be written to: {error}. Remedy: {REMEDY}") from error
    try:
        yield
    finally:
        lock.release()
