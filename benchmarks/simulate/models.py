"""Dimensions of the served models, and the bytes and operations that follow from them."""

from dataclasses import dataclass

from benchmarks.simulate.devices import BF16, FP8

_BYTES = {BF16: 2, FP8: 1}


@dataclass(frozen=True)
class Model:
    """A dense Qwen3, as its config.json has it; embedding and LM head are not tied."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    @property
    def linear(self) -> int:
        """Weights of all layers' matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def lm_head(self) -> int:
        return self.vocab * self.hidden

    def bytes_read(self, dtype: str) -> int:
        """Weight bytes that a forward reads. An FP8 checkpoint keeps its LM head in bf16; the embedding is a look-up."""
        return self.linear * _BYTES[dtype] + self.lm_head * _BYTES[BF16]

    def bytes_kept(self, dtype: str) -> int:
        """Weight bytes in memory: the embedding too."""
        return self.bytes_read(dtype) + self.lm_head * _BYTES[BF16]

    @property
    def kv_bytes(self) -> int:
        """Of one token, keys and values in bf16, whatever the weights are."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _BYTES[BF16]


MODELS = {
    m.name: m
    for m in (
        Model("8B", layers=36, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=12288, vocab=151936),
        Model("32B", layers=64, hidden=5120, heads=64, kv_heads=8, head_dim=128, ffn=25600, vocab=151936),
    )
}
