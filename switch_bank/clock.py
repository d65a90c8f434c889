"""The training clock: what of a run counts as training time."""

import time

import torch


class TrainingClock:
    """Seconds of training; runs between `start` and `stop`, each of which waits for the device.

    It counts by time.perf_counter, which never goes back and which setting the machine's clock does not move.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self.device, self.passed = device, seconds
        self.since: float | None = None

    def start(self) -> None:
        self._wait()
        self.since = time.perf_counter()

    def stop(self) -> None:
        self._wait()
        self.passed, self.since = self.seconds, None

    @property
    def seconds(self) -> float:
        """The reading now; waits for nothing."""
        return self.passed + (time.perf_counter() - self.since if self.since is not None else 0.0)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
