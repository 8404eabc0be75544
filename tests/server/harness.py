"""A server process, requests to it, and the prompts the tests share."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import requests

from idlm_sglang.demo import CHECKPOINT_DIR, corpus
from idlm_sglang.platform import accelerator_available
from idlm_sglang.serving.ports import free_port

ROOT = Path(__file__).parents[2]
CHECKPOINT = str(CHECKPOINT_DIR)
START_SECONDS = 240
# Of every server on a GPU, in front of a test's own: several share its memory, and what they compute is to be the same in each.
GPU_FLAGS = "--attention-backend triton --sampling-backend pytorch --mem-fraction-static 0.1 --max-total-tokens 65536 --cuda-graph-backend-prefill disabled"

_OF_THREAD = threading.local()


def clients(count: int) -> ThreadPoolExecutor:
    """Threads that keep their connection: a new one costs a short request much of its time."""
    return ThreadPoolExecutor(count, initializer=lambda: setattr(_OF_THREAD, "session", requests.Session()))


@contextmanager
def side_by_side(*servers: "Server"):
    """Servers that start at the same time; all have ended behind it."""
    with ThreadPoolExecutor(len(servers)) as pool:
        starts = [pool.submit(server.started) for server in servers]
    try:
        for start in starts:
            start.result()
        yield servers
    finally:
        for server in servers:
            server.stop()


def common_flags() -> list[str]:
    """SGLang's flags for every server of the tests: those of ``IDLM_TEST_SERVER_FLAGS``, without it ``GPU_FLAGS`` where there is a GPU."""
    return shlex.split(os.environ.get("IDLM_TEST_SERVER_FLAGS", GPU_FLAGS if accelerator_available() else ""))


def with_pythonpath(directory: str) -> str:
    """``PYTHONPATH`` that puts a directory of these tests, with its ``sitecustomize``, before what is there already."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parent / directory), os.environ.get("PYTHONPATH")]))


class Server:
    """``python -m sglang.launch_server`` on 127.0.0.1 as a context manager; ``module``: by what, ours starts sooner."""

    def __init__(self, name: str, model: str, logs: Path, *flags: str, env: dict | None = None, dtype: str = "float32", module: str = "tests.server.launch"):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = logs / f"{name}.log"
        self.command = [sys.executable, "-m", module, "--model-path", model, "--dtype", dtype]
        # Idle schedulers would otherwise spin on the two cores the servers share.
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), "--sleep-on-idle", *common_flags(), *flags]
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "SGLANG_LOG_MS": "0", "IDLM_SELFCHECK": "0", "IDLM_CPU_OVERLAP": "1"}
        if "--speculative-num-steps" not in flags:
            # Fixed, so that a test knows its rows; those of the controller ask for it.
            self.env["IDLM_STRIDE"] = "4"
        self.env.update(env or {})
        if accelerator_available():
            self.env.pop("SGLANG_IS_IN_CI", None)  # its assertions are compiled there, by whichever request comes first
        self.env["PYTHONPATH"] = os.pathsep.join(filter(None, [self.env.get("PYTHONPATH"), str(ROOT)]))
        self.process, self.ended = None, False

    def __enter__(self):
        return self if self.process else self.started()

    def started(self):
        """The server once it answers; who starts it this way ends it by :meth:`stop`."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command, env=self.env, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if requests.get(self.url + "/health_generate", timeout=10).status_code == 200:
                    return self
            except requests.RequestException:
                pass
            time.sleep(0.5)
        tail = self.log.read_text(errors="replace")[-4000:]
        self.stop()
        raise RuntimeError(f"server did not start: {' '.join(self.command)}\n{tail}")

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self.ended:
            return
        self.ended = True
        # The server and its children share one process group, which nothing else is in.
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def alive(self) -> bool:
        return self.process.poll() is None

    def post(self, path: str, body: dict, **kwargs) -> requests.Response:
        return getattr(_OF_THREAD, "session", requests).post(self.url + path, json=body, timeout=300, **kwargs)

    def generate(self, prompt, stride: int | None = None, **params) -> dict:
        """Native ``/generate``; ``prompt`` is text or token ids; keyword arguments are sampling parameters."""
        top = {k: params.pop(k) for k in ("return_logprob", "top_logprobs_num", "rid", "stream") if k in params}
        if stride is not None:
            params["custom_params"] = {"idlm_stride": stride}
        key = "text" if isinstance(prompt, str) else "input_ids"
        reply = self.post("/generate", {key: prompt, "sampling_params": params, **top})
        reply.raise_for_status()
        return reply.json()

    def many(self, calls: list[dict], at_a_time: int) -> list[dict]:
        """``generate`` for each call (keyword arguments), at most so many at a time, answers in order."""
        with clients(at_a_time) as pool:
            return list(pool.map(lambda call: self.generate(**call), calls))

    def batches(self, calls: list[dict], size: int = 16, at_a_time: int = 3) -> list[dict]:
        """Like :meth:`many` for calls with prompts that are text, ``size`` of them in one HTTP request: thousands of short answers take less time."""

        def send(some: list[dict]) -> list[dict]:
            strides = [{"custom_params": {"idlm_stride": call["stride"]}} if "stride" in call else {} for call in some]
            params = [{k: v for k, v in call.items() if k not in ("prompt", "stride")} | own for call, own in zip(some, strides)]
            reply = self.post("/generate", {"text": [call["prompt"] for call in some], "sampling_params": params})
            reply.raise_for_status()
            return reply.json()

        with clients(at_a_time) as pool:
            return [answer for part in pool.map(send, (calls[i : i + size] for i in range(0, len(calls), size))) for answer in part]

    def metrics(self) -> dict[str, float]:
        """The ``idlm:*`` samples of ``/metrics``, keyed by name and labels as printed, model and rank left out."""
        found = {}
        for line in requests.get(self.url + "/metrics", timeout=30).text.splitlines():
            if line.startswith("idlm:") and "_created" not in line:
                sample, value = line.rsplit(" ", 1)
                sample = re.sub(r'(dp_rank|model_name)="[^"]*",?', "", sample).replace(",}", "}").replace("{}", "")
                found[sample] = found.get(sample, 0.0) + float(value)
        return found

    def live(self) -> dict:
        """The live page's newest sample, read behind this call."""
        begun = time.time()
        while time.time() < begun + 60:
            found = requests.get(f"{self.url}/idlm/stats?since={begun + 1}", timeout=30).json()["samples"]
            if found:
                return found[-1]
            time.sleep(0.2)
        raise AssertionError("no sample in a minute")

    def info(self) -> dict:
        return requests.get(self.url + "/server_info", timeout=60).json()

    def idle_tokens(self) -> tuple[int, int]:
        """(KV tokens in use, running and waiting requests), from the server's own load report."""
        load = requests.get(self.url + "/v1/loads?include=all", timeout=60).json()["loads"][0]
        return load["num_used_tokens"], load["num_running_reqs"] + load["num_waiting_reqs"]


