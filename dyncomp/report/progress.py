"""Progress of long work: a bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressReporter:
    """Call it with (stage, done, total); use it as a context manager. Writes to standard error, or into a notebook's cell.

    Args:
        every: seconds between two plain lines of one stage.
    """

    def __init__(self, *, every: float = 10.0) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._every = every
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._printed: dict[str, float] = {}

    def __enter__(self) -> ProgressReporter:
        if self.console.is_terminal or _has_widgets(self.console):
            columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.refresh()  # a notebook's cell would keep what was drawn last
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total)
            self._bar.update(self._tasks[stage], completed=done, total=total)
            return
        now = time.monotonic()
        start = self._started.setdefault(stage, now)
        if done >= total:
            if self._printed.get(stage) != float("inf"):
                print(f"{stage}: done in {now - start:.0f} s", file=sys.stderr, flush=True)
            self._printed[stage] = float("inf")
        elif now - self._printed.setdefault(stage, now) > self._every:
            self._printed[stage] = now
            left = (now - start) / max(done, 1) * (total - done)
            print(f"{stage}: {done}/{total}, about {left:.0f} s left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line between the bars."""
        self.console.print(text, markup=False)


def _has_widgets(console: Console) -> bool:
    """Whether rich can redraw a bar in the cell of a notebook; without widgets it could only warn."""
    return console.is_jupyter and all(importlib.util.find_spec(name) is not None for name in ("IPython", "ipywidgets"))
