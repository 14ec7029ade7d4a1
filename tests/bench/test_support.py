"""Figures keep their history: their sources are found, and known by content and not by path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import run
import sync
import train_step
import update_step
from support import provenance, rows

SOURCES = {script.__name__: script.SOURCES for script in (run, sync, train_step, update_step)}


@pytest.mark.parametrize("script", SOURCES)
def test_every_pattern_of_sources_finds_files(script: str) -> None:
    """A file that is moved must not leave the digest unnoticed."""
    assert [pattern for pattern in SOURCES[script] if not any(provenance.ROOT.glob(pattern))] == []


def test_a_digest_knows_contents_and_not_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "b.py").write_text("b = 1\n")
    before = provenance.sources_digest(["*.py"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.py").rename(tmp_path / "folder" / "z.py")
    assert provenance.sources_digest(["folder/z.py", "*.py"]) == before
    assert provenance.sources_digest(["*.py"]) != before
    (tmp_path / "b.py").write_text("b = 2\n")
    assert provenance.sources_digest(["**/*.py"]) != before


def test_rows_are_appended_and_only_those_of_the_same_conditions_are_found_again(tmp_path: Path, capsys) -> None:
    target = rows.target_path(None, tmp_path / "new" / "rows.jsonl")
    assert target is not None
    rows.append_rows([{"case": 1, "threads": 2}, {"case": 2, "threads": 4}], target)
    rows.append_rows([{"case": 3, "threads": 2}], target)
    rows.append_rows([{"case": 4, "threads": 2}], rows.target_path("-", target))
    assert [row["case"] for row in rows.earlier_rows(target, {"threads": 2}, ["threads"])] == [1, 3]
    assert rows.read_folder(target.parent) == rows.read_rows(target)
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert rows.earlier_rows(None, {}, []) == rows.earlier_rows(tmp_path / "none.jsonl", {}, []) == []
