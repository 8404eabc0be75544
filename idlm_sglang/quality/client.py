"""lm-eval's view of an endpoint: prompts in, answers out.

lm-eval's own `local-chat-completions` is not used, because it would spoil the comparison in silence: it sends one seed for
all questions (and for all repeats of one), lets a task's stop strings cut the thinking off, keeps four of them, turns an
answer that it cannot read into an empty one, and sends a task's beginning of the answer as a user's message to SGLang.
"""

import hashlib
import json
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from tqdm import tqdm

from idlm_sglang.quality.endpoint import Endpoint
from idlm_sglang.quality.options import Plan

PATH = "/v1/chat/completions"
_MAX_TOKENS = 2048  # where neither the user nor the task says
_CUT = "length"


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: everything the model wrote, thinking included.
        final: what is scored: behind the thinking, up to the task's stop strings.
        finish: ``stop`` or ``length``.
        tokens: completion tokens as the server counts them.
    """

    text: str
    final: str
    finish: str
    tokens: int


class ChatModel(LM):
    """An arm as lm-eval asks it; it keeps every answer.

    Attributes:
        answers: by prompt (as in a sample's ``arguments``), the answers to it in the order of asking.
        asked, reused: answers that came from the endpoint, and from an earlier run's log.
    """

    def __init__(self, endpoint: Endpoint, model: str, plan: Plan, log: Path | None):
        super().__init__()
        self.name = endpoint.arm.name
        self.answers: dict[str, list[Answer]] = defaultdict(list)
        self.asked = self.reused = 0
        self.round = 0
        self.shown = ""  # what the progress bar names
        self._endpoint, self._model, self._plan = endpoint, model, plan
        self._lock = threading.Lock()
        self._known = _read(log) if log and plan.resume else {}
        self._log = log.open("a" if plan.resume else "w", encoding="utf-8") if log else None

    # What lm-eval asks of a model.
    tokenizer_name = ""

    def chat_template(self, chat_template: bool | str = False) -> str:
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as JSON: the server applies the template."""
        return json.dumps(chat_history, ensure_ascii=False)

    def loglikelihood(self, requests):
        raise NotImplementedError("chat endpoints give no log-likelihoods of a prompt")

    loglikelihood_rolling = loglikelihood

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Final answers, in order. The first failure of the endpoint ends it with :class:`EndpointError`."""
        times: Counter[str] = Counter()
        todo = []
        for request in requests:
            prompt, settings = request.args
            todo.append((prompt, *self._body(prompt, dict(settings), times[prompt])))
            times[prompt] += 1
        with ThreadPoolExecutor(self._plan.clients) as pool, tqdm(total=len(todo), desc=self.shown, leave=False, unit="answer", disable=None) as bar:
            futures = [pool.submit(self._ask, body, stops, bar) for _, body, stops in todo]
            try:
                found = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for (prompt, _, _), answer in zip(todo, found):
            self.answers[prompt].append(answer)
        return [answer.final for answer in found]

    def close(self) -> None:
        if self._log:
            self._log.close()

    def _body(self, prompt: str, settings: dict[str, Any], time: int) -> tuple[dict[str, Any], list[str]]:
        """The request for the ``time``-th asking of a prompt, and the strings at which its answer is cut afterwards."""
        plan, messages = self._plan, json.loads(prompt)
        stops = settings.pop("until", None) or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        greedy = settings.pop("do_sample", None) is False and "temperature" not in settings
        longest = settings.pop("max_gen_toks", settings.pop("max_tokens", _MAX_TOKENS))
        sampling = {"temperature": 0.0} if greedy else {}
        sampling |= {"max_tokens": longest} | settings | plan.sampling
        seed = int.from_bytes(hashlib.sha256(f"{plan.seed} {self.round} {time} {prompt}".encode()).digest()[:6])
        body = {"model": self._model, "messages": messages, "seed": seed} | sampling
        if messages[-1]["role"] == "assistant":
            # The task begins the answer; without this SGLang would take the beginning for a question.
            body["continue_final_message"] = True
        if plan.thinking != "model":
            body["chat_template_kwargs"] = {"enable_thinking": plan.thinking == "on"}
        if plan.thinking == "off" and stops:
            body["stop"] = stops
        return body | self._endpoint.arm.extra, stops

    def _ask(self, body: dict[str, Any], stops: list[str], bar: tqdm) -> Answer:
        key = json.dumps(body, sort_keys=True)
        reply = self._known.get(key)
        if reply is None:
            reply = self._endpoint.chat(body)
        with self._lock:
            if key in self._known:
                self.reused += 1
            else:
                self.asked += 1
                if self._log:
                    self._log.write(json.dumps({"path": PATH, "request": body, "response": reply}, ensure_ascii=False) + "\n")
                    self._log.flush()
            bar.update()
        return read_answer(reply, stops, self._plan.think_end, self._plan.thinking == "on")


def read_answer(reply: dict[str, Any], stops: list[str], think_end: str, thinking: bool = False) -> Answer:
    """What a chat completion says. Thinking that never ended leaves nothing to score."""
    choice = reply["choices"][0]
    content = choice["message"].get("content") or ""
    thought = choice["message"].get("reasoning_content") or ""
    opening = think_end.replace("</", "<", 1)
    if think_end and think_end in content:
        final = content.rsplit(think_end, 1)[1].lstrip()
    elif opening != think_end and content.lstrip().startswith(opening):
        final = ""
    elif thinking and not thought and choice["finish_reason"] == _CUT:
        final = ""  # the template opened the thinking, and the limit came before its end
    else:
        final = content.lstrip() if thought else content
    for stop in filter(None, stops):
        final = final.split(stop, 1)[0]
    return Answer(thought + content, final, choice["finish_reason"], int((reply.get("usage") or {}).get("completion_tokens") or 0))


def _read(log: Path) -> dict[str, dict]:
    """The answers of an earlier run, by their requests. A line that it was writing when it ended is cut off."""
    if not log.exists():
        return {}
    text = log.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with log.open("r+b") as file:
            file.truncate(len(whole))
    entries = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    return {json.dumps(entry["request"], sort_keys=True): entry["response"] for entry in entries}
