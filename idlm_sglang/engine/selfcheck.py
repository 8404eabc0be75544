"""Live self-check: a share of finished answers is asked again at one token per step, in idle capacity, and compared.

Runs in the process that holds SGLang's ``TokenizerManager``, on its event loop, through its ``generate_request``. A
check never runs beside a client's request: when one arrives, the check is aborted and its turn comes again.
"""

import asyncio
import json
import logging
import random
import uuid
from collections import deque
from dataclasses import dataclass
from typing import Any

from idlm_sglang.config import COUPLED, Settings
from idlm_sglang.engine.requests import SELFCHECK_PARAM, STRIDE_PARAM
from idlm_sglang.engine.ties import TOLERANCE, Parting, gap, near_tie

logger = logging.getLogger(__name__)

QUEUE = 64
RID_PREFIX = "idlm-selfcheck-"
_IDLE_SECONDS = 0.1  # without a client's request before a check starts: closed-loop clients pause for less
_POLL_SECONDS = 0.02
# Largest log-probabilities looked at for a near-tie at the edge of top-k or top-p.
_TOP = 64
# What else decides an answer, beside prompt and sampling parameters.
_KEPT_FIELDS = ("custom_logit_processor", "require_reasoning", "max_thinking_tokens")
_KEPT_META = ("finish_reason", "seed", "weight_version", "prompt_tokens")
_UNREPEATABLE_FIELDS = ("input_embeds", "session_params", "positional_embed_overrides", "lora_path")


@dataclass(frozen=True)
class Check:
    """A finished answer that is to be asked again.

    Attributes:
        rid: the client's request.
        obj: its ``GenerateReqInput``.
        tokens: the answer.
        meta: the fields of its ``meta_info`` that a comparison needs.
    """

    rid: str
    obj: Any
    tokens: list[int]
    meta: dict


class Superseded(Exception):
    """The check cannot be decided any more: the weights or the prompt are not those of the answer."""


