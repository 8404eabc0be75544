"""Attention for short training rows on a CPU, as a transformers attention implementation named `plain`."""

from transformers import AttentionInterface

NAME = "plain"


def plain_attention(module, query, key, value, attention_mask, scaling, **_):
    """softmax(q k^T + mask) v with an additive mask, for transformers. On one CPU thread and rows this short, forward and backward take
    less than half the time of the fused CPU kernel with a mask.

    query: (B, heads, T, d). key, value: (B, kv_heads, T, d). attention_mask: (B, 1, T, T), 0 or -inf. Returns (B, T, heads, d), None.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query * scaling) @ key.transpose(-1, -2) + attention_mask
    return (scores.softmax(-1, dtype=query.dtype) @ value).transpose(1, 2), None


AttentionInterface.register(NAME, plain_attention)
