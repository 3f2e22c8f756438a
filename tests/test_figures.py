"""The README's pictures and tables, from what stages and judge have written."""

import json
import sys

import pytest
from conftest import ROOT

import stage0_model as stage0

sys.path.insert(0, str(ROOT / "docs"))

import figures  # noqa: E402


def test_curves_of_two_seeds_are_one_picture(tmp_path):
    pytest.importorskip("matplotlib")
    for folder in ("a/stage1", "b/stage1", "a/stage2"):
        (tmp_path / folder).mkdir(parents=True)
        rows = [
            {"step": s, "loss": 1.0 / s, "entropy": 0.5}
            | ({"valid": 0.1 * s, "reward": -1} if "1" in folder else {})
            for s in range(1, 9)
        ]
        (tmp_path / folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = [str(tmp_path / f) for f in ("a/stage1", "b/stage1", "a/stage2")]
    figures.draw_curves(folders, tmp_path / "assets" / "curves.png")
    assert (tmp_path / "assets" / "curves.png").stat().st_size > 5000
    with pytest.raises(stage0.UserError, match="no such file"):
        figures.draw_curves([str(tmp_path)], tmp_path / "x.png")


def test_a_summary_is_the_mean_over_seeds_and_their_range(tmp_path):
    zeros = dict.fromkeys(("valid", "parallel", "plans", "tokens", "critical path"), 0.0)
    gain = {"a": [0.1, 0.02], "b": [-0.05, 0.02]}  # a paired difference and half of its interval
    for seed, accuracy in (("a", 0.5), ("b", 0.8)):
        (tmp_path / seed).mkdir()
        result = zeros | {
            "accuracy": accuracy,
            "tokens/path": 2 * accuracy,
            "kinds": {"sums": {"accuracy": accuracy / 2}},
        }
        result |= {"checkpoint": f"out/{seed}/stage3", "mode": "parallel", "minus row above": gain[seed]}
        (tmp_path / seed / "eval.json").write_text(json.dumps({"checkpoints": [result]}))
    head, _, row = figures.summarise([tmp_path / "a", tmp_path / "b"]).splitlines()
    assert row.split()[:5] == ["stage3", "parallel", "2", "65.0", "(50.0-80.0)"]
    assert (
        "1.30 (1.00-1.60)" in row
        and "+2.5 (-5.0 to +10.0)" in row
        and row.endswith("32.5 (25.0-40.0)")
        and head.endswith("sums acc %")
    )
    with pytest.raises(stage0.UserError, match="eval.json: no such file"):
        figures.summarise([tmp_path])


def test_a_user_without_matplotlib_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it raises ImportError
    monkeypatch.setattr(
        sys, "argv", ["figures.py", "curves", str(tmp_path), "--out", str(tmp_path / "x.png")]
    )
    with pytest.raises(SystemExit) as caught:
        stage0.run_main(figures.main)
    assert caught.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err


def test_the_summary_is_printed(tmp_path, monkeypatch, capsys):
    keys = (*figures.PERCENT, *figures.NUMBERS)
    result = dict.fromkeys(keys, 0.5) | {
        "checkpoint": "out/stage1",
        "mode": "format",
        "minus row above": None,
        "kinds": {},
    }
    (tmp_path / "eval.json").write_text(json.dumps({"checkpoints": [result]}))
    monkeypatch.setattr(sys, "argv", ["figures.py", "summary", str(tmp_path)])
    figures.main()
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[:4] == ["stage1", "format", "1", "50.0"] and last[-1] == "-"  # no row above it, no gain


def test_a_picture_is_never_drawn_over_what_is_no_picture(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "log.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.6}\n')
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(stage0.UserError, match="is there and no picture"):
        figures.draw_curves([tmp_path / "stage1"], notes)
    assert notes.read_text() == "mine"
    for _ in range(2):  # but over an older picture
        figures.draw_curves([tmp_path / "stage1"], tmp_path / "curves.png")
