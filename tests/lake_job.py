"""What a machine does with a lake, run with the Python that has DuckDB's extensions for it.

    python lake_job.py fold FOLDER [times]     fold until nothing is left, or for ever
    python lake_job.py ask FOLDER QUERY        print the rows of a query as JSON

`AGENTKIT_LOG_URL` names the lake.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from agentkit_tracking.runlog import RunLog


def main(job: str, folder: str, argument: str = "") -> None:
    log = RunLog(Path(folder))
    if job == "ask":
        print(json.dumps(log.sql(argument).rows(), default=str))
        return
    while True:
        folded = log.fold()
        print(json.dumps([folded and folded.events, folded and folded.busy]), flush=True)
        if argument == "once":
            return
        time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
