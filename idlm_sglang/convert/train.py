"""The training of `idlm convert`: a gated adapter on a frozen base, or the whole model."""

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from idlm_sglang.checkpoint import ARCHITECTURE
from idlm_sglang.config import SettingError
from idlm_sglang.convert import base, chats, cost, distill, measure, objective, schedule, state
from idlm_sglang.convert.gate import TARGET_MODULES, RowGate
from idlm_sglang.convert.options import AUTO, Plan
from idlm_sglang.convert.rows import Batch, build_batch

ACCEPTANCE = "acceptance.json"
MEASURED = 500  # held-out conversations, at most


class Failed(Exception):
    """The training cannot go on."""


class Trainer:
    """One training: the model, what of it is trained, the optimizer, and the position in the data.

    adapter: the PEFT model around `model`, or None where the whole model is trained.
    """

    def __init__(self, plan: Plan, model: Any, mask_id: int, stream: chats.Stream, dtype: torch.dtype):
        self.plan, self.model, self.mask_id, self.stream = plan, model, mask_id, stream
        self.device = model.device
        self._dtype = dtype
        self.adapter, self._gate = None, None
        torch.manual_seed(plan.seed)
        if not plan.full:
            lora = LoraConfig(r=plan.rank, lora_alpha=plan.lora_alpha, target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM")
            self.adapter = get_peft_model(model, lora)
            self._gate = RowGate(model)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(self.trained.values(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=self.device.type == "cuda")
        self._rng = random.Random(plan.seed)
        self.step = 0

    def hidden(self, batch: Batch) -> torch.Tensor:
        """(B, T, H), the decoder's output, the adapter gated to the MASK rows."""
        if self._gate:
            self._gate.rows = batch.mask_rows
        return self.model.model(input_ids=batch.input_ids, position_ids=batch.positions, attention_mask=batch.unseen(self._dtype), use_cache=False).last_hidden_state

    def cast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self._dtype) if self._dtype != torch.float32 else nullcontext()

    def advance(self) -> objective.Losses:
        """One optimizer step; :class:`Failed` where the loss is no number."""
        plan = self.plan
        factor = schedule.cosine_factor if plan.full else schedule.learning_rate_factor
        for group in self._optimizer.param_groups:
            group["lr"] = plan.learning_rate * factor(self.step, plan.steps)
        size = schedule.block_size(self.step, plan.steps, plan.blocks)
        batch = build_batch(self._conversations, self.mask_id, self._rng, plan.rows, plan.length, size).to(self.device)
        with self.cast():
            losses = objective.losses(self.hidden(batch), self.model.lm_head, batch, clean=plan.full)
        loss = self._total(losses)
        if not torch.isfinite(loss):
            raise Failed(f"the loss is {loss.item()} at step {self.step + 1}; lower --learning-rate {plan.learning_rate:g}, "
                         f"and use another --out or remove {plan.out}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses

    def _total(self, losses: objective.Losses) -> torch.Tensor:
        if losses.clean is None:
            return (1 - self.plan.soft) * losses.hard + self.plan.soft * losses.soft
        alpha = self.plan.clean_weight
        return losses.hard + (losses.hard.detach() / losses.clean.detach() if alpha is None else alpha) * losses.clean

    def run(self, tell: Callable[[str], None], stopped: Callable[[], bool]) -> None:
        """All steps that are left, with a state every `save_every` of them; KeyboardInterrupt, behind a state, once `stopped` is true."""
        plan, began, first = self.plan, time.monotonic(), self.step
        self._conversations = iter(self.stream)
        while self.step < plan.steps:
            losses = self.advance()
            last = self.step == plan.steps
            if self.step % 10 == 0 or last:
                spent = (time.monotonic() - began) / (self.step - first)
                clean = "" if losses.clean is None else f"  clean {losses.clean.item():.3f}"
                tell(f"step {self.step}/{plan.steps}  blocks of {schedule.block_size(self.step - 1, plan.steps, plan.blocks)}  loss {losses.hard.item():.3f} soft "
                     f"{losses.soft.item():.3f}{clean}  drafts agree {losses.agreement:.1%}  {spent:.2f} s/step  {spent * (plan.steps - self.step) / 60:.1f} min left")
            if last or stopped() or self.step % plan.save_every == 0:
                state.save(plan, self.state())
            if stopped() and not last:
                raise KeyboardInterrupt

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "trained": {name: p.detach() for name, p in self.trained.items()}, "optimizer": self._optimizer.state_dict(),
                "stream": self.stream.position, "rng": self._rng.getstate()}

    def restore(self, content: dict[str, Any]) -> None:
        """Go on from :meth:`state`: the steps that follow are those of a run that was not interrupted."""
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(content["trained"][name])
        self._optimizer.load_state_dict(content["optimizer"])
        self.stream.position = tuple(content["stream"])
        version, words, gauss = content["rng"]
        self._rng.setstate((version, tuple(words), gauss))
        self.step = content["step"]

    def save(self, tokenizer: Any) -> None:
        """Write the adapter, or with `full` the checkpoint, in bf16; what is in memory is rounded alike."""
        with torch.no_grad():
            for p in self.trained.values():
                p.data = p.data.to(torch.bfloat16)
        out = self.plan.out
        if self.adapter is not None:
            self.adapter.save_pretrained(out, save_embedding_layers=False)
            (out / "README.md").unlink(missing_ok=True)  # peft's empty form
            (out / "adapter_model.safetensors").chmod(0o644)
            _edit(out / "adapter_config.json", {"mask_token_id": self.mask_id, "block_size": max(self.plan.blocks)})
        else:
            # Not the whole model cast: that would round the buffers of the rotary embedding, too, which stay in use.
            rounded: dict[int, torch.Tensor] = {}  # by storage: tied weights stay one
            weights = {name: rounded.setdefault(w.data_ptr(), w.to(torch.bfloat16)) for name, w in self.model.state_dict().items()}
            self.model.save_pretrained(out, state_dict=weights)
            tokenizer.save_pretrained(out)
            _edit(out / "config.json", {"architectures": [ARCHITECTURE], "model_type": "qwen3", "mask_token_id": self.mask_id, "block_size": max(self.plan.blocks),
                                        "auto_map": None, "dtype": "bfloat16"})
        for p in self.trained.values():
            p.data = p.data.to(torch.float32)

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        with self.cast():
            return self.model.lm_head(self.hidden(batch.to(self.device)))


def _edit(path: Path, entries: dict[str, Any]) -> None:
    """Set entries of a JSON file; those that are None go."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in entries or value is not None}, indent=2, sort_keys=True) + "\n")


def run(plan: Plan, tell: Callable[[str], None] = lambda line: print(line, flush=True)) -> None:
    """Train as planned and write OUT. :class:`SettingError` for a plan that cannot be followed, :class:`Failed` for a loss that is no number,
    or memory that is not enough."""
    device = _device(plan)
    source = chats.read(plan.data)
    config, tokenizer = base.load_config(plan.base), base.load_tokenizer(plan.base)
    mask_id, origin = base.mask_token(config, tokenizer, plan.mask_token)
    encoder = chats.Encoder(tokenizer)
    state.begin(plan)
    reached = state.load(plan)
    tell(f"MASK is token {mask_id}: {origin}")

    dtype = torch.bfloat16 if plan.precision == "bfloat16" or (plan.precision == AUTO and device.type == "cuda") else torch.float32
    weights = torch.bfloat16 if device.type == "cuda" and dtype == torch.bfloat16 and not plan.full else torch.float32
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    with _enough_memory(device, "the weights of BASE"):
        model = base.load_model(plan.base, config, device, weights)
    interrupted: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: interrupted.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if plan.self_distill:
            answer = distill.answers_of(model, tokenizer, encoder, mask_id, plan.temperature, plan.length)
            with _enough_memory(device, f"answers of --length {plan.length}"):
                source = distill.regenerate(source, plan.out / distill.FILE, answer, plan.seed, lambda line: _told(tell, line, interrupted))
        training, held_out = chats.split(source, plan.held_out, plan.seed)
        parameters = sum(p.numel() for p in model.parameters())
        trainer = Trainer(plan, model, mask_id, chats.Stream(training, encoder, plan.length, plan.seed), dtype)
        trained = sum(p.numel() for p in trainer.trained.values())
        tell(f"{parameters:,} parameters of the base, {trained:,} trained; {len(training):,} conversations to train on, {len(held_out):,} held out; {device}")
        tell(cost.estimate(0 if plan.full else parameters, trained, weights.itemsize, 2 * plan.steps * plan.rows * plan.length, device, plan.tflops))
        if reached:
            trainer.restore(reached)
            tell(f"going on behind step {trainer.step}")
        with _enough_memory(device, f"--rows {plan.rows} of --length {plan.length}"):
            trainer.run(tell, lambda: bool(interrupted))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    trainer.save(tokenizer)
    try:
        _measure(trainer, [encoder(messages) for messages in held_out[:MEASURED]], tell)
    except torch.OutOfMemoryError:
        tell(f"held out: not measured, {device} has not enough memory; what was trained is saved")
    state.finish(plan)
    tell(f"wrote {plan.out}; to serve it: " + (f"idlm serve {plan.out}" if plan.full else f"idlm serve {plan.base} --idlm-lora {plan.out}"))


@contextmanager
def _enough_memory(device: torch.device, wanted: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise Failed(f"{device} has not enough memory for {wanted}") from None


def _measure(trainer: Trainer, held_out: list[chats.Encoded], tell: Callable[[str], None]) -> None:
    plan = trainer.plan
    found = measure.on_answers(held_out, trainer.logits, trainer.mask_id, plan.length, max(plan.blocks))
    figures = found.figures()
    if not found.drafts:
        tell(f"held out: none of the {len(held_out)} conversations has an answer long enough for a draft")
    for mode, figure in figures.items() if found.drafts else ():
        positions = " ".join(f"{p:.2f}" for p in figure["accepted_by_position"])
        strides = "  ".join(f"N = {n} {rate:.2f}" for n, rate in figure["tokens_per_forward"].items())
        tell(f"held out, {mode}: accepted by position {positions}; predicted tokens per forward {strides}")
    text = "the base's own answers" if plan.self_distill else "the answers of the data"
    record = {"conversations": len(held_out), "drafts": found.drafts, "behind": text, **figures}
    (plan.out / ACCEPTANCE).write_text(json.dumps(record, indent=2) + "\n")


def _device(plan: Plan) -> torch.device:
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise SettingError("--device cuda: there is no CUDA device; allowed: cpu")
    return torch.device("cuda" if plan.device != "cpu" and torch.cuda.is_available() else "cpu")


def _told(tell: Callable[[str], None], line: str, interrupted: list[int]) -> None:
    tell(line)
    if interrupted:
        raise KeyboardInterrupt
