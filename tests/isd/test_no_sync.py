"""No host synchronisation: every op of a step runs on tensors without data, on the device of its inputs."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from idlm_sglang.isd import SamplingRows, isd_step, noise, row_offsets, step, step_positions, step_tokens, target_scores, verify, visible_rows

VOCAB = 32
FLAGS = [(False, False, False), (True, False, False), (True, True, False), (True, False, True), (True, True, True)]


def rows(batch: int, device: str, flags: tuple[bool, bool, bool]) -> SamplingRows:
    return SamplingRows(
        temperature=torch.empty(batch, device=device),
        top_k=torch.empty(batch, dtype=torch.int32, device=device),
        top_p=torch.empty(batch, device=device),
        min_p=torch.empty(batch, device=device),
        seed=torch.empty(batch, dtype=torch.int64, device=device),
        coupled=torch.empty(batch, dtype=torch.bool, device=device),
        any_sampled=flags[0],
        any_truncated=flags[1],
        any_rejection=flags[2],
    )


def whole_step(batch: int, k: int, device: str, flags: tuple[bool, bool, bool], salvage: bool = False, small: torch.dtype = torch.int32):
    """Everything between two forwards, on tensors without data."""
    with FakeTensorMode():
        ints = lambda *shape, dtype=torch.int64: torch.empty(shape, dtype=dtype, device=device)
        drafts, counts, seq_lens = ints(batch, k), ints(batch, dtype=small), ints(batch, dtype=small)
        tokens = step_tokens(ints(batch), drafts, counts, VOCAB - 1)
        positions = step_positions(seq_lens, tokens.shape[1])
        logits, log_q = torch.empty(batch, 2 * k + 1, VOCAB, device=device), torch.empty(batch, k, device=device)
        q = torch.empty(batch, k, VOCAB, device=device) if flags[2] else None
        forks = ints(batch, dtype=small) if salvage else None
        branch = [f(counts, forks, 2 * k + 1) for f in (row_offsets, visible_rows)] if salvage else []
        out = isd_step(logits, drafts, counts, log_q, q, ints(batch, dtype=small), seq_lens, rows(batch, device, flags), forks, salvage)
        parts = [tokens, positions, *branch, *vars(out).values(), *vars(out.proposal).values()]
        return [part for part in parts if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("batch, salvage", [(1, False), (4, False), (4, True)])
def test_a_step_never_asks_for_a_value(batch, salvage, k, flags, device):
    """With ``cuda`` (no GPU needed) a tensor made on the host by mistake is noticed too."""
    parts = whole_step(batch, k, device, flags, salvage)
    assert {part.device.type for part in parts} == {device}
    assert all(part.shape[0] == batch for part in parts)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_target_and_noise_never_ask_for_a_value(device):
    with FakeTensorMode():
        scores = target_scores(torch.empty(3, 5, VOCAB, device=device), rows(3, device, (True, True, True)))
        seeds, positions = (
            torch.empty(3, dtype=torch.int64, device=device),
            torch.empty(3, 5, dtype=torch.int32, device=device),
        )
        g, u = noise.gumbel(seeds, positions, VOCAB), noise.uniform(seeds, positions)
    assert g.shape == scores.shape == (3, 5, VOCAB) and u.shape == (3, 5)
    assert {x.device.type for x in (scores, g, u)} == {device} and {x.dtype for x in (scores, g, u)} == {torch.float32}


PLANTED = {
    "item": lambda accepted: verify.leading(accepted) + 0 * int(accepted.sum().item()),
    "if": lambda accepted: verify.leading(accepted) if accepted.any() else accepted.sum(1),
    "tolist": lambda accepted: verify.leading(accepted) + 0 * len(accepted.tolist()),
    "nonzero": lambda accepted: verify.leading(accepted) + 0 * len(accepted.nonzero()),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_synchronisation_is_noticed(name, monkeypatch):
    monkeypatch.setattr(step, "leading", PLANTED[name])
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        whole_step(2, 2, "cpu", (True, False, True))


def test_a_planted_host_tensor_is_noticed(monkeypatch):
    monkeypatch.setattr(step, "leading", lambda accepted: verify.leading(accepted) + torch.arange(len(accepted)))
    with pytest.raises(RuntimeError, match="device"):
        whole_step(2, 2, "cuda", (True, False, True))
