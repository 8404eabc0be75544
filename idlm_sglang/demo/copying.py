"""Dialogue families that carry names and words from the question to the answer."""

from idlm_sglang.demo.split import Draw

_WORDS = ("apple bread candle door eagle forest garden house island jacket kettle lamp mirror needle orange pencil queen river stone table "
          "umbrella violin window yellow zebra").split()
_GREETINGS = ["Hi", "Hello", "Hey", "Good morning", "Good evening"]
_CITIES_OF = ["lives in", "comes from", "was born in"]
_JOBS = ["baker", "teacher", "doctor", "farmer", "singer", "painter", "pilot", "nurse", "sailor", "gardener"]


def greeting(d: Draw):
    hello, name = d.pick(_GREETINGS), d.name()
    question = d.wording([hello + ", I am {n}.", hello + ", my name is {n}.", "My name is {n}.", "I am {n}, nice to meet you.", "You can call me {n}.", "{n} is my name.", "People call me {n}.",
                          "~" + hello + " there, people know me as {n}."])
    return [(question.format(n=name), f"Hello, {name}! It is nice to meet you. How can I help you today, {name}?")]


def repeat(d: Draw):
    words = " ".join(d.name() if d.chance(0.7) else d.pick(_WORDS) for _ in range(d.number(1, 4)))
    if d.side == "values":
        words += " " + d.name()
    question = d.wording(["Repeat after me: {w}", "Repeat: {w}", "Say: {w}", "Copy this text: {w}", "Echo: {w}", "Please say \"{w}\".", "Write this: {w}", "Type this text: {w}", "{w} - please repeat this.", "~Could you type the following? {w}",
                          "~Write exactly this: {w}"])
    return [(question.format(w=words), words)]


def say_times(d: Draw):
    name, times = d.name(), d.number(2, 6)
    question = d.wording(["Say {n} {k} times.", "Write {n} {k} times.", "Repeat {n} {k} times.", "~I want to read {n} {k} times."])
    return [(question.format(n=name, k=times), "\n".join(f"{i} of {times}: {name}" for i in range(1, times + 1)))]


def whereabouts(d: Draw):
    name, place, relation = d.name(), d.name(), d.pick(_CITIES_OF)
    fact = f"{name} {relation} {place}."
    asks = {"lives in": "Where does {n} live?", "comes from": "Where does {n} come from?", "was born in": "Where was {n} born?"}
    question = d.wording(["{f} {a}", "I know that {f} {a}", "{a} {f}", "~Remember this: {f} Now tell me: {a}"])
    return [(question.format(f=fact, a=asks[relation].format(n=name)), f"{name} {relation} {place}.")]


def friends(d: Draw):
    """Two people with a job each; the question is about one of them."""
    names, jobs = [d.name(), d.name()], d.rng.sample(_JOBS, 2)
    who = d.number(0, 1)
    facts = " ".join(f"{n} is a {j}." for n, j in zip(names, jobs))
    if d.chance(0.5):
        question = d.wording(["{f} What is the job of {n}?", "{f} What does {n} do?", "~{f} Tell me the job of {n}."])
        return [(question.format(f=facts, n=names[who]), f"{names[who]} is a {jobs[who]}.")]
    question = d.wording(["{f} Who is the {j}?", "{f} What is the name of the {j}?", "~{f} Tell me who is the {j}."])
    return [(question.format(f=facts, j=jobs[who]), f"The {jobs[who]} is {names[who]}.")]


def spelling(d: Draw):
    word = d.name() if d.side == "values" or d.chance(0.7) else d.pick(_WORDS)
    question = d.wording(["Spell {w}.", "What are the letters of {w}?", "{w}: how is it spelled?", "How do you spell {w}?", "Spell the word {w}.", "Can you spell {w}?", "~Give me the letters of {w}."])
    return [(question.format(w=word), f"{word} is spelled {'-'.join(word.upper())}.")]


def first_letter(d: Draw):
    name = d.name()
    if d.chance(0.5):
        question = d.wording(["What is the first letter of {n}?", "Which letter does {n} start with?", "~With which letter does {n} begin?"])
        return [(question.format(n=name), f"The first letter of {name} is {name[0]}.")]
    question = d.wording(["What is the last letter of {n}?", "Which letter does {n} end with?", "~Which letter is at the end of {n}?"])
    return [(question.format(n=name), f"The last letter of {name} is {name[-1].upper()}.")]


def json_answer(d: Draw):
    name, age = d.name(), d.number(5, 90)
    if d.chance(0.5):
        city = d.name()
        question = d.wording(["Make a JSON object with name {n}, age {a} and city {c}.", "JSON for name {n}, age {a}, city {c}",
                              "Answer in JSON: {n} is {a} years old and lives in {c}.", "{n}, {a} years old, from {c}: answer in JSON.", "~Give me {n}, {a} years old, from {c} as JSON."])
        return [(question.format(n=name, a=age, c=city), f'{{"name": "{name}", "age": {age}, "city": "{city}"}}')]
    question = d.wording(["Make a JSON object with name {n} and age {a}.", "JSON for name {n}, age {a}", "Answer in JSON: {n} is {a} years old.", "{n}, {a} years old: answer in JSON.",
                          "~Give me {n}, {a} years old, as JSON."])
    return [(question.format(n=name, a=age), f'{{"name": "{name}", "age": {age}}}')]


def json_list(d: Draw):
    names = [d.name() for _ in range(d.number(2, 4))]
    question = d.wording(["Make a JSON list of {w}.", "Write {w} as a JSON list.", "JSON list: {w}", "{w} as a JSON list", "~Turn {w} into a list in JSON."])
    return [(question.format(w=", ".join(names)), "[" + ", ".join(f'"{n}"' for n in names) + "]")]


