"""Makes untrusted text safe for messages: text from records, file names, models or servers becomes one short line."""

from __future__ import annotations

import logging

MAX_CHARS = 200
"""Number of characters after which untrusted text in a message is cut."""
MAX_OF_A_KIND = 20
"""Number of warnings of one kind that are logged; further ones are only counted."""


def printable(text: object, limit: int = MAX_CHARS) -> str:
    """``str(text)`` on one line, cut after ``limit`` characters.

    Characters that are invisible, move the cursor or change the direction of the writing are escaped.

    >>> printable("a\\x1b[2J\\nERROR: b")
    'a\\\\x1b[2J\\\\nERROR: b'
    """
    whole = str(text)
    shown = _escaped(whole[:limit], "")
    return shown if len(whole) <= limit else f"{shown}... ({len(whole):,} characters)"


class PrintableFormatter(logging.Formatter):
    """Escapes unprintable characters in every log message, whoever wrote it, as a second safeguard.

    Line ends and tabs stay.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format the record as ``logging.Formatter`` does, and escape its unprintable characters."""
        return printable_lines(super().format(record))


def printable_lines(text: str) -> str:
    """The whole text with unprintable characters escaped, except line ends and tabs."""
    return _escaped(text, "\n\t")


def _escaped(text: str, kept: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def log_few(logger: logging.Logger, count: int, message: str, *arguments: object) -> None:
    """Log the ``count``-th warning of a kind; after ``MAX_OF_A_KIND`` warnings, log nothing."""
    if count <= MAX_OF_A_KIND:
        more = "" if count < MAX_OF_A_KIND else " (further cases are only counted)"
        logger.warning(message + more, *arguments)


def leave_out(logger_name: str, beginning: str) -> None:
    """Suppress the messages of a logger that begin with ``beginning``: known, harmless messages of another package."""
    logging.getLogger(logger_name).addFilter(lambda record: not record.getMessage().startswith(beginning))
