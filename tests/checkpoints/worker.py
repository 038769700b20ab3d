"""A process that fetches and publishes: `python worker.py ENDPOINT CACHE`, then one JSON line for each task on stdin.

A task is {"do": "fetch", "name": ..., "files": {file: [sha256, size]}} or {"do": "publish", "folder": ..., "to": ...},
with "at", the time at which to begin. The answer is a JSON line: {"folder": ...}, {"commit": ...} or {"error": ...}.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from cnvzoo.checkpoints.format import FileFacts, StoreError
from cnvzoo.checkpoints.locations import open_store
from cnvzoo.checkpoints.retry import RetryPolicy


def perform(task: dict[str, Any], endpoint: str, cache: str) -> dict[str, str | None]:
    retry = RetryPolicy(tries=6, first_wait=0.02)
    store = open_store(task.get("to", "hf://zoo"), endpoint=endpoint, cache_dir=cache, retry=retry)
    time.sleep(max(0.0, task["at"] - time.time()))
    try:
        if task["do"] == "fetch":
            facts = {name: FileFacts(sha256=sha256, size=size) for name, (sha256, size) in task["files"].items()}
            return {"folder": str(store.fetch(task["name"], facts))}
        return {"commit": store.publish(Path(task["folder"]), message=task["folder"]).commit}
    except StoreError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        print(json.dumps(perform(json.loads(line), *sys.argv[1:])), flush=True)
