"""The servers to be measured, and the fixed batches they are given."""

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import requests

from benchmarks.server import last_words, running
from benchmarks.step_time import dummy
from benchmarks.step_time.options import DEMO, DUMMY, Options
from benchmarks.step_time.ranges import HOOK
from benchmarks.step_time.records import Records, Step
from idlm_sglang.config import SettingError
from idlm_sglang.demo import CHECKPOINT_DIR
from idlm_sglang.demo.corpus import held_out_dialogues
from idlm_sglang.platform import accelerator_available

AR, ISD = "ar", "isd"
REPOSITORY = Path(__file__).resolve().parents[2]
REQUEST_SECONDS = 1800
PROFILED_STEPS = 16
LOG = "server.log"


class Arm:
    """A running server and its records."""

    def __init__(self, url: str, folder: Path, options: Options):
        self.url, self.folder, self.options = url, folder, options
        self.records = Records(folder / "records.csv")
        self._stride: int | None = None

    def use(self, stride: int | None) -> None:
        """Serve at this stride from now on; None leaves an AR server as it is."""
        if stride in (None, self._stride):
            return
        done = self._post("/set_internal_state", {"server_args": {"idlm_stride": stride}})
        if not done.json()[0].get("updated", False) if isinstance(done.json()[0], dict) else not done.json()[0]:
            raise SystemExit(f"step_time: the server refused stride {stride}: {done.text}")
        self._stride = stride

    def decode(self, prompts: list[list[int]], tokens: int) -> tuple[list[Step], float]:
        """One full batch, ``tokens`` each whatever the model says: the server's steps meanwhile, and the share of this
        machine's processors that other programs took."""
        self.records.new()
        load = Load()
        self._generate(prompts, tokens)
        # The last step's line follows when the next one begins, or never: it is not needed.
        return self.records.new(), load.elsewhere()

    def profile(self, prompts: list[list[int]], tokens: int, name: str) -> Path:
        """The trace of some steady steps of a full batch, taken through SGLang's /start_profile."""
        self.records.new()
        with ThreadPoolExecutor(1) as pool:
            load, full = pool.submit(self._generate, prompts, tokens), 0
            while full < 3 and not load.done():
                time.sleep(0.002)
                full += sum(step.decode and step.requests == len(prompts) for step in self.records.new())
            activities = ["CPU", "GPU"] if accelerator_available() else ["CPU"]
            body = {"output_dir": str(self.folder), "profile_id": name, "num_steps": PROFILED_STEPS, "activities": activities, "with_stack": False}
            self._post("/start_profile", body)
            load.result()
        traces = list(self.folder.glob(f"{name}*.trace.json.gz"))
        if len(traces) != 1:
            raise SystemExit(f"step_time: the server left {len(traces)} traces of {name}; the batch ended before {PROFILED_STEPS} steps: raise --tokens {self.options.tokens}")
        return traces[0]

    def rounds(self, texts: list[str]) -> tuple[int, int]:
        """(tokens, per-request decode forwards) that answers to these prompts took, from the server's own counters."""
        before = self._counters()
        for start in range(0, len(texts), 8):
            self._post("/generate", {"text": texts[start : start + 8], "sampling_params": {"max_new_tokens": 160, **self.options.sampling}})
        after = self._counters()
        return after[0] - before[0], after[1] - before[1]

    def _counters(self) -> tuple[int, int]:
        state = requests.get(self.url + "/server_info", timeout=60).json()["internal_states"][0]["idlm"]
        return state["tokens_committed"], sum(state["rounds"].values())

    def _generate(self, prompts: list[list[int]], tokens: int) -> None:
        params = {**self.options.sampling, "max_new_tokens": tokens, "ignore_eos": True}
        self._post("/generate", {"input_ids": prompts, "sampling_params": params})

    def _post(self, path: str, body: dict) -> requests.Response:
        try:
            reply = requests.post(self.url + path, json=body, timeout=REQUEST_SECONDS)
        except requests.RequestException as error:
            raise SystemExit(f"step_time: {path} was not answered ({error}); the server's last words: {last_words(self.folder / LOG)}") from None
        if not reply.ok:
            raise SystemExit(f"step_time: {path} answered HTTP {reply.status_code}: {reply.text[:300]}")
        return reply


