"""One endpoint over HTTP: what it serves, and a chat answer from it. Every failure is one line."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai

from idlm_sglang.quality.options import Arm, Plan

_LOCAL = ("127.0.0.1", "localhost", "::1")
_PREFLIGHT_SECONDS = 30.0
# Of /model_info and /server_info: what changes answers.
_MODEL_INFO = ("model_path", "tokenizer_path", "weight_version", "preferred_sampling_params")
_SERVER_INFO = (
    "version", "dtype", "kv_cache_dtype", "quantization", "attention_backend", "sampling_backend", "grammar_backend", "reasoning_parser",
    "speculative_algorithm", "speculative_num_steps", "speculative_num_draft_tokens", "speculative_draft_model_path", "dllm_algorithm",
    "tp_size", "dp_size", "max_running_requests", "page_size", "disable_overlap_schedule", "random_seed", "enable_deterministic_inference", "device",
)  # fmt: skip


class EndpointError(Exception):
    """An endpoint that cannot be asked, or did not answer as it must: one line."""


@dataclass(frozen=True)
class Served:
    """What an endpoint says of itself.

    Attributes:
        model: the id to ask for.
        context: longest prompt and answer in tokens, or None where it does not say.
        info: essentials of SGLang's ``/model_info`` and ``/server_info``; empty for another server.
    """

    model: str
    context: int | None
    info: dict[str, Any]


class Endpoint:
    """The connection to one arm."""

    def __init__(self, arm: Arm, plan: Plan):
        self.arm = arm
        # A proxy from the environment has no business between two processes of one machine.
        trust = urlsplit(arm.url).hostname not in _LOCAL
        limits = httpx.Limits(max_connections=plan.clients, max_keepalive_connections=plan.clients)
        self._http = httpx.Client(trust_env=trust, limits=limits, timeout=httpx.Timeout(plan.timeout, connect=_PREFLIGHT_SECONDS))
        self._headers = {"Authorization": f"Bearer {plan.api_key}"} if plan.api_key else {}
        self._client = openai.OpenAI(
            base_url=arm.url + "/v1", api_key=plan.api_key or "none", max_retries=plan.retries, timeout=plan.timeout, http_client=self._http
        )

    def served(self) -> Served:
        """Raises :class:`EndpointError` where no chat server answers."""
        try:
            cards = self._get("/v1/models")["data"]
            model, context = cards[0]["id"], cards[0].get("max_model_len")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self.failed("names no model at /v1/models") from None
        info = {}
        for path, wanted in (("/model_info", _MODEL_INFO), ("/server_info", _SERVER_INFO)):
            try:
                said = self._get(path)
            except EndpointError:
                continue  # not SGLang, or closed to us: an answer needs neither
            info |= {key: said[key] for key in wanted if isinstance(said, dict) and said.get(key) is not None}
        return Served(model, context if isinstance(context, int) else None, info)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """The parsed response to a ``/v1/chat/completions`` body. Failed tries are repeated with the same body.

        Raises:
            EndpointError: refused, unreachable, or an answer without a choice or broken off by the server.
        """
        rest = {key: value for key, value in body.items() if key not in ("model", "messages")}
        try:
            reply = self._client.chat.completions.create(model=body["model"], messages=body["messages"], extra_body=rest).model_dump(mode="json")
        except openai.APIStatusError as error:
            said = error.body.get("message") if isinstance(error.body, dict) else None
            raise self.failed(f"refuses a request: HTTP {error.status_code} {_line(said or error.response.text)}") from None
        except openai.APITimeoutError:
            raise self.failed("did not answer within --timeout") from None
        except openai.APIConnectionError as error:
            raise self.failed(f"does not answer ({_line(error.__cause__ or error)})") from None
        except (openai.OpenAIError, ValueError) as error:
            raise self.failed(f"answers with what is no chat completion ({_line(error)})") from None
        choices = reply.get("choices")
        if not choices or not isinstance(choices[0].get("message"), dict):
            raise self.failed(f"answers without a choice: {_line(reply)}")
        if choices[0].get("finish_reason") not in ("stop", "length"):
            raise self.failed(f"broke an answer off: finish_reason {choices[0].get('finish_reason')}")
        return reply

    def failed(self, what: str) -> EndpointError:
        return EndpointError(f"idlm: endpoint {self.arm.name}={self.arm.url} {what}; allowed: a running OpenAI-style chat server")

    def _get(self, path: str) -> Any:
        try:
            reply = self._http.get(self.arm.url + path, headers=self._headers, timeout=_PREFLIGHT_SECONDS)
            if reply.status_code in (401, 403):
                raise self.failed(f"refuses the API key (HTTP {reply.status_code})")
            reply.raise_for_status()
            return reply.json()
        except httpx.HTTPStatusError as error:
            raise self.failed(f"answers {path} with HTTP {error.response.status_code}") from None
        except httpx.HTTPError as error:
            raise self.failed(f"does not answer ({_line(error)})") from None
        except ValueError:
            raise self.failed(f"answers {path} with no JSON") from None


def _line(said: object) -> str:
    return " ".join(str(said).split())[:300]
