"""What SGLang 0.5.23's own algorithms do with the features of a request. Read from its source, not run.

``IN_TREE[feature][algorithm]`` is a cell: a verdict, a note and the lines of ``sglang/srt`` that show it, separated by commas. The verdicts:

- ``yes``: honoured;
- ``partly``: some of it is honoured, or with a limit that the note names;
- ``refused``: an HTTP error, or an error when the server starts;
- ``ignored``: accepted without effect, or not reported;
- ``wrong``: applied, but not as plain autoregressive serving (AR) would;
- ``unclear``: the source alone does not tell.

EAGLE3 stands for EAGLE and EAGLE3, both on the worker of spec v2. dLLM stands for the algorithms of ``--dllm-algorithm`` that serve SDAR and LLaDA2
(LowConfidence, JointThreshold, JointThresholdInDel); Gemma4Renoise, for another model, refuses much of what these ignore.
"""

from dataclasses import dataclass

ALGORITHMS: tuple[str, ...] = ("AR", "EAGLE3", "NGRAM", "DFLASH", "UNO", "dLLM")


@dataclass(frozen=True)
class Cell:
    verdict: str
    note: str
    evidence: str


def _row(*cells: Cell) -> dict[str, Cell]:
    return dict(zip(ALGORITHMS, cells, strict=True))


_RESULTS = "managers/scheduler_components/batch_result_processor.py"

