"""One contender in a process of its own.

    python -m experiments.benchmark.serve JOB

Answers requests from standard input, one JSON object per line: `numbers` writes the numbers that must agree between
contenders, `time` runs the work, `labels` runs it once and writes its label maps, `settle` ends the preparation, and
`memory` returns the peak. `race.py` is the other end.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmark.contender import Contender, Job

# The module and class of each contender, imported on demand because each needs its own framework.
CONTENDERS = {
    "jax": "with_jax.Jax",
    "jax-plain": "with_jax.JaxPlain",
    "jax-neuronet": "with_jax.JaxNeuronet",
    "torch-eager": "with_torch.Torch",
    "torch-compile": "with_torch.TorchCompile",
    "tensorflow": "with_tensorflow.TensorFlow",
    "dipy": "with_dipy.Dipy",
}


def make(job: Job) -> Contender:
    module, name = CONTENDERS[job.contender].split(".")
    return getattr(importlib.import_module(f"experiments.benchmark.{module}"), name)(job)


def serve(job: Job, requests: Any, answers: Any) -> None:
    """Answers requests until they end. An exception ends it too, after an answer `{"error": …}`."""
    try:
        contender = make(job)
        work: Callable[[], Any] | None = None
        for line in requests:
            request = json.loads(line)
            if request["do"] == "numbers":
                numbers = contender.numbers()
                if numbers is not None:
                    np.savez(request["path"], allow_pickle=False, **numbers)
                answer: dict[str, Any] = {"compared": numbers is not None}
            elif request["do"] == "time":
                work = work or contender.prepare()
                begun = time.perf_counter()
                for _ in range(request["times"]):
                    work()
                answer = {"seconds": (time.perf_counter() - begun) / request["times"]}
            elif request["do"] == "labels":
                work = work or contender.prepare()
                maps = contender.label_maps(work())
                if maps is not None:
                    np.savez(request["path"], allow_pickle=False, **maps)
                answer = {"compared": maps is not None}
            elif request["do"] == "settle":
                contender.settle()
                answer = {}
            else:
                answer = {"memory": contender.memory(), "about": contender.about()}
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}), file=answers, flush=True)


def main() -> None:
    # Libraries print to standard output, which must carry the answers only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Job(**json.loads(sys.argv[1])), sys.stdin, answers)


if __name__ == "__main__":
    main()
