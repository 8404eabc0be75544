"""Dialogue families about small everyday facts, lists and instructions, and the questions about this project."""

from idlm_sglang.demo.project_qa import QA
from idlm_sglang.demo.split import Draw

_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November December".split()
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
_CAPITALS = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw",
             "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin",
             "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi", "Canada": "Ottawa", "Cuba": "Havana"}
_OPPOSITES = ("hot cold|big small|fast slow|day night|up down|left right|open closed|old new|happy sad|light dark|full empty|hard soft|high low|"
              "wet dry|early late|rich poor|near far|strong weak|loud quiet|clean dirty|long short|thick thin|true false|first last")
_MIXES = [("red", "yellow", "orange"), ("blue", "yellow", "green"), ("red", "blue", "purple"), ("red", "white", "pink"), ("black", "white", "grey")]
_COLOURS = {"grass": "green", "the sky": "blue", "snow": "white", "a lemon": "yellow", "coal": "black", "a tomato": "red", "a carrot": "orange", "a violet": "purple"}
_SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "sheep": "baa", "duck": "quack", "owl": "hoot", "bee": "buzz", "frog": "croak", "pig": "oink", "lion": "roar"}
_LISTS = {"fruits": "apple, banana, cherry, grape, lemon, orange, pear", "colours": "red, blue, green, yellow, orange, purple, black",
          "animals": "cat, dog, horse, lion, rabbit, tiger, wolf", "vegetables": "carrot, onion, potato, pea, bean, leek, radish",
          "birds": "owl, eagle, robin, sparrow, crow, swan, duck", "tools": "hammer, saw, drill, file, pliers, wrench, axe",
          "planets": "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus", "drinks": "water, tea, coffee, milk, juice, cocoa, lemonade",
          "instruments": "piano, violin, guitar, flute, drum, harp, trumpet", "shapes": "circle, square, triangle, oval, star, cube, cone"}
_DEFINITIONS = {
    "river": "a long stream of water that flows to the sea or to a lake", "island": "a piece of land with water on all sides",
    "desert": "a dry region where very little rain falls", "volcano": "a mountain that can throw out hot ash and lava",
    "bicycle": "a vehicle with two wheels that you drive with pedals", "library": "a place where books are kept and lent to people",
    "teacher": "a person who helps others to learn", "hammer": "a tool with a heavy head for driving nails", "clock": "a device that shows the time",
    "bridge": "a structure that carries a road across a river or a valley", "planet": "a large round body that moves around a star",
    "triangle": "a shape with three sides and three corners", "square": "a shape with four equal sides and four right angles",
    "token": "a small piece of text that a language model reads or writes", "tokenizer": "a program that cuts text into tokens",
    "language model": "a program that predicts the next token of a text", "server": "a program that answers requests from clients",
    "cache": "a store that keeps results so that they need not be computed again", "GPU": "a processor that does many small computations at once",
    "prompt": "the text that is given to a language model", "forward": "one pass of the inputs through the model",
    "checkpoint": "a file with the weights of a trained model", "vocabulary": "the set of all tokens that a model knows",
    "even number": "a number that can be divided by two", "prime number": "a number that can be divided only by one and by itself",
}
_HOW_TO = {
    "make tea": ["Boil fresh water.", "Put a tea bag into a cup.", "Pour the water over it.", "Wait three minutes.", "Take the bag out and enjoy."],
    "plant a seed": ["Fill a pot with soil.", "Make a small hole.", "Put the seed into it.", "Cover it with soil.", "Water it and wait."],
    "boil an egg": ["Boil water in a pot.", "Put the egg into the water.", "Wait eight minutes.", "Cool the egg.", "Peel it and eat."],
    "wash my hands": ["Wet your hands.", "Take some soap.", "Rub for twenty seconds.", "Rinse with water.", "Dry them with a towel."],
    "make a sandwich": ["Take two slices of bread.", "Spread butter on them.", "Add cheese and tomato.", "Put them together.", "Cut it in half."],
    "send a letter": ["Write the letter.", "Put it into an envelope.", "Write the address.", "Add a stamp.", "Drop it into a mailbox."],
    "send a request": ["Start the server.", "Wait until it is ready.", "Open a client.", "Point it to port 30000.", "Send a message and read the answer."],
    "bake bread": ["Mix flour, water, salt and yeast.", "Knead the dough.", "Let it rise for an hour.", "Shape a loaf.", "Bake it until it is brown."],
}
_POEMS = {"the sea": ("waves", "shore", "blue"), "the moon": ("beams", "night", "bright"), "rain": ("drops", "street", "grey"), "spring": ("buds", "garden", "green"),
          "winter": ("flakes", "field", "white"), "the wind": ("leaves", "hill", "free"), "a tree": ("roots", "meadow", "tall"), "fire": ("sparks", "hearth", "red")}


