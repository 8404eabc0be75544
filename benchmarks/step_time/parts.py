"""The parts of one decode step. They are disjoint and add up to the step's wall time."""

ATTENTION, GEMM, LM_HEAD, MODEL, VERIFY, SETUP, HOST = PARTS = ("attention", "gemm", "lm_head", "model", "verify", "setup", "host")

MEANING = {
    ATTENTION: "attention over the KV cache, its KV write and its plan",
    GEMM: "the linear layers of the model",
    LM_HEAD: "hidden states to logits over the vocabulary, MASK removed",
    MODEL: "other model ops: embedding, norms, rotary, activation",
    VERIFY: "ISD: everything behind the forward (request terms, target, accept, propose, state); AR and stride 1: the sampler",
    SETUP: "the worker's own work before the forward: rows, positions, KV slots, SGLang's forward batch",
    HOST: "host gap. CPU: everything outside the worker (scheduler, results, answers); GPU: time in which it runs nothing",
}

TITLE = {ATTENTION: "attention", GEMM: "GEMM", LM_HEAD: "LM head", MODEL: "other model ops", VERIFY: "verify / sample", SETUP: "set-up", HOST: "host gap"}

PREFIX = "step_time/"
STEP = "step"
"""Names of the ranges in a trace: PREFIX + part, and PREFIX + STEP + description around each scheduler step."""
