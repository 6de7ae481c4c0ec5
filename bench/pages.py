"""Pages of results: what was measured, where and with what, and the page itself in its folder."""

from __future__ import annotations

import datetime
import shlex
import sys
import time
from pathlib import Path

import torch
import transformers
from run_all import commit, cpu_model


class Facts:
    """What stands above every table. Made before the measurement: it notes the time and the commit."""

    def __init__(self) -> None:
        self._begin, self._commit = time.monotonic(), commit()

    def lines(self, script: str, **facts: object) -> str:
        """Return the facts line by line, those of the script between the ones that all pages have."""
        threads = torch.get_num_threads()
        processor = f"{threads} thread{'s' if threads > 1 else ''} of {cpu_model()}"
        about = {
            "command": shlex.join(["python", f"bench/{Path(script).name}", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "commit": self._commit,
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
            **facts,
            "took": f"{time.monotonic() - self._begin:.0f} s on {processor}",
        }
        return "\n".join(f"* {key}: {value}" for key, value in about.items())


def keep(text: str, script: str, folder: Path) -> None:
    """Print a page and write it beside the other results, under the name of its script."""
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{Path(script).stem}.md").write_text(text)