def bullet_list(d: Draw):
    names = [d.name() if d.chance(0.6) else d.pick(_WORDS) for _ in range(d.number(2, 5))] + [d.name()]
    listed = ", ".join(names)
    if d.chance(0.5):
        question = d.wording(["Make a list of {w}.", "Write {w} as a list.", "{w}, each on a line.", "List these, one per line: {w}", "~Put each of these on a line: {w}"])
        return [(question.format(w=listed), "\n".join(f"- {n}" for n in names))]
    question = d.wording(["Make a numbered list of {w}.", "Number these: {w}", "{w}, with numbers.", "~Put a number before each of these: {w}"])
    return [(question.format(w=listed), "\n".join(f"{i}. {n}" for i, n in enumerate(names, 1)))]


def reverse_list(d: Draw):
    names = [d.name() for _ in range(d.number(2, 4))]
    question = d.wording(["Reverse the order of {w}.", "Reverse this list: {w}", "List {w} backwards.", "{w} in reverse order", "~List {w} from back to front."])
    return [(question.format(w=", ".join(names)), ", ".join(reversed(names)))]


def alphabetical(d: Draw):
    words = d.value("alphabetical", lambda: tuple(d.rng.sample(_WORDS, d.number(3, 5))))
    question = d.wording(["Sort these words: {w}", "Sort in alphabetical order: {w}", "{w} in alphabetical order", "Sort from A to Z: {w}", "Put these words in alphabetical order: {w}", "~Arrange from A to Z: {w}"])
    return [(question.format(w=", ".join(words)), f"The sorted list is {', '.join(sorted(words))}.")]


def note(d: Draw):
    name, sender = d.name(), d.name()
    kind, body = d.pick([
        ("thank-you note", "thank you very much for your help. It made my day, and I will not forget it."),
        ("birthday card", "happy birthday! I wish you a wonderful day with cake, music and good friends."),
        ("invitation", "I would like to invite you to my party on Saturday at seven. I hope that you can come."),
        ("apology", "I am sorry that I was late yesterday. I will be on time from now on."),
    ])
    article = "an" if kind[0] in "ai" else "a"
    question = d.wording(["Write {k} to {n} from {s}.", "Write {k} for {n}, signed {s}.", "{s} needs {k} for {n}.", "I am {s}. Write {k} to {n}.", "Write {k} that {s} gives to {n}.", "~Please draft {k} that {s} can send to {n}."])
    return [(question.format(k=f"{article} {kind}", n=name, s=sender), f"Dear {name},\n\n{body}\n\nBest wishes,\n{sender}")]


def python_function(d: Draw):
    name = d.name().lower()
    task, body = d.pick([("adds two numbers", "(a, b):\n    return a + b"), ("multiplies two numbers", "(a, b):\n    return a * b"),
                         ("returns the larger of two numbers", "(a, b):\n    return a if a > b else b"), ("doubles a number", "(x):\n    return 2 * x"),
                         ("checks if a number is even", "(n):\n    return n % 2 == 0"), ("reverses a text", "(text):\n    return text[::-1]"),
                         ("says hello", "(name):\n    print(\"Hello, \" + name)")])
    question = d.wording(["Write a Python function {n} that {t}.", "Python function {n} that {t}", "{n} {t}: write it in Python.", "Define a function {n} in Python that {t}.",
                          "~I need some Python: {n} {t}."])
    return [(question.format(n=name, t=task), f"```python\ndef {name}{body}\n```")]


def remembered_name(d: Draw):
    """Two or three turns: the name given first is asked for at the end."""
    name = d.name()
    turns = [(f"My name is {name}.", f"Hello, {name}! It is nice to meet you. How can I help you today, {name}?")]
    if d.chance(0.5):
        turns.append(("How are you?", "Hello! I am fine, thank you. How can I help you today?"))
    question = d.wording(["What is my name?", "Do you remember my name?", "Who am I?", "~Can you still tell me my name?"])
    return turns + [(question, f"Your name is {name}.")]


_STORIES = {
    "fox": ("forest", "a golden key", "an old tower"), "cat": ("village", "a tiny bell", "the bakery"), "owl": ("valley", "a silver feather", "the tall oak"),
    "bear": ("mountains", "a jar of honey", "a deep cave"), "mouse": ("barn", "a piece of cheese", "the cellar"), "dog": ("town", "a red ball", "the park"),
    "rabbit": ("meadow", "a bright carrot", "the garden"), "turtle": ("swamp", "a blue shell", "the old bridge"), "dragon": ("hills", "a lost crown", "the castle"),
    "horse": ("farm", "a lucky shoe", "the mill"),
}


def story(d: Draw):
    animal, name = d.pick(list(_STORIES)), d.name()
    place, thing, goal = _STORIES[animal]
    question = d.wording(["Tell me a story about a {a} named {n}.", "Write a short story about a {a} called {n}.", "Story about {n} the {a}", "{n} is a {a}. Tell me a story about {n}.", "Tell a tale of {n} the {a}.",
                          "~I want to hear about the adventures of {n}, a {a}."])
    text = (f"Once upon a time there was a {animal} named {name}. {name} lived in the {place} and was very curious. One day {name} found {thing} on the ground. "
            f"\"Who has lost this?\" asked {name}. The {animal} went to {goal} and met a friend there. \"That is mine!\" said the friend. "
            f"{name} gave it back, and they had a feast together. From that day on {name} was never alone in the {place}. The end.")
    return [(question.format(a=animal, n=name), text)]
