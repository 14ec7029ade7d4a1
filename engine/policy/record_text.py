"""Texts of records are data: no control token may arise from one, in prompts or in lengths.

A tokenizer reads ``<|im_end|>`` in a text as the end of a turn, and a processor replaces ``<|image_pad|>`` by an image,
wherever they come from. An instruction that holds such a token is refused; lengths are counted as if its signs were ordinary.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any


class RecordText:
    """What the tokenizer and the processor of a policy make of texts that others wrote."""

    def __init__(self, processor: Any, tokenizer: Any) -> None:
        """``processor`` may be the tokenizer itself."""
        self._processor, self._tokenizer = processor, tokenizer

    def control_token(self, text: str) -> str | None:
        """The first control token that the text would become part of a prompt as; None where it has none."""
        written = [token for token in self._controls if token in text]
        if written:
            return min(written, key=lambda token: (text.index(token), -len(token)))
        # A normalising tokenizer finds tokens that are not written out; an unknown sign is no token of control.
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        return next((self._special[i] for i in ids if i in self._special), None)

    def count_tokens(self, text: str) -> int:
        """Length of a text in tokens, without special ones; a control token counts as the signs that it is written with."""
        return len(self._plain_tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    @cached_property
    def _special(self) -> dict[int, str]:
        """Ids that act in a prompt: special tokens, and added ones that the chat template writes."""
        templates = [getattr(part, "chat_template", None) for part in (self._processor, self._tokenizer)]
        template = "\n".join(str(each) for each in templates if each)
        added = {i: t for i, t in self._tokenizer.added_tokens_decoder.items() if t.special or t.content in template}
        named = zip(self._tokenizer.all_special_ids, self._tokenizer.all_special_tokens, strict=False)
        found = {**{i: token.content for i, token in added.items()}, **dict(named)}
        return {i: token for i, token in found.items() if i != self._tokenizer.unk_token_id}

    @cached_property
    def _controls(self) -> frozenset[str]:
        """As they are written: those of the tokenizer, and what the processor looks for in texts before it tokenises them."""
        found = {*self._special.values(), *self._tokenizer.all_special_tokens}
        for part in (self._processor, self._tokenizer):
            for name, value in vars(part).items():
                if name.endswith("_token") and value:
                    found.add(str(getattr(value, "content", value)))
        return frozenset(token for token in found if token.strip())

    @cached_property
    def _plain_tokenizer(self) -> Any:
        """A tokenizer of its own: how special tokens are split is kept inside of it, and another thread tokenises prompts."""
        return copy.deepcopy(self._tokenizer)
