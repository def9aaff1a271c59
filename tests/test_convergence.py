"""The convergence experiment runs at a size of seconds, and its verdicts follow from its losses."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = {
    "steps": 10,
    "seeds": 1,
    "vocab": 4096,
    "batch": 8,
    "seq-len": 128,
    "width": 64,
    "device": "cpu",
    "minutes": "inf",
}


@pytest.fixture
def convergence(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import convergence

    return convergence


def test_it_trains_each_way_and_writes_what_it_prints(tmp_path):
    import numpy as np

    generator = np.random.default_rng(0)
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, (generator.random(400_000) ** 4 * 4096).astype(np.uint16))  # low ids are frequent
    options = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, str(EXAMPLES / "convergence.py"), *options, f"--tokens={tokens}", f"--output={tmp_path}"]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "--ways=exact,2^-3"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads((tmp_path / "convergence.json").read_text())
    exact, approximate = record["runs"]
    assert (exact["way"], approximate["way"]) == ("exact", "2^-3")
    assert exact["steps"] == list(range(1, 11))
    assert exact["curve"][-1] < exact["curve"][0]
    assert exact["rare_loss"] > exact["loss"]
    assert approximate["loss"] == pytest.approx(exact["loss"], rel=1e-4)  # on a CPU all ways are exact
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert "2^-3 differs by" in run.stdout


def test_verdicts_compare_means_with_the_spread_of_exact(convergence):
    def runs(way, losses, rare):
        return [
            convergence.Run(way, seed, [], [], loss, rare_loss, 0.0, None)
            for seed, (loss, rare_loss) in enumerate(zip(losses, rare, strict=True))
        ]

    answers = convergence.verdicts(
        [
            *runs("exact", [4.0, 4.1, 4.2], [9.0, 9.1, 9.2]),
            *runs("default", [4.1, 4.1, 4.3], [9.3, 9.3, 9.3]),
            *runs("dropped", [5.0, 5.0, 5.0], [8.0, 8.0, 8.0]),
        ]
    )
    assert {way: (a["loss"].get("holds"), a["rare_loss"].get("holds")) for way, a in answers.items()} == {
        "exact": (None, None),
        "default": (True, False),
        "dropped": (False, True),
    }
    assert answers["default"]["loss"]["difference"] == pytest.approx(0.2 / 3)


def test_steps_are_what_the_minutes_allow(convergence, monkeypatch):
    starts = iter([(40.0, 0.1), (5.0, 0.1)])  # seconds of a cold and a warm start, and of a step
    monkeypatch.setattr(convergence, "_start_and_step", lambda _: next(starts))
    args = argparse.Namespace(minutes=6, steps=900)
    trainer = argparse.Namespace(args=args)
    assert convergence.affordable_steps(trainer, ways=4, runs=12) == int((360 - 4 * 40 - 12 * 5) / 12 / 0.1)
    args.minutes = float("inf")
    assert convergence.affordable_steps(trainer, ways=4, runs=12) == 900


def test_rare_tokens_make_up_a_tenth_of_the_held_out_text(convergence):
    counts = torch.tensor([50, 30, 12, 5, 3])
    text = torch.arange(5).repeat_interleave(counts)
    rare = convergence.rare_tokens(text, text, 5)
    assert rare.tolist() == [False, False, False, True, True]
