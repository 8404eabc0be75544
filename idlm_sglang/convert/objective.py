"""What is trained: cross entropies of clean rows and MASK rows, and how well the MASK rows' drafts would be accepted."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from idlm_sglang.convert.rows import NO_LABEL, Batch

CHUNK = 512  # rows of logits at a time: with a vocabulary of 150,000 they are the largest tensors of a step


def draft_losses(drafts: torch.Tensor, verifiers: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean losses of MASK rows in nats: CE against their labels, and CE against the distribution of the clean row that predicts the same token
    and would verify the draft; then the share of rows whose argmax is the clean row's (that is, accepted if greedy).

    drafts, verifiers: (n, V) logits, the latter detached. labels: (n,) int64.
    """
    log_q = drafts.log_softmax(-1)
    hard = F.nll_loss(log_q, labels)
    soft = -(verifiers.softmax(-1) * log_q).sum(-1).mean()
    return hard, soft, (verifiers.argmax(-1) == log_q.argmax(-1)).float().mean().item()


@dataclass(frozen=True)
class Losses:
    """Means over the rows with a label, in nats (see :func:`draft_losses`); clean is None where it was not asked for. agreement: a share."""
    hard: torch.Tensor
    soft: torch.Tensor
    clean: torch.Tensor | None
    agreement: float


def losses(hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], batch: Batch, clean: bool) -> Losses:
    """The losses of a batch, logits made for the rows that need them and in chunks.

    hidden: (B, T, H), the decoder's output. head: (n, H) to (n, V). clean: with the CE of the clean rows (trained then, else None).
    """
    c = batch.clean
    mask_labels = batch.labels[:, c:]
    wanted = mask_labels != NO_LABEL
    twins = hidden[:, :c].detach().gather(1, batch.same_token[..., None].expand(-1, -1, hidden.shape[-1]))[wanted]
    students, labels = hidden[:, c:][wanted], mask_labels[wanted]

    def part(student: torch.Tensor, twin: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            verifier = head(twin).float()
        hard, soft, agreement = draft_losses(head(student).float(), verifier, label)
        return hard * len(label), soft * len(label), torch.tensor(agreement * len(label))

    def clean_part(row: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor]:
        return (F.cross_entropy(head(row).float(), label, reduction="sum"),)

    hard, soft, agreement = (x / len(labels) for x in _in_chunks(part, students, twins, labels))
    mean = None
    if clean:
        has_label = batch.labels[:, :c] != NO_LABEL
        (total,) = _in_chunks(clean_part, hidden[:, :c][has_label], batch.labels[:, :c][has_label])
        mean = total / has_label.sum()
    return Losses(hard, soft, mean, float(agreement))


def _in_chunks(function: Callable, *rows: torch.Tensor) -> list[torch.Tensor]:
    """Sums of `function` over chunks of the rows; what a chunk computed is computed again for its gradient where there are several."""
    chunks = list(zip(*(x.split(CHUNK) for x in rows)))
    results = [checkpoint(function, *chunk, use_reentrant=False) if len(chunks) > 1 else function(*chunk) for chunk in chunks]
    return [torch.stack(parts).sum() for parts in zip(*results)]
