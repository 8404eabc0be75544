"""Dialogue families about numbers: arithmetic with its steps, counting, sorting, comparing, units."""

from idlm_sglang.demo.split import Draw


def add_steps(a: int, b: int) -> str:
    """The worked answer to a + b for a, b < 100."""
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    return (f"Ones: {a % 10} + {b % 10} = {ones}, write {ones % 10}, carry {carry}. "
            f"Tens: {a // 10} + {b // 10} + {carry} = {tens}. So {a} + {b} = {a + b}.")


def subtract_steps(a: int, b: int) -> str:
    """The worked answer to a - b for 0 <= b <= a < 100."""
    borrow = int(a % 10 < b % 10)
    top = a % 10 + 10 * borrow
    return (f"Ones: {top} - {b % 10} = {top - b % 10}, borrow {borrow}. "
            f"Tens: {a // 10} - {b // 10} - {borrow} = {a // 10 - b // 10 - borrow}. So {a} - {b} = {a - b}.")


def addition(d: Draw):
    a, b = d.operands(99)
    question = d.wording(["What is {a} + {b}?", "{a} + {b}", "{a} + {b} = ?", "Add {a} and {b}.", "What is {a} plus {b}?", "Compute {a} + {b}.",
                          "How much is {a} + {b}?", "The result of {a} + {b}?", "Calculate the sum of {a} and {b}.", "~Could you work out {a} + {b}?",
                          "~Tell me the result of {a} plus {b}."])
    return [(question.format(a=a, b=b), add_steps(a, b))]


def subtraction(d: Draw):
    a, b = sorted(d.operands(99), reverse=True)
    question = d.wording(["What is {a} - {b}?", "{a} - {b}", "{a} - {b} = ?", "Subtract {b} from {a}.", "What is {a} minus {b}?", "Compute {a} - {b}.",
                          "How much is {a} - {b}?", "The result of {a} - {b}?", "~Could you work out {a} - {b}?", "~Tell me the result of {a} minus {b}."])
    return [(question.format(a=a, b=b), subtract_steps(a, b))]


def multiplication(d: Draw):
    a, b = d.number(2, 9), d.number(2, 9)
    question = d.wording(["What is {a} x {b}?", "{a} x {b}", "{a} * {b}", "Multiply {a} by {b}.", "What is {a} times {b}?", "Compute {a} x {b}.",
                          "~Could you work out {a} x {b}?", "~Tell me the result of {a} times {b}."])
    return [(question.format(a=a, b=b), f"{a} times {b} is {a * b}, so {a} x {b} = {a * b}.")]


def word_problem(d: Draw):
    name, thing = d.name(), d.pick(["apples", "books", "coins", "stones", "cards", "eggs"])
    a, b = d.operands(49)
    if d.chance(0.5):
        question = d.wording(["{n} has {a} {t} and gets {b} more. How many {t} does {n} have?", "{n} has {a} {t}. {n} buys {b} more {t}. How many are there now?",
                              "~{n} owned {a} {t} and found {b} others. How many {t} are there now?"])
        steps, total = add_steps(a, b), a + b
    else:
        a, b = max(a, b), min(a, b)
        question = d.wording(["{n} has {a} {t} and gives away {b}. How many {t} does {n} have?", "{n} has {a} {t}. {n} loses {b} {t}. How many are left?",
                              "~{n} owned {a} {t} and sold {b} of them. How many {t} are left?"])
        steps, total = subtract_steps(a, b), a - b
    return [(question.format(n=name, a=a, b=b, t=thing), f"{steps} {name} has {total} {thing}.")]


def counting(d: Draw):
    start, length = d.value("count", lambda: (1 if d.chance(0.25) else d.number(0, 88), d.number(3, 11)))
    end = start + length
    if d.chance(0.7):
        question = d.wording(["Count from {a} to {b}.", "Can you count from {a} to {b}?", "List the numbers from {a} to {b}.", "Numbers from {a} to {b}, please.",
                              "~I would like to hear the numbers from {a} up to {b}."])
        way, first, last, numbers = "Up", start, end, range(start, end + 1)
    else:
        question = d.wording(["Count down from {b} to {a}.", "Count backwards from {b} to {a}.", "~Start at {b} and count back to {a}."])
        way, first, last, numbers = "Down", end, start, range(end, start - 1, -1)
    return [(question.format(a=start, b=end), f"{way} from {first} to {last}: {', '.join(map(str, numbers))}.")]


