"""Training and held-out dialogues of the embedded checkpoint: text that this package makes itself, from a seed.

Print some with `python -m idlm_sglang.demo.corpus`; with `--jsonl` they are data for `idlm convert`, with `--questions` requests for `idlm bench --prompts`.
"""

import argparse
import json
import random
from dataclasses import dataclass
from typing import Callable, Iterator

from idlm_sglang.demo import arithmetic, copying, knowledge
from idlm_sglang.demo.split import TRAIN, VALUES, WORDING, Draw

Turns = list[tuple[str, str]]  # (question, answer), in order


@dataclass(frozen=True)
class Family:
    """A kind of dialogue: its share of the training text (relative) and the ways in which a held-out one can be new."""
    make: Callable[[Draw], Turns]
    weight: float
    sides: tuple[str, ...] = (VALUES, WORDING)

    @property
    def name(self) -> str:
        return self.make.__name__


@dataclass(frozen=True)
class Dialogue:
    """One conversation: its family, the side of the split it was drawn on, an optional system prompt, and its turns."""
    family: str
    side: str
    system: str | None
    turns: Turns

    def question(self) -> list[dict[str, str]]:
        """The first question in the OpenAI message format, with the system prompt and without the answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.turns[0][0]}]

    def messages(self) -> list[dict[str, str]]:
        """The conversation in the OpenAI message format, answers included."""
        result = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.turns:
            result += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return result


FAMILIES = [
    Family(knowledge.project, 24, (WORDING,)),
    Family(arithmetic.addition, 9), Family(arithmetic.subtraction, 5.5), Family(arithmetic.multiplication, 2.5, (WORDING,)), Family(arithmetic.word_problem, 4),
    Family(arithmetic.counting, 5), Family(arithmetic.multiples, 1.5), Family(arithmetic.sort_numbers, 3), Family(arithmetic.comparison, 2.5),
    Family(arithmetic.parity, 1), Family(arithmetic.neighbours, 1.5), Family(arithmetic.units, 1.5), Family(arithmetic.number_words, 1),
    Family(copying.greeting, 3), Family(copying.repeat, 5), Family(copying.say_times, 2), Family(copying.whereabouts, 3), Family(copying.friends, 3),
    Family(copying.spelling, 3.5), Family(copying.first_letter, 1), Family(copying.json_answer, 3), Family(copying.json_list, 2), Family(copying.bullet_list, 2.5),
    Family(copying.reverse_list, 2), Family(copying.alphabetical, 2), Family(copying.note, 2.5), Family(copying.python_function, 2),
    Family(copying.remembered_name, 2), Family(copying.story, 3),
    Family(knowledge.small_talk, 2, (WORDING,)), Family(knowledge.unknown, 2.5),
    Family(knowledge.calendar, 2, (WORDING,)), Family(knowledge.all_names, 0.5, (WORDING,)), Family(knowledge.capital, 1.5, (WORDING,)),
    Family(knowledge.opposite, 1.5, (WORDING,)), Family(knowledge.colour, 1, (WORDING,)), Family(knowledge.sound, 0.7, (WORDING,)),
    Family(knowledge.some_of, 2, (WORDING,)), Family(knowledge.definition, 2.5, (WORDING,)), Family(knowledge.how_to, 3, (WORDING,)), Family(knowledge.poem, 1.5, (WORDING,)),
]

_SYSTEM = ["You are a helpful assistant.", "You are a friendly assistant.", "Answer in short sentences.", "You are a helpful AI assistant.", "Be brief and polite."]
OPENINGS = ["Please tell me: ", "Hi! ", "Hello. ", "A question: ", "Quick question: ", "Now another one. ", "OK, ", "Can you help me? ", "I am new here. "]


def _roughen(d: Draw, question: str) -> str:
    """Some variation that does not change the meaning: an opening, no capital, no final stop."""
    if d.chance(0.2):
        question = d.pick(OPENINGS) + question
    if d.chance(0.1) and question[-1] in ".?!":
        question = question[:-1]
    if d.chance(0.1) and question[1:2].islower() and " " in question:
        question = question[0].lower() + question[1:]
    return question


def dialogue(rng: random.Random, side: str, family: Family | None = None) -> Dialogue:
    """One dialogue drawn on `side` (TRAIN, VALUES or WORDING), of a random family unless one is given."""
    d = Draw(rng, side)
    allowed = [f for f in FAMILIES if side == TRAIN or side in f.sides]
    weights = [f.weight for f in allowed]
    count = 1 if family or d.chance(0.85) else d.number(2, 3)
    turns: Turns = []
    for _ in range(count):
        chosen = family or rng.choices(allowed, weights)[0]
        made = chosen.make(d)
        turns += [(_roughen(d, q) if side == TRAIN else q, a) for q, a in made]
    system = d.pick(_SYSTEM) if d.chance(0.15) else None
    return Dialogue(chosen.name, side, system, turns)


def training_dialogues(seed: int) -> Iterator[Dialogue]:
    """Endless training dialogues, the same for the same seed."""
    rng = random.Random(f"train-{seed}")
    while True:
        yield dialogue(rng, TRAIN)


def held_out_dialogues(seed: int, count: int, families: list[str] | None = None, side: str | None = None) -> list[Dialogue]:
    """`count` dialogues of one family each whose questions, taken together, never occur in training.

    families: names to choose from (all by default, by weight). side: VALUES or WORDING (by default both in turn).
    """
    rng = random.Random(f"held-out-{seed}")
    chosen = [f for f in FAMILIES if families is None or f.name in families]
    sides = [s for s in (VALUES, WORDING) if s == (side or s) and any(s in f.sides for f in chosen)]
    if not sides:
        raise ValueError(f"no held-out dialogues for families {families}, side {side}: known families are {', '.join(f.name for f in FAMILIES)}")
    result = []
    for i in range(count):
        wanted = sides[i % len(sides)]
        allowed = [f for f in chosen if wanted in f.sides]
        family = rng.choices(allowed, [f.weight for f in allowed])[0]
        result.append(dialogue(rng, wanted, family))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Print dialogues of the embedded checkpoint's training text.")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="print dialogues that are kept out of training")
    parser.add_argument("--family", action="append", choices=[f.name for f in FAMILIES], metavar="NAME", help="held-out dialogues of this kind alone; may be given more than once")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--jsonl", action="store_true", help="in the OpenAI message format, one to a line")
    shape.add_argument("--questions", action="store_true", help="the same without the answers: each first question once")
    args = parser.parse_args()
    if args.family and not args.held_out:
        parser.error("--family needs --held-out: training text holds all of them")
    stream = training_dialogues(args.seed)
    shown = held_out_dialogues(args.seed, args.count, args.family) if args.held_out else [next(stream) for _ in range(args.count)]
    if args.questions:
        for line in dict.fromkeys(json.dumps({"messages": item.question()}) for item in shown):
            print(line)
        return
    for item in shown:
        if args.jsonl:
            print(json.dumps({"messages": item.messages()}))
            continue
        print(f"[{item.family}, {item.side}]" + (f" system: {item.system}" if item.system else ""))
        for question, answer in item.turns:
            print(f"  Q: {question}\n  A: {answer}")


if __name__ == "__main__":
    main()
