"""Tokens per second of the embedded checkpoint, ISD over AR, through real servers on this machine.

    python -m benchmarks.demo_ratio [--stride 4] [--clients 1 4 8 16] [--prompts 64] [--extra '{"presence_penalty": 1.5}']

Both arms are `idlm serve` with the same checkpoint and the plugin loaded; they are started, warmed up and timed one at
a time, on the same greedy chat prompts, kept out of training; ``--extra`` adds fields to each. Figures of one run are to be read as ratios.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor

import requests

from benchmarks.server import running
from idlm_sglang.demo.corpus import held_out_dialogues

REPEATS = 3


def ask(url: str, question: str, extra: dict) -> int:
    """Completion tokens of one answer, greedy unless ``extra`` says otherwise."""
    body = {"model": "idlm-demo", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 160, **extra}
    reply = requests.post(url + "/v1/chat/completions", json=body, timeout=300)
    reply.raise_for_status()
    return reply.json()["usage"]["completion_tokens"]


def timed(url: str, questions: list[str], clients: int, extra: dict) -> float:
    """Total tokens per second, the best of REPEATS passes over the questions."""
    best = 0.0
    for _ in range(REPEATS):
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            tokens = sum(pool.map(lambda q: ask(url, q, extra), questions))
        best = max(best, tokens / (time.perf_counter() - start))
    return best


def arm(flags: list[str], questions: list[str], clients: list[int], extra: dict) -> list[float]:
    """Start one server, time it at every concurrency, end it."""
    with running(flags) as url:
        timed(url, questions[:8], 4, extra)
        return [timed(url, questions, c, extra) for c in clients]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--extra", type=json.loads, default={}, metavar="JSON")
    args = parser.parse_args()
    questions = [d.turns[0][0] for d in held_out_dialogues(7, args.prompts)]
    ar = arm(["--ar"], questions, args.clients, args.extra)
    isd = arm(["--stride", str(args.stride)], questions, args.clients, args.extra)
    print(f"{'clients':>8} {'AR tok/s':>10} {'ISD tok/s':>10} {'ratio':>6}   stride {args.stride}")
    for c, a, i in zip(args.clients, ar, isd):
        print(f"{c:>8} {a:>10.0f} {i:>10.0f} {i / a:>6.2f}")


if __name__ == "__main__":
    main()