def multiples(d: Draw):
    step, count = d.value("multiples", lambda: (d.number(2, 12), d.number(3, 9)))
    question = d.wording(["List the first {c} multiples of {s}.", "What are the first {c} multiples of {s}?", "Give {c} multiples of {s}.", "~Which are the {c} smallest multiples of {s}?"])
    # "i of count" beside each one makes it plain where to stop.
    return [(question.format(s=step, c=count), ", ".join(f"{i} of {count}: {i * step}" for i in range(1, count + 1)) + ".")]


def sort_numbers(d: Draw):
    numbers = d.value("sort", lambda: tuple(d.rng.sample(range(10, 100), d.number(2, 3))))
    listed = ", ".join(map(str, numbers))
    down = d.chance(0.3)
    if down:
        question = d.wording(["Sort these numbers from large to small: {l}", "Sort in descending order: {l}", "{l} in descending order, please.", "~Put {l} in order, the largest first."])
    else:
        question = d.wording(["Sort these numbers: {l}", "Sort from small to large: {l}", "Sort in ascending order: {l}", "Put these numbers in order: {l}", "{l} in ascending order, please.",
                              "~Put {l} in order, the smallest first."])
    answer = ", ".join(map(str, sorted(numbers, reverse=down)))
    return [(question.format(l=listed), f"The sorted list is {answer}.")]


def comparison(d: Draw):
    a, b = d.operands(99)
    while a == b:
        a, b = d.operands(99)
    if d.chance(0.5):
        question, winner, word = d.wording(["Which is larger, {a} or {b}?", "Which number is larger: {a} or {b}?", "{a} and {b}: which one is larger?", "Is {a} or {b} the larger number?",
                                            "~Of {a} and {b}, which one is larger?"]), max(a, b), "larger"
    else:
        question, winner, word = d.wording(["Which is smaller, {a} or {b}?", "Which number is smaller: {a} or {b}?", "{a} and {b}: which one is smaller?", "Is {a} or {b} the smaller number?",
                                            "~Of {a} and {b}, which one is smaller?"]), min(a, b), "smaller"
    other = a + b - winner
    return [(question.format(a=a, b=b), f"{winner} is {word} than {other}, so the answer is {winner}.")]


def parity(d: Draw):
    n = d.value("parity", lambda: d.number(0, 999))
    question = d.wording(["Is {n} even or odd?", "Is the number {n} even or odd?", "Is {n} even?", "Is {n} odd?", "~Tell me whether {n} is even or odd."])
    return [(question.format(n=n), f"{n} ends in {n % 10}, so it is {'even' if n % 2 == 0 else 'odd'}.")]


def neighbours(d: Draw):
    n = d.value("next", lambda: d.number(1, 98))
    if d.chance(0.6):
        question = d.wording(["What number comes after {n}?", "What is the next number after {n}?", "Which number follows {n}?", "~Name the number right after {n}."])
        return [(question.format(n=n), f"The number after {n} is {n + 1}.")]
    question = d.wording(["What number comes before {n}?", "Which number is just before {n}?", "~Name the number right before {n}."])
    return [(question.format(n=n), f"The number before {n} is {n - 1}.")]


_UNITS = [("metre", "centimetre", "00"), ("centimetre", "millimetre", "0"), ("kilometre", "metre", "000"), ("kilogram", "gram", "000"),
          ("litre", "millilitre", "000"), ("euro", "cent", "00"), ("dollar", "cent", "00"), ("century", "year", "00"), ("decade", "year", "0")]


def _plural(unit: str) -> str:
    return "centuries" if unit == "century" else unit + "s"


def units(d: Draw):
    n, (big, small, zeros) = d.value("unit", lambda: (d.number(2, 99), d.pick(_UNITS)))
    question = d.wording(["How many {s} are {n} {b}?", "Convert {n} {b} to {s}.", "{n} {b} in {s}", "What is {n} {b} in {s}?", "~Express {n} {b} in {s}."])
    answer = f"One {big} is 1{zeros} {_plural(small)}, so {n} {_plural(big)} are {n}{zeros} {_plural(small)}."
    return [(question.format(n=n, b=_plural(big), s=_plural(small)), answer)]


_NUMERALS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen",
             "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def _in_words(n: int) -> str:
    if n < 20:
        return _NUMERALS[n]
    return _TENS[n // 10] + (f"-{_NUMERALS[n % 10]}" if n % 10 else "")


def number_words(d: Draw):
    n = d.value("words", lambda: d.number(0, 99))
    question = d.wording(["Write {n} in words.", "How do you write {n} in words?", "What is {n} in words?", "~Put the number {n} into words."])
    return [(question.format(n=n), f"{n} in words is {_in_words(n)}.")]
