"""Tokens per forward of sampled requests without a seed, by the coupled and by the rejection rule.

    python -m benchmarks.sampling_rule [--strides 2 3 4 8] [--prompts 256]

Both rules give exactly AR's distribution; they differ in how many drafts stand. One `idlm serve` of the embedded
checkpoint per rule, the same chat prompts (kept out of training), temperature 1. The spread is the standard error over
the requests.
"""

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor

import requests

from benchmarks.server import running
from idlm_sglang.config import COUPLED, REJECTION
from idlm_sglang.demo.corpus import held_out_dialogues


def forwards(url: str, question: str, stride: int) -> tuple[int, int]:
    """(decode tokens, decode forwards) of one answer."""
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    params = {"temperature": 1.0, "max_new_tokens": 160, "custom_params": {"idlm_stride": stride}}
    reply = requests.post(url + "/generate", json={"text": text, "sampling_params": params}, timeout=300)
    reply.raise_for_status()
    meta = reply.json()["meta_info"]
    return round(meta.get("spec_accept_length", 0) * meta.get("spec_verify_ct", 0)), meta.get("spec_verify_ct", 0)


def measured(rule: str, questions: list[str], strides: list[int]) -> dict[int, tuple[float, float]]:
    """Tokens per forward and its standard error, by stride."""
    found = {}
    with running(["--stride", "4", "--max-stride", str(max(strides)), "--sampling-rule", rule]) as url:
        for stride in strides:
            with ThreadPoolExecutor(8) as pool:
                pairs = list(pool.map(lambda q: forwards(url, q, stride), questions))
            total = sum(n for _, n in pairs)
            rate = sum(t for t, _ in pairs) / total
            # The ratio's linearised residuals.
            error = statistics.stdev(t - rate * n for t, n in pairs) * len(pairs) ** 0.5 / total
            found[stride] = rate, error
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strides", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--prompts", type=int, default=256)
    args = parser.parse_args()
    questions = [d.turns[0][0] for d in held_out_dialogues(7, args.prompts)]
    coupled, rejection = (measured(rule, questions, args.strides) for rule in (COUPLED, REJECTION))
    print(f"{'stride':>6} {'coupled':>14} {'rejection':>14} {'ratio':>6}")
    for stride in args.strides:
        (c, ce), (r, re) = coupled[stride], rejection[stride]
        print(f"{stride:>6} {c:>7.3f} ±{ce:.3f} {r:>7.3f} ±{re:.3f} {c / r:>6.3f}")


if __name__ == "__main__":
    main()
