"""The process that verifies configurations: jobs come on standard input, kills and verdicts go to standard output.

One JSON object a line. It imports everything, starts no thread and forks the runs; it ends when its input does.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from lumina.verify import moments
from lumina.verify.kills import Job, Ordeal


def main() -> None:
    """Works until there are no more jobs."""
    torch.set_num_threads(1)
    moments.resolve()
    for line in sys.stdin:
        job = Job(**json.loads(line))

        def tell(event: dict[str, Any], name: str = job.name) -> None:
            print(json.dumps({"configuration": name, **event}), flush=True)

        tell(Ordeal(job, tell).verdict())
