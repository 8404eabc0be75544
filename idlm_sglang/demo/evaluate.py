"""Measure a checkpoint without an engine: `python -m idlm_sglang.demo.evaluate [DIR]`, or a gated adapter with `--base DIR --adapter DIR`.

Prints tokens per forward at several strides (greedy, and at temperature 1 by the rejection rule or, with `--rule coupled`, the same text at every stride) and for several
policies behind a rejection, whether greedy ISD gives the same tokens as AR, the acceptance of drafts by position, and the share of exactly right greedy
answers per family. fp32, one sequence at a time. With an adapter AR is the base alone, loaded by itself, and a second table has the adapter off. `--blur` makes the MASK rows worse and leaves all others alone, as an adapter that is active
at the MASK rows only and was trained too little.
"""

import argparse
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from transformers import AutoTokenizer, DynamicCache, Qwen3ForCausalLM

from idlm_sglang.demo import CHECKPOINT_DIR
from idlm_sglang.demo.corpus import FAMILIES, Dialogue, held_out_dialogues, training_dialogues
from idlm_sglang.demo.split import VALUES, WORDING
from idlm_sglang.isd import BRANCH, CHAIN, OFF, noise, row_offsets, visible_rows
from idlm_sglang.isd.trim import Record, Rows, trim

MAX_NEW_TOKENS = 200
POLICIES = tuple(policy + start + rows for rows in ("", "+trim") for start in ("", "+warm") for policy in (OFF, BRANCH, CHAIN))


@dataclass
class Counts:
    """Sums over generations: tokens committed by decode forwards (after a stop: dropped), those forwards and their rows, drafts by position (survivors left out)."""
    tokens: int = 0
    forwards: int = 0
    rows: int = 0
    tried: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    accepted: dict[int, int] = field(default_factory=lambda: defaultdict(int))


