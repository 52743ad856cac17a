"""What a launcher starts: `selective-pref train`, whose second process dies in its second step of two batches."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from selective_pref_adapters.cli import main
from selective_pref_adapters.deepspeed_loop import loop

step_engine = loop.step_engine
calls = 0


def dying(engine: Any) -> float:
    """Like an out-of-memory killer: no exception, no good-bye."""
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step_engine(engine)


if __name__ == "__main__":
    loop.step_engine = dying
    sys.exit(main(sys.argv[1:]))