class Load:
    """Processor time from now on: of the machine, and of this process and its servers."""

    def __init__(self):
        self._began, self._idle, self._own = time.perf_counter(), _idle(), _own()

    def elsewhere(self) -> float:
        """Share of the machine, 0 to 1, that was busy with other programs."""
        capacity = (time.perf_counter() - self._began) * psutil.cpu_count()
        busy = capacity - (_idle() - self._idle)
        return max(0.0, (busy - (_own() - self._own)) / capacity)


def _idle() -> float:
    times = psutil.cpu_times()
    return times.idle + getattr(times, "iowait", 0.0)


def _own() -> float:
    total = 0.0
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


@contextmanager
def arm(kind: str, options: Options, folder: Path) -> Iterator[Arm]:
    """A server of this kind, warmed up."""
    folder = folder / kind
    folder.mkdir(parents=True)
    hook = {"name": "step_time", "target_modules": ["*"], "hook_factory": HOOK, "config": {"path": str(folder / "records.csv"), "clock": options.clock}}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with running(flags(kind, options, folder) + ["--forward-hooks", json.dumps([hook])], env={"PYTHONPATH": path}, log=folder / LOG, radix=True) as url:
        print(f"  {kind} serves at {url}", file=sys.stderr, flush=True)
        found = Arm(url, folder, options)
        for batch in (1, min(8, max(options.batches))):
            found.decode(prompts(options, batch, min(options.contexts)), 16)
        if not found.records.path.exists():
            raise SettingError("the server recorded no steps; allowed: a checkpoint whose class is IDLMForCausalLM, one scheduler")
        yield found


# The text behind the end of an answer is harder than the answers whose tokens per forward make the ceiling: it would leave out more rows.
_ALL_ROWS = ["--ragged-verify", "off"]


def flags(kind: str, options: Options, folder: Path) -> list[str]:
    """What `idlm serve` is given. Both kinds get the same room."""
    model = [] if options.model == DEMO else ["--model-path", options.model]
    if options.model == DUMMY:
        model = ["--model-path", str(dummy.write(folder / "model", options.dims)), *dummy.FLAGS]
    room = ["--max-running-requests", str(max(options.batches))]
    if not accelerator_available():
        columns = max(options.contexts) + options.longest + 4 * (2 * max(options.strides) - 1)
        # Twice: finished requests stay in the prefix cache, so that later runs need no prefill.
        room += ["--max-total-tokens", str(2 * max(options.batches) * columns)]
    own = ["--ar"] if kind == AR else ["--stride", str(options.strides[0]), "--max-stride", str(max(options.strides)), "--selfcheck", "0", *_ALL_ROWS]
    return [*model, *own, *room, *options.server_flags]


def prompts(options: Options, batch: int, context: int) -> list[list[int]]:
    """``batch`` different prompts, half of a run's tokens short of the context."""
    length = context - options.tokens // 2
    if options.model != DEMO:
        directory_vocab = dummy.DIMENSIONS["vocab_size"] if options.model == DUMMY else _vocab(Path(options.model))
        vocab = options.dims.get("vocab_size", directory_vocab)
        return [[random.Random(row * 4096 + i).randrange(vocab - 1) for i in range(length)] for row in range(batch)]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))
    found = []
    for row in range(batch):
        ids: list[int] = []
        for dialogue in held_out_dialogues(1000 + row, 400):
            for question, answer in dialogue.turns:
                ids += tokenizer.encode(chat(question) + answer + "<|im_end|>\n").ids
            if len(ids) >= length:
                break
        found.append(ids[-length:])
    return found


def _vocab(directory: Path) -> int:
    return json.loads((directory / "config.json").read_text())["vocab_size"]


def chat(question: str) -> str:
    """A single-turn prompt in the embedded checkpoint's ChatML."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def tpf_prompts(count: int) -> list[str]:
    """Questions kept out of the embedded checkpoint's training, in its chat template."""
    return [chat(dialogue.turns[0][0]) for dialogue in held_out_dialogues(7, count)]