class Decoder:
    """A checkpoint in fp32 with its tokenizer, and a gated adapter on top of it where one is given. The MASK logit is removed everywhere, with an
    adapter at the MASK rows alone: the others are the base's.

    coupled: the rule of sampled answers. Without an adapter and without a MASK in its config the checkpoint is an AR model: stride 1 only.
    """

    def __init__(self, directory: Path, coupled: bool = False, adapter: Path | None = None):
        self.coupled = coupled
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.mask = getattr(self.model.config, "mask_token_id", None)
        self.gate, self.active = None, True
        self._mask_rows = torch.zeros(1, 1, dtype=torch.bool)
        if adapter:
            from idlm_sglang.convert.gate import load_adapter
            self.gate, self.mask = load_adapter(self.model, adapter)
        self.model.eval()
        self.eos = self.model.generation_config.eos_token_id

    def prompt(self, item: Dialogue) -> list[int]:
        """Token ids of the conversation up to its last question, ready for the answer."""
        return self.tokenizer.apply_chat_template(item.messages()[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]

    def text(self, output: list[int]) -> str:
        """The answer's text, without special tokens."""
        return self.tokenizer.decode(output, skip_special_tokens=True)

    def blur(self, scale: float) -> None:
        """Noise of `scale` times their standard deviation on all weights of the layers, for MASK rows only."""
        generator = torch.Generator().manual_seed(5)
        for linear in (m for layer in self.model.model.layers for m in layer.modules() if isinstance(m, nn.Linear)):
            noise = torch.randn(linear.weight.shape, generator=generator) * linear.weight.std() * scale

            def add(_, inputs, output, noise=noise):
                return output + self._mask_rows[..., None] * nn.functional.linear(inputs[0], noise)

            linear.register_forward_hook(add)

    def forward(self, cache: DynamicCache, tokens: list[int], drafts: int = 0, fork: int = 0, masks: int = 0) -> torch.Tensor:
        """Append `tokens`, the last `masks` of which play the MASK role, to the cache; logits (len(tokens), V) in fp32. MASK rows see `fork` of the
        `drafts` (see isd.layout)."""
        self._mask_rows = torch.arange(len(tokens))[None] >= len(tokens) - masks
        if self.gate:
            self.gate.rows = self._mask_rows & self.active
        branch = {}
        if fork < drafts:
            past, width = cache.get_seq_length(), len(tokens)
            c, f = torch.tensor([drafts]), torch.tensor([fork])
            visible = torch.ones(1, width, past + width, dtype=torch.bool).tril(past)
            visible[..., past:] &= visible_rows(c, f, width)
            branch = {"position_ids": past + row_offsets(c, f, width), "attention_mask": torch.where(visible, 0.0, float("-inf"))[:, None]}
        logits = self.model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True, **branch).logits[0]
        if self.mask is not None:
            logits[len(tokens) - masks if self.gate else 0:, self.mask] = float("-inf")
        return logits

    @torch.inference_mode()
    def generate(self, prompt: list[int], stride: int, temperature: float, counts: Counts, policy: str = OFF) -> list[int]:
        """The answer's token ids, up to and with the stop token. stride 1 is AR; temperature 0 is greedy.

        policy: what a rejection leaves, as in isd.layout; with `+warm` behind it the prompt's forward draws the first drafts, with `+trim` rows are left
            out as in isd.trim.
        """
        salvage, *more = policy.split("+")
        cache, masks = DynamicCache(), stride - 1 if "warm" in more else 0
        logits = self.forward(cache, [*prompt, *[self.mask] * masks], masks=masks)[len(prompt) - 1 :]
        cache.crop(-masks)
        output = [self._choose(logits[0], temperature, len(prompt) - 1)]
        q = (logits[1:] / (temperature or 1.0)).softmax(-1)
        drafts = [self._choose(row, temperature, len(prompt) + i) for i, row in enumerate(logits[1:])]
        clean, record = len(drafts), Record()
        while output[-1] not in self.eos and len(output) < MAX_NEW_TOKENS:
            kept, masks = cache.get_seq_length() + 1, stride - 1
            counts.rows += 2 * stride - 1
            if "trim" in more:
                worth = self._worth(drafts, clean, q, temperature, MAX_NEW_TOKENS - len(output), masks, salvage, record.stands)
                counts.rows -= 2 * stride - 1 - len(worth)
                drafts, masks, clean = drafts[: worth.drafts], worth.masks, min(clean, worth.drafts)
            fork = clean if salvage == BRANCH else len(drafts)
            logits = self.forward(cache, [output[-1], *drafts, *[self.mask] * masks], len(drafts), fork, masks)
            committed, accepted = self._verify(logits, drafts, q, temperature, counts if clean == len(drafts) else Counts(), kept - 1)
            if "trim" in more and clean == len(drafts):
                record.add(len(drafts) + worth.doubted, accepted)
            cache.crop(kept + accepted - cache.get_seq_length())  # minus the number of rejected and MASK columns
            counts.forwards += 1
            for token in committed:
                output.append(token)
                counts.tokens += 1
                if token in self.eos:
                    break
            standing = accepted >= fork
            spine = torch.cat([logits[: fork + 1], logits[1 + len(drafts):]])
            # Without rows the next step is cold.
            rows = spine[accepted + 1 :][: stride - 1] if standing or salvage != OFF else spine[:0]
            q = (rows / (temperature or 1.0)).softmax(-1)
            drafts = [self._choose(row, temperature, kept + accepted + i) for i, row in enumerate(rows)]
            clean = len(drafts) if standing else 0
        return output[:MAX_NEW_TOKENS]

    def _worth(self, drafts: list[int], clean: int, q: torch.Tensor, temperature: float, left: int, k: int, salvage: str, stands: float) -> Rows:
        exact = not temperature or self.coupled
        sure = q.gather(1, torch.tensor(drafts)[:, None])[:, 0].log().tolist() if drafts and not temperature else [0.0] * len(drafts)
        return trim(drafts, clean, sure, self.eos if exact else (), left, k, salvage, stands)

    def _choose(self, logits: torch.Tensor, temperature: float, position: int) -> int:
        if not temperature:
            return int(logits.argmax())
        if self.coupled:
            g = noise.gumbel(torch.zeros(1, dtype=torch.int64), torch.tensor([[position]]), len(logits))[0, 0]
            return int((logits / temperature + g).argmax())
        return int(torch.multinomial((logits / temperature).softmax(-1), 1))

    def _verify(self, logits, drafts, q, temperature, counts, position) -> tuple[list[int], int]:
        """Tokens committed by this forward (accepted drafts, then the corrected or the bonus token) and the number of accepted drafts."""
        for i, draft in enumerate(drafts):
            counts.tried[i + 1] += 1
            if not temperature or self.coupled:
                best = self._choose(logits[i], temperature, position + i)
                if best != draft:
                    return [*drafts[:i], best], i
            else:
                p = (logits[i] / temperature).softmax(-1)
                if torch.rand(()) >= p[draft] / q[i, draft]:
                    return [*drafts[:i], int(torch.multinomial((p - q[i]).clamp(min=0), 1))], i
            counts.accepted[i + 1] += 1
        return [*drafts, self._choose(logits[len(drafts)], temperature, position + len(drafts))], len(drafts)


