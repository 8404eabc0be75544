"""The published measurements, from one table.

`published.csv`: an 8B model on H100, bf16, MATH-500, T = 1, from the authors of I-DLM (arXiv 2604.11035). ``logs``: development logs, total tokens per
second; ``readme``: tokens per second of one request, times the clients; ``tp4``: the statement about TP4 at N = 3; ``ablation``: its last row, N = 3.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "published.csv"

AR, ISD, LORA = "AR", "I-DLM", "I-DLM LoRA"
COVERED = (AR, ISD, LORA)
"""What the model describes. The others draft with another model: on the plots, never in the fit."""

# Counted by the authors at N = 4: shares of rounds that verify and accept all, reject, start cold. p of about 0.90 gives them.
ACCEPTANCE = 0.90


@dataclass(frozen=True)
class Measured:
    """One published figure.

    Attributes:
        stride: N; 1 for AR, None where the algorithm has none.
        tokens_per_second: of all requests together.
        tokens_per_forward: published TPF at this stride; None where there is none.
        reference: source whose AR figure at the same setting is the one to divide by; "" for AR.
    """

    source: str
    series: str
    stride: int | None
    clients: int
    tp: int
    tokens_per_second: float
    tokens_per_forward: float | None
    reference: str

    @property
    def setting(self) -> tuple[int, int]:
        """(TP, clients): what is left out together."""
        return self.tp, self.clients


def load(path: Path = FILE) -> list[Measured]:
    """All points of the table, in its order."""
    with path.open(newline="") as file:
        return [
            Measured(
                source=row["source"],
                series=row["series"],
                stride=int(row["stride"]) if row["stride"] else None,
                clients=int(row["clients"]),
                tp=int(row["tp"]),
                tokens_per_second=float(row["tokens_per_second"]),
                tokens_per_forward=float(row["tokens_per_forward"]) if row["tokens_per_forward"] else None,
                reference=row["reference"],
            )
            for row in csv.DictReader(file)
        ]


def covered(points: list[Measured]) -> list[Measured]:
    return [p for p in points if p.series in COVERED]


def reference(point: Measured, points: list[Measured]) -> Measured:
    """The AR point that ``point`` is compared with."""
    return next(p for p in points if p.series == AR and p.setting == point.setting and p.source == point.reference)
