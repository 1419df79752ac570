"""Runs a recipe and measures the time of its phases; used by `end_to_end`.

    python -m benchmarks.phases experiments/baseline.py --data.root DIR --workdir RUN

The last printed line is JSON: the seconds of each phase, the seconds of compilation within the
phases, and for each epoch the time at which its line was written, in seconds since 1970, with the
seconds of compilation before it.
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
from cnnjax.run import opening, result, training  # noqa: E402
from cnnjax.run.checkpoint import Checkpoints  # noqa: E402
from cnnjax.run.workdir import append_line  # noqa: E402


class Phases:
    """Measures the seconds of each phase by wrapping functions of cnnjax."""

    def __init__(self) -> None:
        self.seconds = {"import": time.perf_counter() - _START}
        self.compiling = 0.0
        self.lines: list[tuple[float, float]] = []
        # For each running function, the seconds spent in watched functions that it has called.
        self._within: list[float] = []

    def watch(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function wrapped: its time counts to a phase, except that of inner phases."""

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
        """Wraps functions of a module, or methods of a class."""
        for name in names:
            setattr(owner, name, self.watch(phase, getattr(owner, name)))

    def watch_first(self, phase: str, step: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the step; its first call blocks until it is done, and counts to a phase."""
        first = self.watch(phase, lambda *x: jax.block_until_ready(step(*x)))
        calls = iter([first])
        return lambda *x: next(calls, step)(*x)

    def compiled(self, event: str, duration_secs: float, **_: Any) -> None:
        """Adds the duration of JAX's compilation events."""
        if "/compile/" in event:
            self.compiling += duration_secs


def main() -> None:
    """Runs the recipe in the first argument with the other arguments."""
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

    vars(train).update(compile_steps=steps, make_logits=logits)
    vars(result).update(make_logits=logits)
    vars(training).update(append_line=line)
    phases.watch_all("index and decode", opening, "training_data")
    phases.watch_all("train", train, "take_epoch")
    phases.watch_all("checkpoints", Checkpoints, "__init__", "save", "close")
    phases.watch_all("evaluate", train, "conclude")
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
