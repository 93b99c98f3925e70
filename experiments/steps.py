"""Programs that run others of this project, one after the other: each step is printed as a command, then runs."""

import shlex
from collections.abc import Callable, Sequence

from neuronet_jax.programs import NOT_FINITE, OUT_OF_MEMORY, PARTIAL, STALLED

STATUSES: dict[int, str] = dict.fromkeys(
    (PARTIAL, NOT_FINITE, OUT_OF_MEMORY, STALLED), "the status of the step that failed; see its --help"
)


def run_step(module: str, command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Prints the command and returns its status. `command` is the main function of `module`."""
    print(f"\n$ python -m {module} {shlex.join(arguments)}", flush=True)
    return command(arguments)
