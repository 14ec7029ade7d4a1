"""Untrusted text in messages: one short line, whatever it holds."""

import logging
import subprocess
import sys

import pytest

from balcaprl.logtext import MAX_CHARS, PrintableFormatter, leave_out, printable
from balcaprl.rewards.endpoint.server.redaction import redact

HOSTILE = [
    "\x1b[2J\x1b[31m",
    "a\nERROR forged: line",
    "a\r\nb",
    "\x07\x00\x9b",
    "\u202edesrever",
    "\u200b\u2066",
    "\u2028\u2029",
    "\ud800",
    "\U000e0041",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_acts_on_a_terminal_or_a_log_is_left(text):
    assert printable(text).isprintable()
    assert redact(text, []).isprintable()
    printable(text).encode()


def test_ordinary_text_of_any_language_is_unchanged():
    for text in ("A red cat.", "红色的球", "é ñ ü", "שלום", "नमस्ते", ""):
        assert printable(text) == text


def test_long_text_is_cut_and_says_so():
    shown = printable("x" * 1_000_000)
    assert shown.startswith("x" * MAX_CHARS)
    assert shown.endswith("(1,000,000 characters)")
    assert len(shown) < MAX_CHARS + 50
    assert len(printable("\x00" * 1_000_000)) < 5 * MAX_CHARS


def test_the_formatter_keeps_line_ends_alone():
    record = logging.LogRecord("n", logging.WARNING, "f", 1, "a %s\n  b", ("\x1b[2J",), None)
    assert PrintableFormatter("%(message)s").format(record) == "a \\x1b[2J\n  b"


def test_the_command_line_logs_through_it():
    script = (
        "import logging, balcaprl.cli.main as c\n"
        "run = lambda _: logging.getLogger('balcaprl.x').warning('%s', '\\x1b[2J') or 0\n"
        "c._COMMANDS['doctor'] = c._COMMANDS['doctor']._replace(run=run); c.main(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=600)
    assert b"\x1b" not in done.stderr
    assert b"\\x1b[2J" in done.stderr


def test_one_known_message_of_another_package_is_left_out_and_no_other(caplog):
    foreign = logging.getLogger("foreign.part")
    leave_out("foreign.part", "Known and harmless")
    with caplog.at_level(logging.INFO):
        foreign.warning("Known and %s: details", "harmless")
        foreign.warning("Known, and harmful")
        logging.getLogger("foreign.other").warning("Known and harmless")
    assert caplog.messages == ["Known, and harmful", "Known and harmless"]
