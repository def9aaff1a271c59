"""The benchmark runs from the command line and writes what it prints."""

import json
import sys

from cce_inductor.bench import __main__ as bench


def test_it_prints_and_writes_figures_of_every_method(monkeypatch, tmp_path, capsys):
    path = tmp_path / "figures.json"
    arguments = f"bench --shapes tiny --methods eager,cce --dtype fp32 --device cpu --seconds 0 --json {path}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    bench.main()
    figures = json.loads(path.read_text())
    assert figures["about"]["dtype"] == "fp32"
    assert [row["method"] for row in figures["results"]] == ["eager", "cce"]
    assert all(row["forward_ms"] > 0 and 0 < row["weight_error"] < 1e-5 for row in figures["results"])
    assert "N=256 V=4099 D=64" in capsys.readouterr().out
