"""The line between training prompts and held-out prompts, and the random draws that respect it.

A held-out prompt is new in one of two ways:
- "values": known wording, but its names or numbers never occur in training (decided by a hash of the value);
- "wording": known question, but a sentence that never occurs in training (templates that start with "~").
"""

import random
import zlib
from typing import Any, Callable, Sequence

TRAIN, VALUES, WORDING = "train", "values", "wording"
HELD_OUT_SHARE = 10  # one value in ten is kept out of training

_ONSETS = "b d f g h j k l m n p r s t v w z br dr gr kr tr st sh ch".split()
_VOWELS = "a e i o u".split()
_CODAS = "n r l s k m t".split()
_COMMON_NAMES = "Anna Ben Carla David Emma Felix Grace Hugo Ida Jonas Lena Mia Noah Olga Paul Rosa Sam Tom".split()


def is_held_out(kind: str, value: Any) -> bool:
    """True when `value` of this kind (a name, a pair of operands, ...) never occurs in training prompts."""
    return zlib.crc32(f"{kind}:{value}".encode()) % HELD_OUT_SHARE == 0


class Draw:
    """Random choices for one dialogue on one side of the split (`side` is TRAIN, VALUES or WORDING)."""

    def __init__(self, rng: random.Random, side: str):
        self.rng = rng
        self.side = side

    def pick(self, options: Sequence[Any]) -> Any:
        """One option, on whichever side."""
        return options[self.rng.randrange(len(options))]

    def number(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return self.rng.randint(low, high)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def wording(self, templates: Sequence[str]) -> str:
        """A template of this side: one that starts with "~" exactly when the wording has to be new."""
        wanted = [t for t in templates if t.startswith("~") == (self.side == WORDING)]
        return self.pick(wanted).removeprefix("~")

    def value(self, kind: str, make: Callable[[], Any]) -> Any:
        """`make()` drawn again until it lies on this side of the split."""
        while True:
            value = make()
            if is_held_out(kind, value) == (self.side == VALUES):
                return value

    def name(self) -> str:
        """A capitalised made-up name; in training now and then a common one."""
        if self.side != VALUES and self.chance(0.15):
            return self.value("name", lambda: self.pick(_COMMON_NAMES))
        return self.value("name", self._made_up_name)

    def _made_up_name(self) -> str:
        syllables = [self.pick(_ONSETS) + self.pick(_VOWELS) for _ in range(2 if self.chance(0.6) else 3)]
        return ("".join(syllables) + (self.pick(_CODAS) if self.chance(0.5) else "")).capitalize()

    def operands(self, high: int) -> tuple[int, int]:
        """Two integers in [0, high]; a pair is held out for every operation and in both orders."""
        def make() -> tuple[int, int]:
            return self.number(0, high), self.number(0, high)
        while True:
            a, b = make()
            if is_held_out("pair", (min(a, b), max(a, b))) == (self.side == VALUES):
                return a, b
