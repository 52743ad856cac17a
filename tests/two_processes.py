"""One of two processes that run scripts as `torchrun --nproc_per_node 2` would: one start, script after script.

`python two_processes.py RANK PORT SCRIPT [PORT SCRIPT ...]`: what a script prints follows a line with its name.
"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    # What a script made is kept, and the process ends without tidying up. Where DDP's reducer is the last that holds a
    # gloo group, destroying it waits, with Python's lock in hand, for a thread of gloo that may wait for that lock.
    kept = []
    rank, rest = sys.argv[1], sys.argv[2:]
    for port, script in zip(rest[::2], rest[1::2], strict=True):
        os.environ |= {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "docs",
        }
        sys.path[0] = os.getcwd()
        print(f"### {script}", flush=True)
        kept.append(runpy.run_path(script, run_name="__main__"))
    sys.stdout.flush()
    os._exit(0)
