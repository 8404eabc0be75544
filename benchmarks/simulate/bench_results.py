"""What `idlm bench` measured, read from its raw results: throughputs, answer lengths, acceptance, the cost of stride 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulate.chain import Acceptance
from idlm_sglang.bench.store import Store
from idlm_sglang.bench.summary import ratio, throughput
from idlm_sglang.config import SettingError


@dataclass(frozen=True)
class Bench:
    """Results at one temperature. Rows are raw results by (arm, concurrency), in the order of their repeats."""

    folders: tuple[Path, ...]
    rows: dict[tuple[str, int], list[dict[str, Any]]]

    @classmethod
    def read(cls, folders: Sequence[Path], temperature: float = 0.0) -> "Bench":
        """A concurrency that a later folder has, too, is that folder's alone. Raises SettingError where a folder has no results at this temperature."""
        rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for folder in folders:
            found: dict[tuple[str, int], list[dict[str, Any]]] = {}
            for point, row in sorted(Store(folder).results.items(), key=lambda item: item[0].repeat):
                if point.temperature == temperature:
                    found.setdefault((point.arm, point.concurrency), []).append(row)
            if not found:
                raise SettingError(f"--bench {folder} holds no results of `idlm bench` at temperature {temperature:g}; allowed: a folder with its raw.jsonl")
            again = {c for _, c in found}
            rows = {key: kept for key, kept in rows.items() if key[1] not in again} | found
        return cls(tuple(folders), rows)

    @property
    def concurrencies(self) -> list[int]:
        return sorted({c for _, c in self.rows})

    def throughputs(self, arm: str, concurrency: int) -> list[float]:
        return [throughput(row) for row in self.rows[arm, concurrency]]

    def ratio(self, arm: str, reference: str, concurrency: int):
        """Ratio with its interval, as the report of `idlm bench` has it."""
        return ratio(self.throughputs(arm, concurrency), self.throughputs(reference, concurrency))

    def requests(self, arm: str, concurrency: int, key: str) -> np.ndarray:
        """"tokens", "prompt_tokens", "ttft" .. of all requests of all repeats."""
        return np.concatenate([row["requests"][key] for row in self.rows[arm, concurrency]])

    def acceptance(self, arm: str) -> Acceptance:
        """By position, all concurrencies together. The counters hold drafts accepted with all before them: quotients of neighbours are conditional."""
        told = [row["decoding"] for (name, _), rows in self.rows.items() for row in rows if name == arm]
        accepted, proposed = (np.sum([d[key] for d in told], axis=0).astype(float) for key in ("accepted", "proposed"))
        tried = int(np.sum(np.cumprod(proposed > 0)))
        reach = np.concatenate([[1.0], accepted[:tried] / proposed[:tried]])
        return Acceptance(tuple((reach[1:] / reach[:-1]).tolist()))

    def per_round(self, arm: str, concurrency: int) -> float:
        return float(np.mean([row["decoding"]["tokens_per_forward"] for row in self.rows[arm, concurrency]]))


@dataclass(frozen=True)
class Single:
    """What a server forced to one token per step costs over stock AR, from tokens per second at one client.

    share: of AR's speed that is lost. seconds: of each token more.
    """

    share: float
    seconds: float
    source: str


def single(bench: Bench, arm: str = "isd:1", reference: str = "stock", concurrency: int = 1) -> Single:
    """Raises SettingError where the two arms were not measured."""
    if (arm, concurrency) not in bench.rows or (reference, concurrency) not in bench.rows:
        raise SettingError(f"--bench {' '.join(map(str, bench.folders))} holds no arms {reference} and {arm} at concurrency {concurrency}; allowed: a folder of `idlm bench` with both")
    found = bench.ratio(arm, reference, concurrency)
    ar = float(np.exp(np.mean(np.log(bench.throughputs(reference, concurrency)))))
    return Single(1 - found.mean, max(0.0, concurrency * (1 / found.mean - 1) / ar), f"{arm} over {reference} {found} at C = {concurrency}")
