"""Two or more arms' throughput as narrow ratios: small bursts of requests go to the arms in turn.

    python -m benchmarks.paired [--arm stock --arm isd:1] [--concurrency 1 4] [--starts 8] [--bursts 40] [--per-client 2] [--temperature 0] [--max-tokens 160]

For small differences on a machine whose speed drifts: a point of `idlm bench` takes seconds, in which the drift is larger than
a difference of a few percent; a burst takes a fraction of one, and its partner comes right behind it. Two servers of the very same arm differ as
well, for reasons that have not been found: all servers are started anew `--starts` times, and the intervals are over starts. Arms, servers and
questions are those of `idlm bench` with the embedded checkpoint; the client is a plain one that reads each answer's stream, and nothing else of the
answer is timed. Each burst has questions of its own, the same for all arms; a burst that an arm answers with other tokens than the first arm's is counted.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import requests
from tqdm import tqdm

from idlm_sglang.bench import arms, prompts
from idlm_sglang.bench.servers import Servers, check_limit
from idlm_sglang.bench.summary import ratio
from idlm_sglang.demo import CHECKPOINT_DIR

START_SECONDS = 240.0


def answer(session: requests.Session, url: str, body: dict) -> tuple[int, str]:
    """Tokens and text of one streamed answer."""
    tokens, text = 0, []
    with session.post(url + "/v1/chat/completions", json={**body, "model": "idlm-demo", "stream": True}, stream=True, timeout=300) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines(chunk_size=None):
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            text += [choice["delta"].get("content") or "" for choice in event["choices"]]
    return tokens, "".join(text)


def burst(pool: ThreadPoolExecutor, sessions: list[requests.Session], url: str, bodies: list[dict]) -> tuple[float, list[str]]:
    """Tokens per second of ``bodies``, an equal share by each client, and the answers."""

    def client(i: int) -> list[tuple[int, str]]:
        return [answer(sessions[i], url, body) for body in bodies[i :: len(sessions)]]

    start = time.perf_counter()
    found = list(pool.map(client, range(len(sessions))))
    seconds = time.perf_counter() - start
    return sum(tokens for part in found for tokens, _ in part) / seconds, [text for part in found for _, text in part]


@dataclass
class Found:
    """What an arm's bursts gave at one concurrency.

    Attributes:
        speeds: tokens per second, the mean of the bursts of each start.
        bursts: how many there were in all; others: those with other answers than the first arm's.
    """

    speeds: list[float] = field(default_factory=list)
    bursts: int = 0
    others: int = 0

    def add(self, speeds: list[float], others: int) -> None:
        """The bursts of one start."""
        self.speeds.append(fmean(speeds))
        self.bursts += len(speeds)
        self.others += others

    def line(self, name: str, first: "Found", first_name: str) -> str:
        """Of an arm beside the first one."""
        over = ratio(self.speeds, first.speeds)
        spread = "" if over.low is None else f" ({over.low:.3f} to {over.high:.3f})"
        by_start = " ".join(f"{own / other:.3f}" for own, other in zip(self.speeds, first.speeds))
        return f"{name:<12} {fmean(self.speeds):8.0f} tok/s   {over.mean:.3f}{spread} of {first_name} [{by_start}]; other answers in {self.others} of {self.bursts} bursts"


def compared(urls: list[str], concurrency: int, numbers: range, per_client: int, body: dict) -> tuple[list[list[float]], list[int]]:
    """Tokens per second of each arm's bursts, and how many of them had other answers than the first arm's. Two bursts before them warm up."""
    speeds, others = [[] for _ in urls], [0] * len(urls)
    sessions = [[requests.Session() for _ in range(concurrency)] for _ in urls]
    with ThreadPoolExecutor(concurrency) as pool:
        for number in tqdm([-2, -1, *numbers], desc=f"C = {concurrency}", leave=False):
            bodies = prompts.draw(None, concurrency * per_client, number, 1, body)
            answers = [[]] * len(urls)
            # Each arm is the first as often as the others.
            for arm in sorted(range(len(urls)), key=lambda arm: (arm + number) % len(urls)):
                speed, answers[arm] = burst(pool, sessions[arm], urls[arm], bodies)
                if number >= 0:
                    speeds[arm].append(speed)
            for arm, found in enumerate(answers):
                others[arm] += number >= 0 and found != answers[0]
    return speeds, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", action="append", help="as for `idlm bench`; default: stock and isd:1")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--starts", type=int, default=8)
    parser.add_argument("--bursts", type=int, default=40, help="of each arm, for each start and concurrency")
    parser.add_argument("--per-client", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=160)
    args = parser.parse_args()
    chosen = arms.parse_all(args.arm or ["stock", "isd:1"])
    common = ("--max-running-requests", str(max(args.concurrency)), "--enable-metrics", "--sleep-on-idle")
    body = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    found = {concurrency: [Found() for _ in chosen] for concurrency in args.concurrency}
    for start in tqdm(range(args.starts), desc="starts"):
        with tempfile.TemporaryDirectory(prefix="paired-") as folder, Servers(CHECKPOINT_DIR, True, common, Path(folder), Path(folder), START_SECONDS, False) as servers:
            # Which server is up first may matter as well.
            served = {at: servers.served(chosen[at]) for at in sorted(range(len(chosen)), key=lambda at: (at + start) % len(chosen))}
            for one in served.values():
                check_limit(one, max(args.concurrency))
            urls = [served[at].url for at in range(len(chosen))]
            for concurrency, arms_found in found.items():
                speeds, others = compared(urls, concurrency, range(start * args.bursts, (start + 1) * args.bursts), args.per_client, body)
                for one, own, other in zip(arms_found, speeds, others):
                    one.add(own, other)
    for concurrency, arms_found in found.items():
        for arm, one in zip(chosen, arms_found):
            print(f"C = {concurrency:<3} {one.line(arm.name, arms_found[0], chosen[0].name)}")


if __name__ == "__main__":
    main()
