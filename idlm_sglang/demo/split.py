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

_FUNCTION_WORDS = ("a the is are what which how do does can could would you i me my your it this that to of in on for with by from at as and or if so "
                   "there here some any all we they will may must have has had get give tell show say know want need like be was about please now then").split()
_SYNONYMS = {
    "Sort": ["Order", "Arrange", "Rank"], "Put": ["Bring", "Arrange", "Place"], "List": ["Name", "Show", "Enumerate", "Give"], "Write": ["Draft", "Compose", "Type", "Put"],
    "Make": ["Build", "Create", "Prepare", "Turn"], "Tell": ["Give", "Show", "Teach"], "Repeat": ["Type", "Echo", "Say again"], "Say": ["Type", "Read", "Speak"],
    "Copy": ["Type", "Write", "Reproduce"], "Compute": ["Find", "Work out", "Determine"], "Calculate": ["Work out", "Find"], "larger": ["bigger", "greater"],
    "smaller": ["lesser"], "Convert": ["Change", "Turn", "Express"], "Spell": ["Letters of", "Spell out"], "explain": ["describe", "define", "introduce"],
    "Explain": ["Describe", "Teach me"], "Define": ["Describe", "Explain"], "Name": ["Give", "List"], "works": ["behaves"], "follows": ["is after"], "allowed": ["possible"],
    "supported": ["possible"], "buys": ["finds", "gets"], "gets": ["finds", "wins"], "loses": ["sells", "drops"], "has": ["owns", "holds"],
    "Number": ["Enumerate", "Count"], "Reverse": ["Turn around", "Flip"], "story": ["tale", "adventure"], "poem": ["verse", "rhyme"], "sound": ["noise"],
    "Give": ["Tell", "Show"], "start": ["begin", "launch"], "install": ["set up"], "mean": ["stand for"], "run": ["use", "start"], "use": ["run", "try"],
}
_LEADS = ("Could you|Can you|Would you|I want to know|I would like to hear|I would like to know|Can you tell me|Could you tell me|Tell me|Let me know|Please|Would you please|"
          "My question is|I wonder|Do you know|Help me|For my homework|One more thing|Explain to me|I need|I need to know|Give me|Show me|So|Well|Then|And|Also|In one sentence|"
          "Remember|Next|Say|I have a task:|Here is a task:|Exactly:|Do you remember|Just|Work on this:").split("|")
_TAILS = "please|for me|now|if you can|then|in short|to me|here|again|once|in one sentence|exactly|for this project|with it|today".split("|")


def is_held_out(kind: str, value: Any) -> bool:
    """True when `value` of this kind (a name, a pair of operands, ...) never occurs in training prompts."""
    return zlib.crc32(f"{kind}:{value}".encode()) % HELD_OUT_SHARE == 0


def _letters(template: str) -> str:
    """A template without the marks and capitals that do not make it another sentence."""
    return " ".join(template.lower().translate(str.maketrans("", "", "~.,:;?!")).split())


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
        """A template of this side: one that starts with "~" exactly when the wording has to be new. In training it is often rephrased."""
        wanted = [t for t in templates if t.startswith("~") == (self.side == WORDING)]
        chosen = self.pick(wanted).removeprefix("~")
        if self.side == TRAIN and self.chance(0.6):
            rephrased = self._rephrase(chosen)
            if _letters(rephrased) not in [_letters(t) for t in templates if t.startswith("~")]:
                return rephrased
        return chosen

    def _rephrase(self, template: str) -> str:
        """Other words around the same key words: with few fixed sentences the model would know those and no others."""
        words = []
        original = template.split(" ")
        for word, following in zip(original, [*original[1:], "{"]):
            bare = word.strip(".,:?!")
            if bare.lower() in _FUNCTION_WORDS and self.chance(0.25):
                if self.chance(0.5):
                    words.append(self.pick(_FUNCTION_WORDS) + word[len(bare):])
            elif bare in _SYNONYMS and self.chance(0.5):
                words.append(word.replace(bare, self.pick(_SYNONYMS[bare])))
            else:
                words.append(word)
            if "{" not in word + following and self.chance(0.05):  # never beside a slot: the value must stay clear
                words.append(self.pick(_FUNCTION_WORDS) if self.chance(0.7) else self._made_up_name().lower())
        text = " ".join(words) or template
        if self.chance(0.4):
            text = f"{self.pick(_LEADS)} {text[0].lower() + text[1:] if text[1:2].islower() else text}"
        if self.chance(0.2) and text[-1] in ".?":
            text = f"{text[:-1]} {self.pick(_TAILS)}{text[-1]}"
        return text

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
