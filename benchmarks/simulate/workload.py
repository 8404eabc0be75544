"""What is asked of a server: prompts, and answers of random length."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Workload:
    """Prompts of ``prompt`` tokens; answers log-normal with mean ``answer`` tokens and coefficient of variation ``spread``."""

    prompt: int
    answer: float
    spread: float

    @classmethod
    def of_context(cls, context: float, prompt: int = 100, spread: float = 0.7) -> "Workload":
        """The one whose running requests have ``context`` tokens in their cache on average.

        A slot of a busy server holds long answers longer: mean age of a running answer = answer (1 + spread^2) / 2.
        """
        return cls(prompt, max(2.0, 2 * (context - prompt) / (1 + spread**2)), spread)

    @property
    def context(self) -> float:
        """Mean tokens in a running request's cache."""
        return self.prompt + self.answer * (1 + self.spread**2) / 2

    def lengths(self, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Answer lengths in tokens, at least 1."""
        variance = np.log(1 + self.spread**2)
        drawn = random.lognormal(np.log(self.answer) - variance / 2, np.sqrt(variance), shape)
        return np.maximum(1, np.rint(drawn)).astype(np.int64)

    def running(self, random: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(length, age) of the answers found in the slots of a server that has been busy for long.

        An answer is met in proportion to its length (log-normal: the logarithm's mean grows by its variance), anywhere in it.
        """
        variance = np.log(1 + self.spread**2)
        drawn = random.lognormal(np.log(self.answer) + variance / 2, np.sqrt(variance), shape)
        length = np.maximum(1, np.rint(drawn)).astype(np.int64)
        return length, np.floor(random.random(shape) * length).astype(np.int64)
