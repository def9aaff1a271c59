"""The examples run as a user runs them, at a size that takes seconds."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS, VOCAB = 8, 4096
# 1024 tokens a step: the smallest logits that are rewritten by default, 16 MiB
TINY = {"steps": STEPS, "vocab": VOCAB, "batch": 8, "seq-len": 128, "layers": 1, "width": 64, "device": "cpu"}
TINY |= {"characters": 500_000}  # of which a tokenizer is made in a second


def test_train_gpt_learns_the_same_with_every_method(tmp_path):
    options = [f"--{name}={value}" for name, value in TINY.items()]
    # One compiler cache for both compiled methods: most of their kernels are the same.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(EXAMPLES / "train_gpt.py"), *options, f"--output={tmp_path}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

    results = {r["method"]: r for r in json.loads((tmp_path / "train_gpt.json").read_text())}
    assert list(results) == ["eager", "inductor", "cce"]
    assert results["cce"]["rewrites"] == 1
    for result in results.values():
        assert len(result["losses"]) == STEPS
        assert result["losses"][-1] < result["losses"][0]
    # Same weights and batches in float32: what differs is the order of sums, the longest over the vocabulary.
    # VOCAB units of rounding bound what that does to one loss, and so few steps amplify it little.
    tolerance = VOCAB * 2**-24 * results["eager"]["losses"][0]
    assert results["cce"]["difference"] < tolerance
    assert (tmp_path / "train_gpt.png").read_bytes().startswith(b"\x89PNG")


def test_train_gpt_stops_where_nothing_is_rewritten(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from train_gpt import first_step_with_reports

    with pytest.raises(SystemExit, match="rewrote nothing"):
        first_step_with_reports(lambda: 0.0)


def test_compile_loss_with_model_shows_the_report_before_and_after():
    command = [sys.executable, str(EXAMPLES / "compile_loss_with_model.py")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    _, model, loss, both = run.stdout.split("--- ")
    assert "0 rewritten, 1 refused" in model
    assert "the logits are returned and no loss of them is in this graph" in model
    assert "0 rewritten, 1 refused" in loss
    assert "its logits are an input of this graph, `logits`" in loss
    assert "what to do: compile head and loss together" in model
    assert "what to do: compile head and loss together" in loss
    assert "1 rewritten, 0 refused" in both
    assert "head [V=8192, D=64] -> float32" not in both  # a float32 model: nothing is cast
    assert "head [V=8192, D=64] -> mean cross-entropy, ignore_index -100" in both
    ours, eager = both.rsplit("loss ", 1)[1].split(", eager ")
    assert float(ours) == pytest.approx(float(eager), abs=1e-4)


def test_hf_trainer_step_measures_a_method_in_a_process_of_its_own(tmp_path):
    for library in ("transformers", "accelerate"):
        pytest.importorskip(library, reason=f"needs {library}: pip install cce_inductor[models]")
    figures = tmp_path / "figures.json"
    options = ["--size=tiny", "--steps=2", "--methods=cce", f"--json={figures}"]
    command = [sys.executable, str(EXAMPLES / "hf_trainer_step.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    [row] = json.loads(figures.read_text())["results"]
    assert row["rewrites"] == 1
    assert row["refusals"] == []
    assert row["loss"] == pytest.approx(math.log(4160), rel=0.01)  # of an untrained model
    assert row["tokens_per_s"] == pytest.approx(1000 * 8 * 128 / row["step_ms"])
    header, line = run.stdout.splitlines()[-2:]
    assert header.split()[:2] == ["method", "step_ms"]
    assert line.split()[0] == "cce"


def test_hf_trainer_step_says_why_a_method_has_no_figures(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import hf_trainer_step

    monkeypatch.setattr(sys, "argv", ["hf_trainer_step.py", "--size=huge"])
    rows = [{"method": "cce"} | hf_trainer_step.run("cce", limit) for limit in (60, 0.01)]
    wrong, late = hf_trainer_step.table(rows).splitlines()[1:]
    assert wrong.startswith("cce failed: hf_trainer_step.py: error: argument --size: invalid choice: 'huge'")
    assert late == "cce failed: took longer than 0 s"