class SelfCheck:
    """Queue and worker of one server's checks.

    Args:
        manager: SGLang's ``TokenizerManager``.
        settings: share and sampling rule.
        series: called with ``total``, ``mismatch``, ``tie`` or ``dropped`` for each event.
    """

    def __init__(self, manager, settings: Settings, series):
        self._manager = manager
        self._settings = settings
        self._count = series
        self._queue: deque[Check] = deque()
        self._worker: asyncio.Task | None = None
        self._running: str | None = None
        self._aborted: str | None = None
        self._tolerance = TOLERANCE.get(str(manager.model_config.dtype), 0.0)

    def offer(self, obj, tokens: list[int], meta: dict) -> None:
        """A request has finished; it may be drawn for a check. Called on the event loop."""
        if not obj.log_metrics or not tokens or not self._repeatable(obj, meta) or random.random() >= self._settings.selfcheck:
            return
        if len(self._queue) >= QUEUE:
            self._count("dropped")
            return
        self._queue.append(Check(meta["id"], obj, list(tokens), {name: meta[name] for name in _KEPT_META if name in meta}))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work())

    def client_arrives(self, obj) -> None:
        """A request is about to be sent to the scheduler. If it is a client's, a running check makes room before it."""
        if self._running is not None and obj.rid != self._running and obj.log_metrics:
            self._abort(self._running)

    async def give_way(self) -> None:
        """Return once no check is running; the aborted one comes again."""
        while self._running is not None:
            self._abort(self._running)
            await asyncio.sleep(_POLL_SECONDS)

    def _repeatable(self, obj, meta: dict) -> bool:
        if meta["finish_reason"]["type"] == "abort" or any(getattr(obj, name, None) for name in _UNREPEATABLE_FIELDS) or obj.contains_mm_input():
            return False
        params = obj.sampling_params or {}
        if (params.get("custom_params") or {}).get(SELFCHECK_PARAM):
            return False
        greedy = self._settings.sampling_rule == COUPLED or params.get("temperature") == 0 or params.get("top_k") == 1
        return "seed" in meta or greedy

    def _busy(self) -> bool:
        """Whether a request of a client is in flight. Health checks and the like are not a client's."""
        return any(rid != self._running and state.obj.log_metrics for rid, state in self._manager.rid_to_state.items())

    def _stopped(self) -> bool:
        return self._manager.gracefully_exit

    def _weights_change(self) -> bool:
        """Whether other weights are being loaded, or are about to be once a running check lets them."""
        lock = self._manager.model_update_lock
        return lock._writer_active or lock._waiting_writers > 0

    def _forget(self) -> None:
        """Answers of the old weights cannot be checked with the new ones, whose version may have the same name."""
        while self._queue:
            self._queue.popleft()
            self._count("dropped")

    async def _work(self) -> None:
        """Check after check until the queue is empty."""
        while self._queue and not self._stopped():
            if not await self._idle():
                continue
            if not self._queue:
                return
            check = self._queue.popleft()
            try:
                if not await self._decide(check):
                    # Behind the others: a long answer must not keep short ones from the gaps they fit into.
                    self._queue.append(check)
            except Superseded:
                self._count("dropped")
            except Exception:
                logger.exception("idlm: the self-check of %s failed", check.rid)
                self._count("dropped")

    async def _idle(self) -> bool:
        for _ in range(int(_IDLE_SECONDS / _POLL_SECONDS)):
            if self._weights_change():
                self._forget()
            if self._busy() or self._manager.is_pause:
                await asyncio.sleep(_POLL_SECONDS)
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return not self._busy()

    async def _decide(self, check: Check) -> bool:
        """Compare one answer with its repetition; False where a client's request came in between."""
        again = await self._ask(check, self._request(check))
        if again is None:
            return False
        at = first_difference(check.tokens, again["output_ids"])
        if at is None and check.meta["finish_reason"]["type"] == again["meta_info"]["finish_reason"]["type"]:
            self._count("total")
            return True
        score = None
        if self._tolerance > 0 and at is not None and at < min(len(check.tokens), len(again["output_ids"])):
            scored = await self._ask(check, self._request(check, tokens=(check.tokens[at], again["output_ids"][at]), length=at + 1))
            if scored is None:
                return False
            score = self._parting(check, again, scored, at)
        self._count("total")
        if score is not None and near_tie(score, self._tolerance):
            self._count("tie")
            logger.info("idlm: self-check of %s: near-tie at token %d, %.3f apart in logits", check.rid, at, gap(score))
        else:
            self._count("mismatch")
            logger.warning("%s", self._mismatch(check, again, at, score))
        return True

    def _request(self, check: Check, tokens: tuple[int, int] | None = None, length: int | None = None):
        """The same request at one token per step; with ``tokens``, also their log-probabilities over ``length`` tokens."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        asked = check.obj.sampling_params or {}
        if length is None:
            # A mismatch must not run on where the answer had stopped.
            length = max(len(check.tokens) + (check.meta["finish_reason"]["type"] == "stop"), asked.get("min_new_tokens") or 0)
        else:
            asked = {**asked, "min_new_tokens": min(asked.get("min_new_tokens") or 0, length)}
        marker = {STRIDE_PARAM: 1, SELFCHECK_PARAM: True}
        params = {**asked, "n": 1, "max_new_tokens": length, "custom_params": {**(asked.get("custom_params") or {}), **marker}}
        if "seed" in check.meta:
            params["sampling_seed"] = check.meta["seed"]
        rid = RID_PREFIX + uuid.uuid4().hex
        # A cache key of its own: no KV that the strided answer may have left is taken for granted.
        fields = {"rid": rid, "sampling_params": params, "log_metrics": False, "no_logs": True, "extra_key": rid}
        fields |= {name: getattr(check.obj, name) for name in _KEPT_FIELDS}
        fields |= {"text": check.obj.text} if check.obj.input_ids is None else {"input_ids": check.obj.input_ids}
        if tokens is not None:
            fields |= {"return_logprob": True, "token_ids_logprob": list(tokens), "top_logprobs_num": _TOP}
        return GenerateReqInput(**fields)

    async def _ask(self, check: Check, obj) -> dict | None:
        """The server's answer, or None if it was aborted."""
        self._running, outdated = obj.rid, False
        task = asyncio.ensure_future(self._generate(obj))
        try:
            while not task.done():
                await asyncio.wait([task], timeout=_POLL_SECONDS)
                # Again and again: an abort that overtakes the request is not heard.
                outdated = outdated or self._weights_change()
                if not task.done() and (outdated or self._busy() or self._stopped()):
                    self._abort(obj.rid)
        finally:
            self._running = None
        if outdated:
            task.exception()  # seen: an abort may be one
            self._forget()
            raise Superseded
        try:
            answer = task.result()
        except Exception:
            if self._aborted == obj.rid:  # in SGLang's grammar queue an abort is an HTTP error
                return None
            raise
        meta = answer["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            return None
        if any(meta[key] != check.meta[key] for key in ("weight_version", "prompt_tokens")):
            raise Superseded
        return answer

    async def _generate(self, obj) -> dict:
        # To its end: a generator left at its answer keeps a lock that weight updates wait for.
        async for answer in self._manager.generate_request(obj):
            found = answer
        return found

    def _abort(self, rid: str) -> None:
        """Past ``TokenizerManager.abort_request``, which would count it among the clients' aborted requests."""
        from sglang.srt.managers.io_struct import AbortReq

        self._aborted = rid
        self._manager._dispatch_to_scheduler(AbortReq(rid=rid, abort_all=False))

    def _parting(self, check: Check, again: dict, scored: dict, at: int) -> Parting | None:
        """What the scored repetition says of position ``at``; None where it parted from the first one."""
        if scored["output_ids"][:at] != again["output_ids"][:at]:
            return None
        meta, old, new = scored["meta_info"], check.tokens[at], again["output_ids"][at]
        found = {token: logprob for logprob, token, *_ in meta["output_token_ids_logprobs"][at]}
        top = [logprob for logprob, *_ in meta["output_top_logprobs"][at]]
        if "seed" not in check.meta:
            return Parting((found[old], found[new]), (0.0, 0.0), top)
        params = check.obj.sampling_params or {}
        asked = {name: params[name] for name in ("temperature", "top_p", "min_p") if params.get(name) is not None}
        if (params.get("top_k") or -1) > 0:
            asked["top_k"] = params["top_k"]
        return Parting((found[old], found[new]), _noise(check.meta["seed"], meta["prompt_tokens"] + at - 1, old, new), top, **asked)

    def _mismatch(self, check: Check, again: dict, at: int | None, score: Parting | None) -> str:
        """One line, enough to find and to replay the answer; its JSON is a line for ``idlm replay``."""
        old, new = check.tokens, again["output_ids"]
        if at is None:
            where = f"finish reason {check.meta['finish_reason']['type']}, at one token per step {again['meta_info']['finish_reason']['type']}"
        else:
            was, is_now = (str(tokens[at]) if at < len(tokens) else "the end" for tokens in (old, new))
            where = f"first at token {at}: {was}, at one token per step {is_now}"
        apart = "" if score is None else f"; {gap(score):.3f} apart in logits"
        line = f"idlm: SELF-CHECK MISMATCH: rid {check.rid}, seed {check.meta.get('seed')}, {where}{apart}"
        if check.obj.no_logs:
            return line
        prompt = {"text": check.obj.text} if check.obj.input_ids is None else {"input_ids": check.obj.input_ids}
        answer = {"output_ids": old, "meta_info": {k: check.meta[k] for k in ("finish_reason", "seed") if k in check.meta}}
        entry = {"path": "/generate", "request": {**prompt, "sampling_params": check.obj.sampling_params or {}}, "response": answer}
        return f"{line}; replay: {json.dumps(entry, default=str)}"


def first_difference(left: list[int], right: list[int]) -> int | None:
    """The first position at which two answers differ, the shorter one's end included; None where they are equal."""
    if left == right:
        return None
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


def _noise(seed: int, position: int, *tokens: int) -> tuple[float, ...]:
    """The tokens' Gumbel noise at a row's position."""
    import torch

    from idlm_sglang.isd.noise import gumbel

    g = gumbel(torch.tensor([seed]), torch.tensor([[position]]), max(tokens) + 1)[0, 0]
    return tuple(g[token].item() for token in tokens)


def _series(manager):
    """Counters of the HTTP process, in the directory that SGLang's ``/metrics`` collects."""
    if not manager.enable_metrics:
        return lambda event: None
    # Imported late, as in engine.metrics.
    from prometheus_client import Counter

    texts = {
        "total": ("idlm:selfcheck", "Finished answers asked again at one token per step and compared."),
        "mismatch": ("idlm:selfcheck_mismatch", "Of these, answers that differed and by more than a near-tie."),
        "tie": ("idlm:selfcheck_tie", "Of these, answers that parted at a near-tie in low precision."),
        "dropped": ("idlm:selfcheck_dropped", "Answers drawn for a check that never ran: queue full, weights changed, or the check failed."),
    }
    labels = {"model_name": manager.served_model_name}
    counters = {event: Counter(name, text, labelnames=list(labels)).labels(**labels) for event, (name, text) in texts.items()}
    return lambda event: counters[event].inc()


def checker_of(manager, settings: Settings) -> SelfCheck | None:
    """The manager's checker, made at its first finished request; None where checking is off."""
    if settings.selfcheck == 0:
        return None
    checker = getattr(manager, "idlm_selfcheck", None)
    if checker is None:
        checker = manager.idlm_selfcheck = SelfCheck(manager, settings, _series(manager))
    return checker