def prompt_sets(count: int, seed: int) -> dict[str, list[Dialogue]]:
    """`count` different conversations of each kind: held out by values, held out by wording, and from training."""
    stream = training_dialogues(seed=0)
    return {
        "held out, new values": _different(held_out_dialogues(seed, 3 * count, side=VALUES), count),
        "held out, new wording": _different(held_out_dialogues(seed, 3 * count, side=WORDING), count),
        "training": _different([next(stream) for _ in range(3 * count)], count),
    }


def _different(items: list[Dialogue], count: int) -> list[Dialogue]:
    return list({tuple(question for question, _ in item.turns): item for item in items}.values())[:count]


def measure_speed(decoder: Decoder, ar: Decoder, prompts: list[list[int]], strides: list[int], policies: list[str], ended: bool = False) -> None:
    """Print one line per mode, stride and policy behind a rejection for these prompts. `ar` gives the answers to compare with, at stride 1.

    ended: leave out the prompts whose greedy answer does not end with a stop token within MAX_NEW_TOKENS.
    """
    reference = [ar.generate(p, 1, 0.0, Counts()) for p in prompts]
    if ended:
        kept = [i for i, answer in enumerate(reference) if answer[-1] in ar.eos]
        prompts, reference = [prompts[i] for i in kept], [reference[i] for i in kept]
    sampled = [ar.generate(p, 1, 1.0, Counts()) for p in prompts] if decoder.coupled else None
    print(f"  {sum(map(len, reference)) / len(reference):.1f} tokens per greedy answer, {sum(r[-1] in decoder.eos for r in reference)}/{len(prompts)} end with a stop token")
    for temperature in (0.0, 1.0):
        for stride in strides:
            first = 0.0
            for policy in policies:
                counts = Counts()
                outputs = [decoder.generate(p, stride, temperature, counts, policy) for p in prompts]
                wanted = sampled if temperature else reference
                same = f"  equal to AR {sum(a == b for a, b in zip(outputs, wanted))}/{len(prompts)}" if wanted else ""
                by_position = " ".join(f"{counts.accepted[i] / counts.tried[i]:.2f}" for i in sorted(counts.tried))
                rate = counts.tokens / counts.forwards
                gain = f" ({100 * (rate / first - 1):+.1f} %)" if first else ""
                first = first or rate
                name = f"  {policy}" if len(policies) > 1 else ""
                print(f"  {'greedy' if not temperature else 'T = 1 '}  N = {stride}{name}  {rate:.2f} tokens per forward of {counts.rows / counts.forwards:.1f} rows{gain}{same}  "
                      f"accepted by position {by_position}", flush=True)


