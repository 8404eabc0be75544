"""The whole comparison, part by part, and its exit code."""

from idlm_sglang.config import SettingError
from idlm_sglang.parity import answers, prompts, refusals, report, sampled, speed
from idlm_sglang.parity.endpoint import BASELINE, CANDIDATE, Side
from idlm_sglang.parity.options import AUTO, EXACT, Plan
from idlm_sglang.parity.prompts import GREEDY, SEEDED

PARITY, NOT_AT_PARITY = 0, 1


def run(plan: Plan) -> int:
    """Compare, print, write the report. Raises :class:`SettingError` and ``EndpointError``."""
    asks = prompts.read(plan.prompts, plan.limit)
    if plan.out is not None:
        try:
            plan.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(f"--out {plan.out} cannot be written ({error.strerror}); allowed: a directory") from None
    left = Side(BASELINE, plan.baseline, plan.api_key, plan)
    right = Side(CANDIDATE, plan.candidate, plan.candidate_api_key, plan)
    served = {side.name: {"url": side.url, "model": (said := side.prepare()).model, **said.info} for side in (left, right)}
    exact, why = _seeded_exactly(plan, left, right)
    kinds = {GREEDY, SEEDED} if exact else {GREEDY}
    count = prompts.counts(asks)
    head = f"{len(asks)} requests: {count[GREEDY]} greedy, {count[SEEDED]} seeded, {count[prompts.SAMPLED]} sampled. Seeded answers are compared {why}."
    print(head, flush=True)
    findings = []

    def found(finding):
        findings.append(finding)
        print(f"  {finding.name:8} {finding.word:4}  {finding.line}", flush=True)

    pairs = answers.ask_both(asks, left, right, plan.concurrency)
    found(answers.determined(GREEDY, answers.answered(pairs, GREEDY), left, right, plan))
    if exact:
        found(answers.determined(SEEDED, answers.answered(pairs, SEEDED), left, right, plan))
    found(sampled.compare(asks, not exact, left, right, plan))
    found(answers.scores(pairs))
    found(answers.fields(pairs, kinds, plan))
    found(refusals.compare(left, right, bool(plan.api_key)))
    found(speed.compare(asks, left, right, plan))
    if plan.out is not None:
        report.write(plan.out, plan, head, served, findings)
        print(f"idlm: the report is in {plan.out}")
    print(f"idlm: {report.verdict(findings)}")
    return NOT_AT_PARITY if any(finding.passed is False for finding in findings) else PARITY


def _seeded_exactly(plan: Plan, left: Side, right: Side) -> tuple[bool, str]:
    """Whether a seed gives the same text on both servers: only the plugin's sampler, which both must have, does."""
    if plan.seeded != AUTO:
        return plan.seeded == EXACT, f"{'token by token' if plan.seeded == EXACT else 'by distribution'} (--seeded {plan.seeded})"
    lacking = [side.name for side in (left, right) if "idlm" not in side.internal_state()]
    if not lacking:
        return True, "token by token: both servers show the plugin"
    return False, f"by distribution: the {' and the '.join(lacking)} does not show the plugin, whose sampler a seed belongs to"
