"""Keeps dataset text from producing control tokens, in prompts and when lengths are counted.

A tokenizer reads ``<|im_end|>`` in any text as the end of a turn, and a processor replaces ``<|image_pad|>`` in any
text by an image. An instruction that contains such a token is refused. Lengths are counted as if the characters of such
a token were ordinary text.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any


class RecordText:
    """Finds control tokens in dataset text and counts the text's tokens, with a policy's tokenizer and processor."""

    def __init__(self, processor: Any, tokenizer: Any) -> None:
        """Use this processor and tokenizer; ``processor`` may be the tokenizer itself."""
        self._processor, self._tokenizer = processor, tokenizer

    def control_token(self, text: str) -> str | None:
        """Return the first control token that the text would put into a prompt; None if there is none."""
        written = [token for token in self._controls if token in text]
        if written:
            return min(written, key=lambda token: (text.index(token), -len(token)))
        # A tokenizer that normalises text can produce special tokens that are not written out in it.
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        return next((self._special[i] for i in ids if i in self._special), None)

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text, without special ones; a control token counts as the characters that spell it."""
        return len(self._plain_tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    @cached_property
    def _special(self) -> dict[int, str]:
        """Tokens that act in a prompt, by id: special tokens, and added tokens that the chat template writes.

        The unknown token is left out: text with unknown characters is ordinary text.
        """
        templates = [getattr(part, "chat_template", None) for part in (self._processor, self._tokenizer)]
        template = "\n".join(str(each) for each in templates if each)
        added = {i: t for i, t in self._tokenizer.added_tokens_decoder.items() if t.special or t.content in template}
        named = zip(self._tokenizer.all_special_ids, self._tokenizer.all_special_tokens, strict=False)
        found = {**{i: token.content for i, token in added.items()}, **dict(named)}
        return {i: token for i, token in found.items() if i != self._tokenizer.unk_token_id}

    @cached_property
    def _controls(self) -> frozenset[str]:
        """Control tokens as text: those of the tokenizer, and those that the processor looks for before tokenising."""
        found = {*self._special.values(), *self._tokenizer.all_special_tokens}
        for part in (self._processor, self._tokenizer):
            for name, value in vars(part).items():
                if name.endswith("_token") and value:
                    found.add(str(getattr(value, "content", value)))
        return frozenset(token for token in found if token.strip())

    @cached_property
    def _plain_tokenizer(self) -> Any:
        """A copy of the tokenizer: whether it splits special tokens is state, and another thread tokenises prompts."""
        return copy.deepcopy(self._tokenizer)
