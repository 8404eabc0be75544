"""Requests of random features whose answers are known, some of them hung up on or aborted."""

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import requests

from tests.server.harness import prompts
from tests.server.parity.cases import CHAT, COMPLETIONS, GENERATE, Case, cases
from tests.server.parity.compare import Answer, ask, differences
from tests.soak.served import Served

END_TOKEN = "2"
WHOLE, HANG_UP, ABORT = "answered", "hung up on", "aborted"
SHARES = {WHOLE: 0.86, HANG_UP: 0.08, ABORT: 0.06}
LONG_SHARE = 0.35


def pool(count: int, seed: int) -> list[Case]:
    """``count`` requests: the mix of the parity tests, and long answers that fill the KV pool while they run."""
    rng = random.Random(seed)
    long = []
    for i, text in enumerate(prompts(int(count * LONG_SHARE), seed=seed)):
        # Without ignore_eos, for which SGLang would reserve the whole length and never have to retract.
        params = {"temperature": 0, "max_new_tokens": rng.randrange(60, 160), "logit_bias": {END_TOKEN: -100}}
        if i % 3 == 1:
            params |= {"temperature": 1.0, "top_p": 0.9, "sampling_seed": i}
        if i % 3 == 2:
            params |= {"presence_penalty": 0.5, "custom_params": {"idlm_stride": rng.choice([2, 4, 8])}}
        body = {"text": text, "sampling_params": params} | ({"stream": True} if i % 2 else {})
        long.append(Case(10**6 + i, GENERATE, body, frozenset({"long"}), True))
    return cases(count - len(long), seed) + long


class Load:
    """``count`` requests drawn from ``known`` with repetition, ``clients`` at a time.

    Attributes:
        done: how many came to their end, by what was done to them.
        wrong: one line for each answer that is not the known one.
    """

    def __init__(self, server: Served, known: Sequence[tuple[Case, Answer]], seed: int):
        self.done: Counter[str] = Counter()
        self.exact = 0
        self.wrong: list[str] = []
        self._server, self._known, self._seed = server, known, seed
        self._lock = threading.Lock()

    def answered(self) -> int:
        return self.done.total()

    def run(self, numbers: range, clients: int, until: float = float("inf")) -> None:
        """Requests ``numbers``; those that would start behind the monotonic time ``until`` are left out."""
        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(lambda n: self._one(n, until), numbers))

    def _one(self, number: int, until: float) -> None:
        if time.monotonic() > until or len(self.wrong) > 50:
            return
        rng = random.Random(f"{self._seed}/{number}")
        case, known = rng.choice(self._known)
        act = rng.choices(list(SHARES), SHARES.values())[0]
        try:
            found = {WHOLE: self._whole, HANG_UP: self._hang_up, ABORT: self._abort}[act](rng, number, case, known)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        with self._lock:
            self.done[act] += 1
            self.exact += act == WHOLE and case.exact
            if found:
                self.wrong.append(f"request {number}, case {case.number} {case.path} {sorted(case.features)} {act}: {'; '.join(found[:3])}")

    def _whole(self, rng: random.Random, number: int, case: Case, known: Answer) -> list[str]:
        return differences(known, ask(self._server, case), case.exact)

    def _hang_up(self, rng: random.Random, number: int, case: Case, known: Answer) -> list[str]:
        """A client that leaves: behind some chunks of a stream, or while it waits."""
        patience = rng.uniform(0.02, 1.0)
        try:
            with self._server.post(case.path, case.body, stream=True, timeout=(30, patience if not case.streamed else 60)) as reply:
                lines = iter(reply.iter_lines())
                for _ in range(rng.randrange(0, 12)):
                    next(lines, None)
        except (requests.exceptions.ReadTimeout, requests.exceptions.ConnectionError) as error:
            if "Connection refused" in str(error):
                return ["connection refused"]
        return []

    def _abort(self, rng: random.Random, number: int, case: Case, known: Answer) -> list[str]:
        """``/abort_request`` while the answer is in the making; what comes back is the known answer or an aborted one."""
        prompt = case.body.get("prompt", case.body.get("text", case.body.get("input_ids")))
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        params = case.body.get("sampling_params", case.body)
        if case.path not in (GENERATE, CHAT, COMPLETIONS) or several or params.get("n", 1) > 1:
            return self._hang_up(rng, number, case, known)
        rid = f"soak-{self._seed}-{number}"
        timer = threading.Timer(rng.uniform(0.0, 0.5), lambda: self._server.post("/abort_request", {"rid": rid}))
        timer.start()
        got = ask(self._server, Case(case.number, case.path, case.body | {"rid": rid}, case.features, case.exact))
        timer.join()
        if "abort" in str(got.tree).lower():
            return []
        return differences(known, got, case.exact)
