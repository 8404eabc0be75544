"""Published scores, percent, copied from the authors' tables: not measured here.

Sampling: T = 1, top-p 0.95, top-k 50, thinking on, up to 32k tokens. Figures exist for these 14 benchmarks; a 15th is spoken of without one.
"""

COLUMNS = ("I-DLM-8B", "Qwen3-8B", "LLaDA-2.1-mini", "SDAR-8B", "I-DLM-32B", "Qwen3-32B")

_ = None
_FIGURES: dict[str, tuple[float | None, ...]] = {
    "ARC-C": (95.8, 95.8, 90.2, 91.9, _, _),
    "MMLU": (82.4, 83.5, 74.5, 78.6, 86.8, 87.2),
    "MMLU-Pro": (73.1, 75.1, 64.8, 56.9, 79.7, 80.1),
    "GPQA-D": (55.6, 58.9, 46.0, 40.2, _, _),
    "GPQA": (54.9, 55.4, 53.3, _, 58.7, 65.0),
    "GSM8K": (95.0, 96.0, 89.0, 91.7, _, _),
    "MATH-500": (96.8, 95.8, 85.0, 78.6, 97.6, 97.8),
    "MathBench": (89.1, 93.1, 84.2, 76.9, _, _),
    "AIME-24": (69.6, 73.1, 43.3, 10.0, 83.3, 76.7),
    "AIME-25": (60.8, 65.4, 43.3, 10.0, 80.0, 80.0),
    "HumanEval": (93.3, 95.1, 86.0, 78.7, 96.3, 96.3),
    "MBPP": (92.2, 93.4, 82.1, 72.0, _, _),
    "LiveCodeBench-v6": (45.7, 50.3, 30.4, 16.6, 57.1, 58.3),
    "IFEval": (84.7, 84.7, 83.2, 61.4, 84.7, 84.5),
}

BENCHMARKS = tuple(_FIGURES)


def figure(benchmark: str, column: str) -> float | None:
    """The published score in percent, or None where none is."""
    return _FIGURES.get(benchmark, (None,) * len(COLUMNS))[COLUMNS.index(column)]