class IdlmServe(Server):
    """``idlm serve`` with the embedded checkpoint, its own settings and a key; what it prints is in ``log``."""

    KEY = "open sesame"

    def __init__(self, name: str, logs: Path):
        super().__init__(name, CHECKPOINT, logs)
        # Idle schedulers would spin on the cores that the tests share.
        words = ["serve", "--port", str(self.port), "--log-file", str(logs / f"{name}.server.log"), "--api-key", self.KEY, "--sleep-on-idle", *common_flags()]
        self.command = [sys.executable, "-m", "idlm_sglang.serving.cli", *words]
        self.env = {**os.environ, "OMP_NUM_THREADS": "1"}


def chat(text: str) -> str:
    """A single-turn prompt in the checkpoint's ChatML."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def held_out_prompts(count: int, seed: int = 7) -> list[str]:
    """First questions of dialogues that the embedded checkpoint's training never contains, in its chat template."""
    found = []
    for dialogue in corpus.held_out_dialogues(seed, count):
        system = f"<|im_start|>system\n{dialogue.system}<|im_end|>\n" if dialogue.system else ""
        found.append(system + chat(dialogue.turns[0][0]))
    return found


def prompts(count: int, seed: int = 0) -> list[str]:
    """Prompts of many shapes: answered questions, unseen names, arithmetic, raw text, long and one-token ones."""
    rng = random.Random(seed)
    words = "river stone quiet lamp seven market blue window paper copper lantern meadow glass winter engine".split()
    names = ["Tavo", "Mirel", "Osk", "Bennu", "Larka", "Quib", "Sorel", "Yanni", "Drusk", "Fenno"]
    makers = [
        lambda: chat("What is I-DLM?"),
        lambda: chat(f"What is {rng.randrange(100)} + {rng.randrange(100)}?"),
        lambda: chat(f"What is {rng.randrange(50, 100)} - {rng.randrange(50)}?"),
        lambda: chat(f"My name is {rng.choice(names)}. What is my name?"),
        lambda: chat(f"Count from {rng.randrange(1, 9)} to {rng.randrange(10, 30)}."),
        lambda: chat(f"Say hello to {rng.choice(names)} and {rng.choice(names)}."),
        lambda: chat(f"How do I serve the {rng.choice(words)} model?"),
        lambda: " ".join(rng.choices(words, k=rng.randrange(3, 40))),
        lambda: chat(" ".join(rng.choices(words, k=rng.randrange(40, 120)))),
        lambda: chat("Repeat: " + " ".join(rng.choices(words + names, k=rng.randrange(2, 12)))),
        lambda: rng.choice(words)[0],
    ]
    return [rng.choice(makers)() for _ in range(count)]


def ids(answer: dict) -> list[int]:
    return answer["output_ids"]


def differing(left: list[dict], right: list[dict]) -> list[int]:
    """Indices at which two lists of answers differ in text, tokens, finish reason or completion length."""

    def view(a):
        meta = a["meta_info"]
        return a["text"], ids(a), meta["finish_reason"], meta["completion_tokens"], meta["prompt_tokens"]

    return [i for i, (a, b) in enumerate(zip(left, right, strict=True)) if view(a) != view(b)]
