"""A process that trains one run for processes.py: `python worker.py '<the run as JSON>'`.

stdin   a line is the reason to stop for; its end means that who asked for this run is gone
stdout  what came of the run, as one line of JSON: {"finished": sha256 of the weights}, {"stopped": reason,
        "step", "total_steps", "unsaved"} or {"failed": class of the error, "message"}; nothing after a crash
stderr  plain lines for people
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any


def main(run: dict[str, Any]) -> None:
    """Train a run: `recipe`, `seed`, `run_dir`, `epochs`, `weights`, `device`, `threads` and `seconds_left`."""
    deadline = None if run["seconds_left"] is None else time.monotonic() + run["seconds_left"]
    # a terminal sends Ctrl-C to every process in front, and who asked for this run passes it on
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reasons: list[str] = []
    threading.Thread(target=_listen, args=(reasons,), daemon=True).start()
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is for people

    import torch

    from cnvzoo.errors import in_a_line
    from cnvzoo.training.recipe import Recipe
    from cnvzoo.training.run import run_recipe
    from cnvzoo.training.state import RunInterrupted

    torch.set_num_threads(run["threads"])
    try:
        record = run_recipe(
            Recipe.model_validate_json(json.dumps(run["recipe"])),
            run_dir=run["run_dir"],
            seed=run["seed"],
            device=run["device"],
            epochs=run["epochs"],
            deadline=deadline,
            stop=lambda: next(iter(reasons), None),
            **run["weights"],
        )
        outcome = {"finished": record.weights_sha256}
    except RunInterrupted as stop:
        outcome = {"stopped": stop.reason, "step": stop.step, "total_steps": stop.total_steps, "unsaved": stop.unsaved}
    except Exception as error:  # whatever it is, this run alone has failed
        outcome = {"failed": type(error).__name__, "message": in_a_line(error)}
    print(json.dumps(outcome), file=report, flush=True)


def _listen(reasons: list[str]) -> None:
    """Note what stdin says. os.read, because a thread that waits in sys.stdin would hold up the end of the process."""
    while said := os.read(0, 100):
        reasons.append(said.decode().strip())
    if reasons:
        os._exit(1)  # told to stop, and then abandoned: killed
    reasons.append("SIGTERM")


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file, whose neighbours are not for everyone to import
    main(json.loads(sys.argv[1]))
