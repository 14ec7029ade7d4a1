"""Untrusted text in messages: what a record, a file name, a model or a server says is shown as one short, harmless line."""

from __future__ import annotations

import logging

MAX_CHARS = 200
"""Longest piece of untrusted text in a message, before it is cut."""
MAX_OF_A_KIND = 20
"""Warnings of one kind before the rest are only counted."""


def printable(text: object, limit: int = MAX_CHARS) -> str:
    """``str(text)`` on one line: what shows nothing, moves the cursor or turns the writing is escaped, the rest cut.

    >>> printable("a\\x1b[2J\\nERROR: b")
    'a\\\\x1b[2J\\\\nERROR: b'
    """
    whole = str(text)
    shown = _escaped(whole[:limit], "")
    return shown if len(whole) <= limit else f"{shown}... ({len(whole):,} characters)"


class PrintableFormatter(logging.Formatter):
    """The second fence: no message reaches the terminal with control characters, whoever wrote it. Line ends stay."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        return printable_lines(super().format(record))


def printable_lines(text: str) -> str:
    """As ``printable``, but whole, and with its line ends."""
    return _escaped(text, "\n\t")


def _escaped(text: str, kept: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def log_few(logger: logging.Logger, count: int, message: str, *arguments: object) -> None:
    """Warn of the ``count``-th case of a kind; after ``MAX_OF_A_KIND`` of them no more is said."""
    if count <= MAX_OF_A_KIND:
        more = "" if count < MAX_OF_A_KIND else " (further cases are only counted)"
        logger.warning(message + more, *arguments)


def leave_out(logger_name: str, beginning: str) -> None:
    """Drop a known, harmless message of another package: what its logger says that begins so, and nothing else."""
    logging.getLogger(logger_name).addFilter(lambda record: not record.getMessage().startswith(beginning))
