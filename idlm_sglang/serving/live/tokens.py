"""The tokens of a traced answer one by one: text, and how each came."""

from collections.abc import Iterable, Iterator

FIRST, ACCEPTED, SALVAGED, CORRECTED, BONUS, SINGLE, COLD = ORIGINS = ("first", "accepted", "salvaged", "corrected", "bonus", "single", "cold")

# Tokens of context: what a token's text looks like depends on a few in front of it (spaces, characters of several tokens).
_CONTEXT = 8
# A character has up to four bytes, each of which may be a token; what is longer is no character.
_LONGEST = 4


def origins(forward: list) -> Iterator[tuple[str, int]]:
    """How each token of a forward came, and its position behind the pending token, from 1.

    Args:
        forward: ``[tokens, kind, drafts, accepted]`` of ``engine.trace``.
    """
    tokens, kind, drafts, accepted = forward
    for position in range(1, tokens + 1):
        if kind == "prefill":
            yield FIRST, position
        elif kind in ("single", "cold"):
            yield kind, position
        elif position <= accepted:
            yield (SALVAGED if kind == "salvage" else ACCEPTED), position
        else:
            yield (BONUS if accepted == drafts else CORRECTED), position


class Pieces:
    """The text that each token adds, without special tokens; all of them joined are the answer's text.

    A character that several tokens make up is the piece of the last of them.

    Args:
        tokenizer: as of transformers.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text is out

    def add(self, ids: Iterable[int]) -> list[str]:
        """The pieces of the next tokens."""
        return [self._next(token) for token in ids]

    def _next(self, token: int) -> str:
        self._ids.append(token)
        piece = self._unshown()
        if piece.endswith("\ufffd") and len(self._ids) - self._shown < _LONGEST:
            return ""
        self._shown = len(self._ids)
        return piece

    def rest(self) -> str:
        """What an answer that ends inside a character still shows."""
        return self._unshown() if self._shown < len(self._ids) else ""

    def _unshown(self) -> str:
        begin = max(self._shown - _CONTEXT, 0)
        before = self._text(self._ids[begin : self._shown])
        return self._text(self._ids[begin:])[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


class TracedAnswer:
    """A stream of ``/generate`` answers with a trace, as tokens.

    Args:
        tokenizer: as of transformers.
    """

    def __init__(self, tokenizer):
        self._pieces = Pieces(tokenizer)
        self._names = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
        self._tokens = self._told = 0
        self.forwards = 0

    def see(self, answer: dict) -> list[dict]:
        """The tokens that are new in ``answer``, whole or an increment: ``id``, ``text``, ``origin``, ``position`` and ``step`` (of
        the decode forwards, from 1; 0 for a token of the prefill), ``special`` for one with a name and no text."""
        meta = answer["meta_info"]
        ids = answer["output_ids"][-(meta["completion_tokens"] - self._tokens) :] if meta["completion_tokens"] > self._tokens else []
        came = []
        for forward in meta["idlm_trace"][self._told :]:
            self.forwards += forward[1] != "prefill"
            came += [(origin, position, 0 if origin == FIRST else self.forwards) for origin, position in origins(forward)]
        self._told, self._tokens = len(meta["idlm_trace"]), meta["completion_tokens"]
        found = []
        for token, text, (origin, position, step) in zip(ids, self._pieces.add(ids), came, strict=True):
            one = {"id": token, "text": text, "origin": origin, "position": position, "step": step}
            found.append(one | ({"special": self._names[token]} if token in self._names else {}))
        return found

    def rest(self) -> str:
        """Text behind the last piece."""
        return self._pieces.rest()