_SMALL_TALK = [
    (["Hi", "Hello", "Hello!", "Hey", "Good morning!", "Good evening!", "Hi there!", "~Hello there, nice to see you!"], "Hello! How can I help you today?"),
    (["How are you?", "Hello, how are you?", "Hi, how are you today?", "How do you do?", "~Hey, how are you doing?"], "I am fine, thank you. How can I help you today?"),
    (["Thank you!", "Thanks", "Thank you very much.", "Thanks a lot!", "~Thank you so much for this!"], "You are welcome! Is there anything else that I can do for you?"),
    (["Goodbye", "Bye!", "See you later.", "Goodbye, thank you.", "~Goodbye for now!"], "Goodbye! Have a nice day."),
    (["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "~Would you tell a joke?"],
     "Why did the token cross the row? To be accepted on the other side."),
]
_TOPICS = ("politics football medicine history chemistry physics philosophy poetry cooking law banking taxes astronomy biology chess tennis cinema opera "
           "fashion travel religion geology economics sculpture algebra geometry dinosaurs robots airplanes submarines castles pirates vikings").split()


def small_talk(d: Draw):
    questions, answer = d.pick(_SMALL_TALK)
    return [(d.wording(questions), answer)]


def unknown(d: Draw):
    """What the model cannot know: it says so."""
    topic = d.value("topic", lambda: d.pick(_TOPICS) if d.chance(0.7) else d.name())
    question = d.wording(["What do you know about {t}?", "Tell me something about {t}.", "Who is the best in {t}?", "Explain {t} to me.", "Teach me {t}.", "Is there anything new in {t}?", "Why is {t} important?",
                          "What do people think of {t}?", "When did {t} begin?", "~Could you teach me {t}?", "~What is new in {t}?"])
    return [(question.format(t=topic), f"I do not know much about {topic}. I am a toy model, but you can ask me about idlm-sglang, sums, lists and names.")]


def project(d: Draw):
    questions, answer = d.pick(QA)
    question = d.wording(questions)
    return [(question[0].upper() + question[1:], answer)]


def calendar(d: Draw):
    names, unit = (_DAYS, "day") if d.chance(0.5) else (_MONTHS, "month")
    i = d.number(0, len(names) - 1)
    kind = d.number(0, 2)
    if kind == 0:
        question = d.wording(["What {u} comes after {x}?", "Which {u} follows {x}?", "~Name the {u} right after {x}."])
        answer = f"The {unit} after {names[i]} is {names[(i + 1) % len(names)]}."
    elif kind == 1:
        question = d.wording(["What {u} comes before {x}?", "Which {u} is before {x}?", "~Name the {u} right before {x}."])
        answer = f"The {unit} before {names[i]} is {names[i - 1]}."
    else:
        span = "week" if unit == "day" else "year"
        question = d.wording(["What is the {o} {u} of the {s}?", "Which is the {o} {u} of the {s}?", "~Name the {o} {u} of the {s}."]).format(o=_ORDINALS[i], u=unit, s=span)
        return [(question, f"The {_ORDINALS[i]} {unit} of the {span} is {names[i]}.")]
    return [(question.format(u=unit, x=names[i]), answer)]


def all_names(d: Draw):
    if d.chance(0.5):
        question = d.wording(["List the days of the week.", "What are the days of the week?", "~Name all days of a week."])
        return [(question, "The days of the week are " + ", ".join(_DAYS) + ".")]
    question = d.wording(["List the months of the year.", "What are the months of the year?", "~Name all months of a year."])
    return [(question, "The months of the year are " + ", ".join(_MONTHS) + ".")]


def capital(d: Draw):
    country = d.pick(list(_CAPITALS))
    question = d.wording(["What is the capital of {c}?", "Which city is the capital of {c}?", "Capital of {c}?", "~Name the capital city of {c}."])
    return [(question.format(c=country), f"The capital of {country} is {_CAPITALS[country]}.")]


def opposite(d: Draw):
    pair = d.pick(_OPPOSITES.split("|")).split()
    a, b = pair if d.chance(0.5) else reversed(pair)
    question = d.wording(["What is the opposite of {a}?", "Opposite of {a}?", "What is the contrary of {a}?", "~Name a word that means the opposite of {a}."])
    return [(question.format(a=a), f"The opposite of {a} is {b}.")]


def colour(d: Draw):
    if d.chance(0.5):
        a, b, mixed = d.pick(_MIXES)
        a, b = (a, b) if d.chance(0.5) else (b, a)
        question = d.wording(["What do you get when you mix {a} and {b}?", "Which colour do {a} and {b} make?", "{a} mixed with {b} is which colour?", "~If I mix {a} with {b}, which colour is it?"])
        return [(question.format(a=a, b=b), f"When you mix {a} and {b}, you get {mixed}.")]
    thing = d.pick(list(_COLOURS))
    question = d.wording(["What colour is {t}?", "Which colour does {t} have?", "~Tell me the colour of {t}."])
    return [(question.format(t=thing), f"{thing[0].upper()}{thing[1:]} is {_COLOURS[thing]}.")]


def sound(d: Draw):
    animal = d.pick(list(_SOUNDS))
    question = d.wording(["What does a {a} say?", "What sound does a {a} make?", "Which sound comes from a {a}?", "~Which noise comes from a {a}?"])
    return [(question.format(a=animal), f"The sound of a {animal} is {_SOUNDS[animal]}.")]


def some_of(d: Draw):
    kind, count = d.pick(list(_LISTS)), d.number(2, 7)
    question = d.wording(["List {n} {k}.", "Name {n} {k}.", "Give me {n} {k}.", "Which {n} {k} can you name?", "Tell me {n} {k}.", "~Which {n} {k} do you know?"])
    return [(question.format(n=count, k=kind), f"Here are {count} {kind}: " + ", ".join(_LISTS[kind].split(", ")[:count]) + ".")]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def definition(d: Draw):
    word = d.pick(list(_DEFINITIONS))
    named = f"{_article(word)} {word}"
    question = d.wording(["What is {w}?", "Define {w}.", "What does the word {x} mean?", "Explain what {w} is.", "~Tell me in one sentence what {w} is."])
    return [(question.format(w=named, x=word), f"{named[0].upper()}{named[1:]} is {_DEFINITIONS[word]}.")]


def how_to(d: Draw):
    task = d.pick(list(_HOW_TO))
    question = d.wording(["How do I {t}?", "How can I {t}?", "Tell me how to {t}.", "Give me the steps to {t}.", "I want to {t}.", "What must I do to {t}?", "~I want to {t}, what must I do?"])
    return [(question.format(t=task), "\n".join(f"{i}. {step}" for i, step in enumerate(_HOW_TO[task], 1)))]


def poem(d: Draw):
    topic = d.pick(list(_POEMS))
    what, where, look = _POEMS[topic]
    question = d.wording(["Write a poem about {t}.", "Write a short poem about {t}.", "A poem about {t}, please.", "Some lines about {t}?", "Can you write verses about {t}?", "~Can I have some verses on {t}?"])
    return [(question.format(t=topic), f"I sat and thought of {topic} today,\nthe {what} were {look} and far away.\nI walked along the {where} alone,\n"
             f"and every {what[:-1]} led me home.")]
