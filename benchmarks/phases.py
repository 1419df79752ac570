"""Runs a recipe and tells how long each of its phases took; a part of `end_to_end`.

    python -m benchmarks.phases experiments/baseline.py --data.root DIR --workdir RUN

The last line printed is JSON: seconds by phase, seconds of compiling within them, and for each
epoch's line when it was written, in seconds since 1970, and the seconds of compiling before it.
"""

import time

_START = time.perf_counter()

import importlib  # noqa: E402
import json  # noqa: E402
import runpy  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402

from cnnjax import train  # noqa: E402
from cnnjax.logits import make_logits  # noqa: E402
from cnnjax.run.checkpoint import Checkpoints  # noqa: E402
from cnnjax.run.workdir import append_line  # noqa: E402


class Phases:
    """Seconds by phase, of functions of cnnjax put under a watch."""

    def __init__(self) -> None:
        self.seconds = {"import": time.perf_counter() - _START}
        self.compiling = 0.0
        self.lines: list[tuple[float, float]] = []
        self._within: list[float] = []  # seconds of what each running function has called

    def watch(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function, with its time counted to a phase, that of phases in it left out."""

        def watched(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            self._within.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                took = time.perf_counter() - start
                own = took - self._within.pop()
                self.seconds[phase] = self.seconds.get(phase, 0.0) + own
                if self._within:
                    self._within[-1] += took

        return watched

    def watch_all(self, phase: str, owner: Any, *names: str) -> None:
        """Puts functions of a module, or methods of a class, under a watch."""
        for name in names:
            setattr(owner, name, self.watch(phase, getattr(owner, name)))

    def watch_first(self, phase: str, step: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the step, whose first call is waited for and counted to a phase."""
        first = self.watch(phase, lambda *x: jax.block_until_ready(step(*x)))
        calls = iter([first])
        return lambda *x: next(calls, step)(*x)

    def compiled(self, event: str, duration_secs: float, **_: Any) -> None:
        """Listens to JAX."""
        if "/compile/" in event:
            self.compiling += duration_secs


def main() -> None:
    """Runs the recipe named by the first argument with the others."""
    phases = Phases()
    jax.monitoring.register_event_duration_secs_listener(phases.compiled)
    compile_steps = train.compile_steps

    def steps(*arguments: Any) -> train.Steps:
        one, many, together = compile_steps(*arguments)
        first = "compile and first steps"
        return train.Steps(
            phases.watch_first(first, one), phases.watch_first(first, many), together
        )

    def line(path: Any, values: Any) -> None:
        append_line(path, values)
        if path.name == "metrics.jsonl":
            phases.lines.append((time.time(), phases.compiling))

    def logits(*arguments: Any) -> Any:
        return phases.watch("validate", make_logits(*arguments))

    vars(train).update(compile_steps=steps, append_line=line, make_logits=logits)
    phases.watch_all("index and decode", train, "training_data")
    phases.watch_all("train", train, "take_epoch")
    phases.watch_all("checkpoints", Checkpoints, "__init__", "save", "close")
    phases.watch_all("evaluate", train.Run, "conclude")
    report = phases.watch("report", importlib.import_module)("cnnjax.report")
    phases.watch_all("report", report, "write")
    recipe, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    try:
        runpy.run_path(recipe, run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise
    told = {"phases": phases.seconds, "compiling": phases.compiling, "lines": phases.lines}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