def measure_answers(decoder: Decoder, count: int, seed: int, families: list[str]) -> None:
    """Print the share of greedy answers (ISD at N = 4, for speed) that are exactly right, per family, on `count` held-out prompts each."""
    for family in FAMILIES:
        if families and family.name not in families:
            continue
        shares = []
        for side in family.sides:
            items = held_out_dialogues(seed, count, [family.name], side)
            right = sum(decoder.text(decoder.generate(decoder.prompt(item), 4, 0.0, Counts())) == item.turns[-1][1] for item in items)
            shares.append(f"new {side} {right}/{count}")
        print(f"  {family.name:16} {'  '.join(shares)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure tokens per forward and answers of a small I-DLM checkpoint.")
    parser.add_argument("directory", nargs="?", type=Path, default=CHECKPOINT_DIR)
    parser.add_argument("--base", type=Path, help="an AR model in place of the directory, for --adapter")
    parser.add_argument("--adapter", type=Path, help="a gated adapter of the base")
    parser.add_argument("--prompts", type=int, default=100, help="prompts per set for the speed (0: skip)")
    parser.add_argument("--answers", type=int, default=20, help="prompts per family and kind of novelty for the answers (0: skip)")
    parser.add_argument("--families", default="", help="measure the answers of these families only (comma-separated)")
    parser.add_argument("--strides", default="2,3,4,8")
    parser.add_argument("--ended", action="store_true", help="leave out prompts whose greedy answer does not end (for the speed)")
    parser.add_argument("--salvage", default=OFF,
                        help=f"policies behind a rejection, gains over the first (comma-separated: {', '.join(POLICIES)}; +warm: first drafts from the prompt's forward, +trim: rows that are not worth their cost left out)")
    parser.add_argument("--rule", default="rejection", choices=["rejection", "coupled"], help="exact rule at temperature 1")
    parser.add_argument("--blur", type=float, default=0.0, help="noise on the weights of MASK rows, in standard deviations (0: none)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    unknown = set(filter(None, args.families.split(","))) - {f.name for f in FAMILIES}
    if unknown:
        parser.error(f"--families {','.join(sorted(unknown))}: known are {', '.join(f.name for f in FAMILIES)}")
    policies = args.salvage.split(",")
    if not set(policies) <= set(POLICIES):
        parser.error(f"--salvage {args.salvage}: known are {', '.join(POLICIES)}")
    if bool(args.base) != bool(args.adapter):
        parser.error("--base and --adapter belong together: give both")
    directory = args.base or args.directory
    for place, file in (directory, "config.json"), (args.adapter, "adapter_config.json"):
        if place and not (place / file).is_file():
            parser.error(f"directory {place}: it has no {file}")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    decoder = Decoder(directory, args.rule == "coupled", args.adapter)
    if decoder.mask is None:
        parser.error(f"directory {directory}: its config names no mask_token_id; an AR model needs --adapter")
    ar = Decoder(directory, args.rule == "coupled") if args.adapter else decoder
    if args.blur:
        decoder.blur(args.blur)
    for name, items in prompt_sets(args.prompts, args.seed).items() if args.prompts else ():
        print(f"{name}: {len(items)} prompts", flush=True)
        prompts, strides = [decoder.prompt(item) for item in items], [int(n) for n in args.strides.split(",")]
        measure_speed(decoder, ar, prompts, strides, policies, args.ended)
        if args.adapter:
            print(" adapter off", flush=True)
            decoder.active = False
            measure_speed(decoder, ar, prompts, strides, policies[:1], args.ended)
            decoder.active = True
    if args.answers:
        print("greedy answers that are exactly right, on held-out prompts", flush=True)
        measure_answers(decoder, args.answers, args.seed, [f for f in args.families.split(",") if f])


if __name__ == "__main__":
    main()
