"""The per-op benchmarks: every op is checked against its reference before it is timed, and a wrong one ends the run."""

import csv
from dataclasses import replace

import pytest
import torch

from benchmarks.kernels import choose, harness, page_table, penalties, propose, step, target, verify
from benchmarks.kernels.harness import LIBRARY, OPS, OURS, REFERENCE, Arm, Case, Options, main, measure
from idlm_sglang.engine import step_ops
from idlm_sglang.engine.grammar import GrammarStep
from idlm_sglang.isd import noise
from idlm_sglang.isd.tables import StepTables
from idlm_sglang.platform import attention

PACE = ["--device", "cpu", "--quick", "--seconds", "0"]


@pytest.fixture(autouse=True)
def settings_given_back():
    """The run sets torch's threads; and compiling SGLang's penalty kernel would take longer than all the rest."""
    before = torch.get_num_threads()
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(before)


def test_every_op_is_right_and_every_arm_leaves_a_figure_or_a_reason(tmp_path, capsys):
    main([*PACE, "--out", str(tmp_path)])
    assert "| variant |" in capsys.readouterr().out
    for op in OPS:
        lines = (tmp_path / f"{op}.cpu.csv").read_text().splitlines()
        head = [line for line in lines if line.startswith("# ")]
        assert [line[2:].split(":")[0] for line in head] == ["device", "threads", "clock", "load", "versions", "commit", "command", "date"]
        rows = list(csv.DictReader(lines[len(head) :]))
        kinds = [row["kind"] for row in rows]
        assert kinds.count(OURS) == kinds.count(REFERENCE) > 0
        for row in rows:
            if row["samples"] == "0":
                assert row["kind"] != OURS and row["note"].startswith("not "), row
            else:
                assert 0 < float(row["q1_us"]) <= float(row["median_us"]) <= float(row["q3_us"]), row


def untruncated(op):
    return lambda logits, rows: op(logits, replace(rows, any_truncated=False))


# Where an op is looked up when its benchmark calls it, and how it is broken.
BROKEN = {
    "attention": (attention, "attend_parts", lambda op: lambda *args: op(*args) * 1.01),
    "target": (target, "target_scores", untruncated),
    "noise": (noise, "gumbel", lambda op: lambda seeds, positions, *rest: op(seeds, positions + 1, *rest)),
    "verify": (verify, "leading", lambda op: lambda accepted: (op(accepted) + 1) % (accepted.shape[1] + 1)),
    "choose": (choose, "target_scores", lambda op: lambda logits, rows: op(logits, rows).roll(1, -1)),
    "propose": (propose, "propose", lambda op: lambda *args: replace(op(*args), drafts=op(*args).drafts + 1)),
    "step": (step, "isd_step", lambda op: lambda *args, **more: replace(op(*args, **more), last=op(*args, **more).last + 1)),
    "sampler": (step_ops, "target_scores", untruncated),
    "penalties": (penalties, "penalise", lambda op: lambda a, b, c, d, in_front, *rest: op(a, b, c, d, torch.zeros_like(in_front), *rest)),
    "grammar": (GrammarStep, "apply", lambda op: lambda self, logits: None),
    "state": (StepTables, "laid_out", lambda op: lambda self, pending, drafts, pair, mask: op(self, pending, drafts, pair * 0 + self.k + 2, mask)),
    "page_table": (page_table, "assign_req_to_token", lambda op: lambda a, b, start, end, *rest: op(a, b, start + 1, end + 1, *rest)),
}


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_op_ends_the_benchmark_without_a_figure(op, tmp_path, monkeypatch):
    where, name, broken = BROKEN[op]
    monkeypatch.setattr(where, name, broken(getattr(where, name)))
    with pytest.raises(SystemExit) as ended:
        main([op, *PACE, "--out", str(tmp_path)])
    print(ended.value)
    assert str(ended.value).startswith(f"{op}, ") and "ours is wrong, nothing was timed" in str(ended.value)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_ended_keeps_the_cases_it_had(tmp_path, monkeypatch):
    cases = []

    def interrupted(op, case, options):
        cases.append(case)
        if len(cases) == 2:
            raise KeyboardInterrupt
        return measure(op, case, options)

    monkeypatch.setattr(harness, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["noise", *PACE, "--out", str(tmp_path)])
    (kept,) = tmp_path.iterdir()
    rows = list(csv.DictReader(line for line in kept.read_text().splitlines() if not line.startswith("# ")))
    assert kept.name == "noise.cpu.part.csv" and sum(row["kind"] == OURS for row in rows) == 1


def test_a_library_that_differs_or_cannot_run_is_not_timed():
    def broken() -> torch.Tensor:
        raise RuntimeError("no such kernel")

    one = torch.ones(1)
    arms = [Arm("ours", OURS, lambda: one), Arm("plain", REFERENCE, lambda: one), Arm("other", LIBRARY, lambda: one + 1), Arm("none", LIBRARY, broken)]
    ours, plain, other, none = measure("op", Case("any", {}, lambda: arms), Options(seconds=0, rounds=1))
    assert ours.times and plain.times and not other.times and not none.times
    assert other.note.startswith("not run: differs from the reference") and none.note == "not run: RuntimeError: no such kernel"


@pytest.mark.parametrize("words, said", [(["atention"], "no op 'atention'; allowed: attention, "), (["--threads", "0"], "--threads 0; allowed: ")])
def test_a_mistake_ends_in_a_line_that_says_what_is_allowed(words, said, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert said in capsys.readouterr().err