IN_TREE: dict[str, dict[str, Cell]] = {
    "sampling": _row(
        Cell("yes", "flashinfer filters top_k and top_p jointly, but one after the other where any row of the batch has min_p",
             "layers/sampler.py:407, layers/sampler.py:439"),
        Cell("partly", "min_p not applied in verify; top_k before top_p; thresholds below 1.0 accept more; argmax on CPU and XPU",
             "speculative/eagle_utils.py:728, speculative/eagle_utils.py:736, speculative/eagle_utils.py:781, speculative/eagle_utils.py:500"),
        Cell("partly", "EAGLE's verify: min_p not applied, top_k before top_p, thresholds relax, argmax on CPU and XPU",
             "speculative/ngram_worker.py:479, speculative/eagle_utils.py:728"),
        Cell("partly", "min_p not applied in verify; top_k before top_p; thresholds relax; argmax where the sampling kernel is missing",
             "speculative/dflash_utils.py:1049, speculative/dflash_utils.py:941, speculative/dflash_worker_v2.py:2213"),
        Cell("partly", "min_p refused; temperature, top_k and top_p by rejection sampling, top_k before top_p",
             "speculative/uno_validation.py:16, speculative/uno_utils.py:83, speculative/uno_utils.py:27"),
        Cell("ignored", "Tokens are argmax, unmasked by confidence; only the server's algorithm settings matter",
             "dllm/algorithm/low_confidence.py:35, dllm/algorithm/joint_threshold.py:58, managers/tp_worker.py:671"),
    ),
    "seed": _row(
        Cell("ignored", "No effect without --enable-deterministic-inference; with that flag min_p trips an assertion",
             "sampling/sampling_batch_info.py:170, layers/sampler.py:831"),
        Cell("ignored", "No effect without --enable-deterministic-inference; with it the verify coins are seeded, other than AR's draws",
             "sampling/sampling_batch_info.py:170, speculative/eagle_utils.py:469"),
        Cell("ignored", "As EAGLE3; with the flag drafts still depend on the corpus, so the tokens may too",
             "sampling/sampling_batch_info.py:170, speculative/ngram_worker.py:479, speculative/eagle_utils.py:469"),
        Cell("ignored", "Verify draws from torch.rand even with the flag; only the prefill token can be seeded",
             "speculative/dflash_utils.py:982, speculative/dflash_worker_v2.py:2215"),
        Cell("ignored", "Draws from torch.rand; --enable-deterministic-inference is refused at start-up",
             "speculative/uno_utils.py:249, arg_groups/speculative_hook.py:461"),
        Cell("ignored", "Nothing is drawn: decoding is argmax",
             "dllm/algorithm/low_confidence.py:35, dllm/algorithm/base.py:61"),
    ),
    "penalties": _row(
        Cell("partly", "Overlap counts one token late and the last prompt token as output; counts restart after retraction",
             "managers/schedule_batch.py:3721, managers/schedule_batch.py:3770, sampling/penaltylib/frequency_penalty.py:20"),
        Cell("wrong", "One token counted per round, drafts before a row not at all; min_new_tokens counts rounds",
             "speculative/eagle_utils.py:564, speculative/eagle_utils.py:863, managers/schedule_batch.py:3721, sampling/penaltylib/min_new_tokens.py:83"),
        Cell("wrong", "As EAGLE3: one token counted per round, drafts before a row not at all",
             "speculative/spec_utils.py:1270, speculative/ngram_worker.py:479, speculative/eagle_utils.py:564"),
        Cell("ignored", "Verify reads acc_linear_penalties, which nothing sets; only the prefill token obeys min_new_tokens",
             "speculative/dflash_utils.py:236, sampling/sampling_batch_info.py:682, speculative/spec_utils.py:1260"),
        Cell("refused", "HTTP 400 for any penalty and for min_new_tokens",
             "speculative/uno_validation.py:38, managers/scheduler.py:3153"),
        Cell("ignored", "No sampler runs",
             "managers/tp_worker.py:671, dllm/algorithm/base.py:61"),
    ),
    "logit_bias": _row(
        Cell("yes", "Added after penalties and the grammar mask",
             "sampling/sampling_batch_info.py:441"),
        Cell("yes", "Added to every verify row",
             "speculative/eagle_utils.py:579"),
        Cell("yes", "Added to every verify row",
             "speculative/ngram_worker.py:479, speculative/eagle_utils.py:579"),
        Cell("yes", "Added to every verify row",
             "speculative/dflash_utils.py:277, speculative/dflash_worker_v2.py:2911"),
        Cell("refused", "HTTP 400",
             "speculative/uno_validation.py:41"),
        Cell("ignored", "No sampler runs",
             "managers/tp_worker.py:671, dllm/algorithm/base.py:61"),
    ),
    "logprobs": _row(
        Cell("yes", "At the request's temperature, after penalties, mask and bias, before top_k, top_p and min_p",
             "layers/sampler.py:315, layers/sampler.py:324"),
        Cell("yes", "Taken from the accepted verify rows; prompt logprobs from the target's prefill",
             "speculative/eagle_worker_common.py:770, layers/logprob_processor.py:386"),
        Cell("yes", "Taken from the accepted verify rows",
             "speculative/ngram_worker.py:517, layers/logprob_processor.py:386"),
        Cell("yes", "Taken from the verify rows in order",
             "speculative/dflash_worker_v2.py:2952, layers/logprob_processor.py:410"),
        Cell("refused", "HTTP 400 for any returned logprob, prompt logprobs included",
             "speculative/uno_validation.py:26"),
        Cell("ignored", "None are computed; the response carries empty lists",
             "layers/logits_processor.py:1379, dllm/mixin/scheduler.py:161"),
    ),
    "grammar": _row(
        Cell("yes", "Under ignore_eos one unconstrained token follows the end of the grammar",
             f"sampling/sampling_batch_info.py:401, {_RESULTS}:1049, {_RESULTS}:1089, managers/schedule_batch.py:2045"),
        Cell("yes", "A mask per tree node; the run is cut where the grammar ends, under ignore_eos too",
             f"speculative/eagle_worker_common.py:665, speculative/spec_utils.py:652, {_RESULTS}:867"),
        Cell("yes", "A mask per tree node, without overlap; the run is cut where the grammar ends",
             f"speculative/ngram_worker.py:455, managers/scheduler.py:2160, {_RESULTS}:867"),
        Cell("yes", "A mask per draft position; the run is cut where the grammar ends",
             f"speculative/dflash_worker_v2.py:2902, speculative/dflash_worker_v2.py:2919, {_RESULTS}:867"),
        Cell("refused", "HTTP 400; --enable-strict-thinking is refused at start-up",
             "speculative/uno_validation.py:23, arg_groups/speculative_hook.py:466"),
        Cell("ignored", "Compiled and attached to the request, never applied or advanced",
             "constrained/grammar_manager.py:183, managers/tp_worker.py:671, dllm/mixin/scheduler.py:158"),
    ),
    "tools": _row(
        Cell("yes", "Required and named tools become a grammar; parsers work on the text",
             "entrypoints/openai/serving_chat.py:1849, entrypoints/openai/protocol.py:1274"),
        Cell("yes", "As AR, through its grammar support",
             "entrypoints/openai/protocol.py:1274, speculative/eagle_worker_common.py:665"),
        Cell("yes", "As AR, through its grammar support",
             "entrypoints/openai/protocol.py:1274, speculative/ngram_worker.py:455"),
        Cell("yes", "As AR, through its grammar support",
             "entrypoints/openai/protocol.py:1274, speculative/dflash_worker_v2.py:2902"),
        Cell("partly", "Parsers work; a tool choice that becomes a grammar is refused",
             "entrypoints/openai/protocol.py:1274, speculative/uno_validation.py:23"),
        Cell("partly", "Parsers work; a tool choice that becomes a grammar is not enforced",
             "entrypoints/openai/protocol.py:1274, managers/tp_worker.py:671"),
    ),
    "stops": _row(
        Cell("yes", "Checked after every token: stop strings, then ids, then length, then the grammar's end",
             "managers/schedule_batch.py:2026, managers/schedule_batch.py:2038"),
        Cell("partly", "Runs are trimmed at the stop and max_tokens, but a stop string beats an EOS before it in a run",
             "managers/schedule_batch.py:1875, managers/schedule_batch.py:2003, managers/schedule_batch.py:2026, managers/schedule_batch.py:2034"),
        Cell("partly", "As EAGLE3: trimmed, but a stop string beats an EOS before it in a run",
             "managers/schedule_batch.py:2026, managers/schedule_batch.py:2034"),
        Cell("partly", "As EAGLE3: trimmed, but a stop string beats an EOS before it in a run",
             "managers/schedule_batch.py:2026, managers/schedule_batch.py:2034"),
        Cell("partly", "As EAGLE3: trimmed, but a stop string beats an EOS before it in a run",
             "managers/schedule_batch.py:2026, managers/schedule_batch.py:2034"),
        Cell("partly", "A block is trimmed like a run, so a stop string beats an EOS before it in the block",
             "dllm/mixin/scheduler.py:120, dllm/mixin/scheduler.py:158, managers/schedule_batch.py:2026"),
    ),
    "batches": _row(
        Cell("yes", "input_embeds by /generate only, and needs --disable-radix-cache",
             "managers/io_struct.py:617, managers/tokenizer_manager.py:1110"),
        Cell("yes", "input_embeds reach the draft model unshifted, which touches acceptance only",
             "managers/tokenizer_manager.py:1110, speculative/eagle_worker_v2.py:1024, model_executor/model_runner.py:1771"),
        Cell("yes", "For input_embeds the corpus lookup sees placeholder ids, which touches acceptance only",
             "managers/scheduler.py:2982, speculative/ngram_worker.py:251"),
        Cell("yes", "As AR; the draft reads the target's hidden states, not the prompt's ids",
             "managers/tokenizer_manager.py:1110, speculative/dflash_worker_v2.py:2408"),
        Cell("yes", "As AR; prefill is the target's own",
             "managers/tokenizer_manager.py:1110, speculative/uno_worker_v2.py:417"),
        Cell("partly", "n, lists and input_ids work, n giving equal answers; input_embeds lack rows for the mask positions, effect unclear",
             "dllm/mixin/req.py:105, managers/schedule_batch.py:2938, dllm/algorithm/low_confidence.py:35"),
    ),
    "lifecycle": _row(
        Cell("yes", "An aborted running request takes one more forward",
             "managers/scheduler.py:5675, managers/scheduler.py:5817, managers/scheduler.py:5518"),
        Cell("yes", "The scheduler's, as AR; a streamed chunk may carry a whole run",
             "managers/scheduler.py:5675, managers/scheduler.py:5817, managers/scheduler.py:5531"),
        Cell("yes", "As AR; flush_cache also resets the corpus",
             "managers/scheduler.py:5531, speculative/ngram_worker.py:151"),
        Cell("yes", "The scheduler's, as AR; a streamed chunk may carry a whole run",
             "managers/scheduler.py:5675, managers/scheduler.py:5817, managers/scheduler.py:5531"),
        Cell("yes", "The scheduler's, as AR; a streamed chunk may carry a whole run",
             "managers/scheduler.py:5675, managers/scheduler.py:5817, managers/scheduler.py:5531"),
        Cell("partly", "Abort and in-place pause work; pause with retract frees requests that the dLLM manager still holds, effect unclear",
             "managers/scheduler.py:5725, managers/scheduler.py:5821, managers/scheduler.py:5861, managers/scheduler.py:3909, dllm/mixin/scheduler.py:452"),
    ),
    "custom_processors": _row(
        Cell("yes", "After penalties, mask and bias; under overlap the request they see lacks the newest token",
             "layers/sampler.py:144, managers/tokenizer_manager.py:1413, managers/schedule_batch.py:1154, managers/tp_worker.py:744"),
        Cell("ignored", "Run for the prefill token only; verify never calls them",
             "speculative/eagle_utils.py:562, layers/sampler.py:144"),
        Cell("ignored", "Run for the prefill token only; verify never calls them",
             "speculative/ngram_worker.py:479, speculative/eagle_utils.py:562"),
        Cell("partly", "Run on every verify row, but the request they see lacks the drafts before it; before bias and mask",
             "speculative/dflash_utils.py:229, managers/schedule_batch.py:1154"),
        Cell("refused", "HTTP 400",
             "speculative/uno_validation.py:44"),
        Cell("ignored", "No sampler runs",
             "managers/tp_worker.py:671, dllm/algorithm/base.py:61"),
    ),
    "hidden_lora": _row(
        Cell("yes", "Behind --return-hidden-states-mode and --enable-lora",
             f"managers/tokenizer_manager.py:1398, {_RESULTS}:1072, managers/tokenizer_manager.py:3729"),
        Cell("partly", "LoRA on the target only; EAGLE3 returns the packed auxiliary layers instead of the last hidden state",
             "arg_groups/lora_hook.py:252, layers/logits_processor.py:868, speculative/eagle_utils.py:387"),
        Cell("partly", "LoRA honoured; hidden states are read in tree-node order, wrong where the tree branches",
             f"arg_groups/lora_hook.py:247, speculative/ngram_worker.py:494, {_RESULTS}:1080"),
        Cell("partly", "LoRA on the target only; return_hidden_states refused under overlap, left empty without it",
             "arg_groups/lora_hook.py:252, speculative/dflash_utils.py:1109, speculative/dflash_worker_v2.py:2995"),
        Cell("refused", "HTTP 400 for hidden states; --enable-lora is refused at start-up",
             "speculative/uno_validation.py:29, arg_groups/speculative_hook.py:582"),
        Cell("ignored", "return_hidden_states has no effect; LoRA is switched off at start-up, so lora_path is refused",
             "dllm/mixin/scheduler.py:161, arg_groups/dllm_hook.py:103, managers/tokenizer_manager.py:3729"),
    ),
    "meta": _row(
        Cell("yes", "No acceptance fields; one token per forward",
             "managers/tokenizer_manager.py:2755"),
        Cell("partly", "Drafts that a stop or grammar cut off still count; the length includes the prefill token; adaptive widths not followed",
             f"{_RESULTS}:834, managers/tokenizer_manager.py:3157, managers/tokenizer_manager.py:3167"),
        Cell("partly", "Drafts that a stop or grammar cut off still count; the length includes the prefill token",
             f"{_RESULTS}:834, managers/tokenizer_manager.py:3167"),
        Cell("partly", "Drafts that a stop or grammar cut off still count; the length includes the prefill token",
             f"{_RESULTS}:834, managers/tokenizer_manager.py:3167"),
        Cell("partly", "The length is per round, and a round is two forwards of the target",
             "speculative/uno_worker_v2.py:695, speculative/uno_worker_v2.py:723, managers/tokenizer_manager.py:3167"),
        Cell("ignored", "Neither denoising steps nor tokens per forward are reported",
             "managers/tokenizer_manager.py:2755, dllm/mixin/scheduler.py:157"),
    ),
    "endpoints": _row(
        Cell("yes", "All of them",
             "entrypoints/http_server.py:1870, entrypoints/http_server.py:2050, entrypoints/http_server.py:2066, entrypoints/http_server.py:2160"),
        Cell("partly", "score: set-wise readout gives a row per prompt position, multi-item raises; plain items work",
             "managers/schedule_batch.py:1506, managers/tokenizer_manager_score_mixin.py:394, managers/tokenizer_manager_score_mixin.py:169"),
        Cell("partly", "score: set-wise readout gives a row per prompt position, multi-item raises; plain items work",
             "managers/schedule_batch.py:1506, managers/tokenizer_manager_score_mixin.py:394, managers/tokenizer_manager_score_mixin.py:169"),
        Cell("partly", "score: set-wise readout gives a row per prompt position, multi-item raises; plain items work",
             "managers/schedule_batch.py:1506, managers/tokenizer_manager_score_mixin.py:394, managers/tokenizer_manager_score_mixin.py:169"),
        Cell("partly", "score is refused, because it asks for logprobs",
             "managers/tokenizer_manager_score_mixin.py:1197, speculative/uno_validation.py:26"),
        Cell("partly", "score raises for want of logprobs; decisions refuses",
             "managers/tokenizer_manager_score_mixin.py:402, entrypoints/openai/serving_decisions.py:181"),
    ),
}
