"""The training text: the same for the same seed, and without any prompt of the held-out sets."""

import json
import re
from itertools import islice

from idlm_sglang.bench import prompts
from idlm_sglang.demo import corpus
from idlm_sglang.demo.arithmetic import add_steps, subtract_steps
from idlm_sglang.demo.corpus import FAMILIES, OPENINGS, held_out_dialogues, training_dialogues
from idlm_sglang.demo.split import VALUES, WORDING, is_held_out

TRAINED = 250_000  # more dialogues than the shipped checkpoint has seen


def _plain(text: str) -> str:
    """Only letters, digits and operators, so that case and punctuation cannot make two prompts different."""
    return re.sub(r"[^a-z0-9+*-]+", " ", text.lower()).strip()


def _prompt(turns: list[tuple[str, str]]) -> str:
    """All questions of a conversation, without the openings that training puts before some of them."""
    questions = [_plain(question) for question, _ in turns]
    for opening in map(_plain, OPENINGS):
        questions = [question.removeprefix(opening + " ") for question in questions]
    return " | ".join(questions)


def test_same_seed_gives_the_same_dialogues_and_another_seed_others():
    first, again, other = (list(islice(training_dialogues(seed), 300)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_no_held_out_question_occurs_in_training():
    trained = set()
    for item in islice(training_dialogues(0), TRAINED):
        trained |= {_prompt(item.turns[i:j]) for j in range(len(item.turns) + 1) for i in range(j)}
    for side in VALUES, WORDING:
        held = {_prompt(item.turns) for item in held_out_dialogues(1, 3000, side=side)}
        assert not held & trained, sorted(held & trained)[:5]
        print(f"{side}: {len(held)} different held-out questions, none of them among {len(trained)} training questions")


def test_no_held_out_pair_or_name_occurs_in_a_training_question():
    pairs = names = 0
    for item in islice(training_dialogues(0), TRAINED):
        for question, answer in item.turns:
            for a, b in re.findall(r"So (\d+) [+-] (\d+) =", answer):
                assert not is_held_out("pair", (min(int(a), int(b)), max(int(a), int(b)))), question
                pairs += 1
            for name in re.findall(r"Hello, (\w+)!", answer):
                assert not is_held_out("name", name), question
                names += 1
    print(f"{pairs} sums and {names} greeted names checked")
    assert pairs > 1000 and names > 1000


def test_held_out_values_are_held_out_operands():
    for item in held_out_dialogues(1, 200, ["addition"], VALUES):
        a, b = map(int, re.search(r"So (\d+) \+ (\d+)", item.turns[0][1]).groups())
        assert is_held_out("pair", (min(a, b), max(a, b)))


def test_every_family_gives_dialogues_on_each_of_its_sides():
    for family in FAMILIES:
        for side in family.sides:
            for item in held_out_dialogues(5, 5, [family.name], side):
                assert item.family == family.name and item.side == side
                assert all(question and answer and "~" not in question and "{n}" not in question for question, answer in item.turns)


def test_worked_sums_are_right():
    for a in range(100):
        for b in range(100):
            assert add_steps(a, b).endswith(f"= {a + b}.")
            if a >= b:
                assert subtract_steps(a, b).endswith(f"= {a - b}.") and "-0" not in subtract_steps(a, b)


def test_questions_of_a_kind_are_requests_for_a_comparison(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["corpus", "--held-out", "--family", "story", "--questions", "--count", "50"])
    corpus.main()
    file = tmp_path / "stories.jsonl"
    file.write_text(capsys.readouterr().out)
    asked = [request["messages"] for request in prompts.read(file)]
    stories = {json.dumps(d.question()): d for d in corpus.held_out_dialogues(0, 50, ["story"])}
    assert [json.dumps(messages) for messages in asked] == list(stories) and {d.family for d in stories.values()} == {"story"}
    assert all(messages[-1]["role"] == "user" and len(messages) <= 2 for messages in asked), "questions without their answers"
