"""Serve Introspective Diffusion Language Models through SGLang."""

__version__ = "0.1.0"
