"""One process, or several that ``accelerate launch`` has started."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import Any

from csp_ext.demo.console import UserError, require


class Processes:
    """Which of how many processes this is, and how they wait for each other.

    Attributes
    ----------
    rank, count : int
        The first has rank 0.
    local_rank : int
        Which on this machine, and so which GPU.
    """

    def __init__(self) -> None:
        self.rank, self.count, self.local_rank = 0, 1, 0
        self._state: Any = None

    @classmethod
    def launched(cls, cpu: bool) -> Processes:
        """Join the processes that a launcher has started; alone without one.

        Parameters
        ----------
        cpu : bool
            Whether they leave the GPUs alone.
        """
        result = cls()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            require("eval", "accelerate")
            from accelerate import PartialState

            state = result._state = PartialState(cpu=cpu)
            # gloo's threads must end before the interpreter does, or it aborts the process.
            atexit.register(state.destroy_process_group)
            result.rank, result.count = state.process_index, state.num_processes
            result.local_rank = state.local_process_index
        return result

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def first(self, action: Callable[[], None]) -> None:
        """Have the first process do something while the others wait; they leave if it fails.

        Raises
        ------
        UserError
            In the first process, where `action` raises it.
        SystemExit
            In the others, which say nothing.
        """
        failure: UserError | None = None
        if self.rank == 0:
            try:
                action()
            except UserError as error:
                failure = error
        failed = [failure is not None]
        if self._state is not None:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(failed)
        if failure is not None:
            raise failure
        if failed[0]:
            raise SystemExit(2)
