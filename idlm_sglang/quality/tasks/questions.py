"""Questions that the embedded checkpoint was trained to answer and never saw: data sets of the demo tasks."""

import re

import datasets

from idlm_sglang.demo import corpus

_SEED = 41
_COUNT = 130  # questions per task: enough for a margin of 3 points where no score differs


def sums(**_) -> dict[str, datasets.Dataset]:
    """Sums and differences; the answer is the last number."""
    return _questions(["addition", "subtraction", "word_problem", "units"], lambda answer: re.findall(r"-?\d+", answer)[-1])


def words(**_) -> dict[str, datasets.Dataset]:
    """Copying made-up names into sentences and JSON; the answer is the whole text."""
    return _questions(["greeting", "repeat", "whereabouts", "json_answer", "json_list", "bullet_list"])


def facts(**_) -> dict[str, datasets.Dataset]:
    """Small facts; the answer is the whole text."""
    return _questions(["multiples", "parity", "neighbours", "number_words", "capital", "opposite", "colour", "calendar"])


def _questions(families: list[str], answer=lambda text: text) -> dict[str, datasets.Dataset]:
    """Single-turn dialogues without a system prompt, no question twice."""
    found: dict[str, str] = {}
    for dialogue in corpus.held_out_dialogues(_SEED, 8 * _COUNT, families):
        if len(dialogue.turns) == 1 and not dialogue.system and len(found) < _COUNT:
            question, said = dialogue.turns[0]
            found.setdefault(question, answer(said))
    return {"test": datasets.Dataset.from_list([{"question": q, "answer": a} for q, a in found.items()])}
