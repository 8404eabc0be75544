"""Triton kernels, each op beside its plain-torch reference. They import neither SGLang nor idlm_sglang."""
