"""What the processes of a server hold, over time, and whether it grows."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import psutil
from scipy import stats

MIB = 2**20
SETTLED = 0.4  # of the run's requests, before which caches still fill


@dataclass
class Series:
    """Samples of one process: seconds, requests answered so far, resident bytes, open files, threads."""

    rows: list[tuple[float, int, int, int, int]] = field(default_factory=list)

    def settled(self) -> np.ndarray:
        """``(samples, 5)``, those behind the first ``SETTLED`` of the requests."""
        rows = np.asarray(self.rows, float)
        return rows[rows[:, 1] >= SETTLED * rows[-1, 1]]

    def growth(self, column: int) -> tuple[float, float]:
        """Theil-Sen slope per 1,000 requests and the growth it makes over the settled part."""
        rows = self.settled()
        slope = float(stats.theilslopes(rows[:, column], rows[:, 1])[0])
        return 1000 * slope, slope * float(rows[-1, 1] - rows[0, 1])


RSS, FILES, THREADS = 2, 3, 4


class Watch:
    """Samples every ``every`` seconds until :meth:`end`."""

    def __init__(self, processes: dict[str, psutil.Process], answered: Callable[[], int], every: float):
        self.series = {role: Series() for role in processes}
        self._processes, self._answered, self._every = processes, answered, every
        self._began, self._done = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sample(self) -> None:
        """One row for each process."""
        for role, process in self._processes.items():
            row = (time.monotonic() - self._began, self._answered(), process.memory_info().rss, process.num_fds(), process.num_threads())
            self.series[role].rows.append(row)

    def end(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._every):
            try:
                self.sample()
            except psutil.Error:
                return
