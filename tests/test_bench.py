"""The benchmark runs from the command line and writes what it prints; its data has the statistics that it claims."""

import json
import math
import re
import sys

import pytest
import torch

import cce_inductor
from cce_inductor.bench import __main__ as bench
from cce_inductor.bench import compiling, describe, heads, measure, methods
from cce_inductor.bench.data import make_data, mask_targets, read_head
from cce_inductor.bench.measure import Reference
from cce_inductor.bench.shapes import SHAPES, Shape, parse_shapes

SIZES = "1024,4160,64"  # the smallest logits that are rewritten by default
PEERS = ("cut_cross_entropy", "liger_kernel", "quack")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(monkeypatch, tmp_path, arguments):
    """What `python -m cce_inductor.bench <arguments>` writes to its JSON file."""
    path = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["bench", *arguments.split(), "--device", "cpu", "--json", str(path)])
    bench.main()
    return json.loads(path.read_text())


MEASURED = ("compile", "cce", "cce-lean", "cce-direct")  # each that is compiled takes ten seconds


def test_a_method_is_measured_or_skipped_with_a_reason(monkeypatch, tmp_path, capsys):
    names = [*MEASURED, "cut-cross-entropy", "cut-cross-entropy-exact", "liger", "quack"]
    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer, None)  # makes its import fail, installed or not
    picture = tmp_path / "figures.png"
    arguments = f"--shapes {SIZES} --methods {','.join(names)} --dtype fp32 --seconds 0 --png {picture}"
    figures = run(monkeypatch, tmp_path, arguments)
    assert figures["about"]["dtype"] == "fp32"
    product, *rows = figures["results"]
    assert product["method"] == "product"
    assert product["tflops"] > 0
    assert [row["method"] for row in rows] == names
    by_name = {row["method"]: row for row in rows}
    skipped = {name for name, row in by_name.items() if "skipped" in row}
    assert skipped == set(names) - set(MEASURED)
    assert all("not installed" in by_name[name]["skipped"] for name in skipped)
    for name in MEASURED:
        row = by_name[name]
        assert row["forward_ms"] > 0
        assert row["both_ms"] > 0
        assert all(0 <= row[key] < 1e-5 for key in ("loss_error", "hidden_error", "weight_error", "weight_row_error"))
        for part in ("forward", "both"):  # ratios are of the same run
            assert row[f"{part}_of_compile"] == pytest.approx(row[f"{part}_ms"] / by_name["compile"][f"{part}_ms"])
    assert all(by_name[name]["rewrites"] == 1 for name in ("cce", "cce-lean"))
    printed = capsys.readouterr().out
    assert "N=1024 V=4160 D=64 trained" in printed
    assert "not installed" in printed
    if measure.PEAK_RESET.exists():
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_method_can_be_made_or_says_why_not():
    reasons = {}
    for name, method in methods.METHODS.items():
        try:
            assert callable(method.make(None)), name
        except methods.UnavailableError as error:
            reasons[name] = str(error)
    assert not reasons.keys() & {*MEASURED, "eager", "cce-exact", "cce-approx"}
    assert all(re.match(r"not installed: |torch .* has no ", reason) for reason in reasons.values()), reasons


def test_logits_may_be_capped(monkeypatch, tmp_path):
    names = "compile,cce-direct,quack"
    figures = run(monkeypatch, tmp_path, f"--shapes 64,128,16 --methods {names} --softcap 3 --seconds 0 --dtype fp32")
    _, compiled, ours, quack = figures["results"]
    assert quack["skipped"] == "it knows no soft cap"
    for row in (compiled, ours):
        assert row["data"] == "trained, logits capped at 3"
        assert all(0 <= row[key] < 1e-5 for key in ("loss_error", "hidden_error", "weight_error"))


@pytest.mark.parametrize("what", ["--scaling --softcap 3", "--describe --softcap 3", "--softcap 0"])
def test_a_cap_that_would_not_be_heeded_is_refused(what, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, f"--shapes 64,128,16 {what}")
    assert "cap" in capsys.readouterr().err


def test_masked_rows_are_compared_with_none_masked(monkeypatch, tmp_path):
    figures = run(monkeypatch, tmp_path, "--shapes 64,128,16 --methods compile,cce-direct --masked 0,0.6 --seconds 0")
    rows = {(row["masked"], row["method"]): row for row in figures["results"]}
    plain, masked = rows[0.0, "cce-direct"], rows[0.6, "cce-direct"]
    assert masked["weight_error"] < 1e-5
    assert masked["both_of_unmasked"] == pytest.approx(masked["both_ms"] / plain["both_ms"])
    assert masked["both_of_compile"] == pytest.approx(masked["both_ms"] / rows[0.6, "compile"]["both_ms"])
    assert "both_of_unmasked" not in plain


def test_a_spent_budget_skips_what_is_left(monkeypatch, tmp_path):
    figures = run(monkeypatch, tmp_path, "--shapes 64,128,16 --methods eager --budget 0")
    assert [row["skipped"] for row in figures["results"]] == ["the time budget is spent"]


def test_a_method_that_fails_is_a_row_with_the_reason(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("does not run here\nand more")

    monkeypatch.setitem(methods.METHODS, "eager", methods.Method(lambda softcap: fail, ""))
    figures = run(monkeypatch, tmp_path, "--shapes 64,128,16 --methods eager,cce-direct --seconds 0")
    _, failed, measured = figures["results"]
    assert failed["skipped"] == "RuntimeError: does not run here"
    assert measured["both_ms"] > 0


def test_the_file_is_whole_after_every_row(monkeypatch, tmp_path):
    path, seen = tmp_path / "figures.json", []
    monkeypatch.setattr(
        bench.heads, "run", lambda *_: ({"method": str(i), "data": "", "masked": 0, "skipped": ""} for i in range(3))
    )
    monkeypatch.setattr(
        bench.show, "line", lambda row: seen.append(path.exists() and json.loads(path.read_text())["results"]) or ""
    )
    run(monkeypatch, tmp_path, "--methods eager")
    assert [len(rows or []) for rows in seen] == [0, 1, 2]


def test_scaling_sweeps_rows_and_vocabulary(monkeypatch, tmp_path):
    picture = tmp_path / "scaling.png"
    sweep = "--scaling --shapes 2048,8192,16 --data untrained --methods eager,cce-direct --seconds 0"
    figures = run(monkeypatch, tmp_path, f"{sweep} --png {picture}")
    points = {(row["sweep"], row["rows"], row["vocab"]) for row in figures["results"]}
    assert points == {("N", 1024, 8192), ("N", 2048, 8192), ("V", 2048, 8192)}
    assert all(row["both_ms"] > 0 for row in figures["results"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_scaling_does_not_retry_what_ran_out_of_memory(monkeypatch, tmp_path):
    calls = []

    def exhausted(*_):
        calls.append(0)
        raise torch.OutOfMemoryError

    monkeypatch.setitem(methods.METHODS, "eager", methods.Method(lambda softcap: exhausted, ""))
    figures = run(monkeypatch, tmp_path, "--scaling --shapes 2048,4160,16 --methods eager")
    assert [row["skipped"] for row in figures["results"][:2]] == ["out of memory", "out of memory with less"]
    assert len(calls) == 2  # once in each sweep


def test_training_steps_are_measured(monkeypatch, tmp_path):
    arguments = "--train --models tiny --methods cce --batch 4 --most 6 --seconds 0"
    [row] = run(monkeypatch, tmp_path, arguments)["results"]
    assert row["rewrites"] == 1
    assert row["tokens_per_s"] == pytest.approx(1000 * 4 * 256 / row["step_ms"])
    assert row["largest_batch"] == 6


def test_compile_times_are_measured_cold_and_warm(monkeypatch, tmp_path, capsys):
    caches = []

    def in_a_process(cache, name, device):
        caches.append((cache, name))
        return {
            "seconds": 9.0 if caches.count((cache, name)) == 1 else 2.0,
            "pass_ms": 5.0,
            "rewrites": 1,
            "model": "own",
        }

    monkeypatch.setattr(compiling, "_in_a_process", in_a_process)
    monkeypatch.setattr(compiling, "MANY", 1)
    theirs, ours, alone = run(monkeypatch, tmp_path, "--compile-time")["results"]
    assert [row["method"] for row in (theirs, ours, alone)] == ["compile", "cce", "pass alone"]
    assert (ours["cold_s"], ours["warm_s"]) == (9.0, 2.0)
    assert (alone["layers"], alone["rewrites"]) == (1, 1)
    assert 0 < alone["pass_ms"] < 1000 * alone["seconds"]
    assert "cold 9.0 s   warm 2.0 s" in capsys.readouterr().out


def test_a_compilation_that_fails_gives_its_reason(tmp_path):
    with pytest.raises(RuntimeError, match="KeyError: 'no such method'"):
        compiling._in_a_process(str(tmp_path), "no such method", "cpu")


def test_the_largest_batch_is_found_to_within_an_eighth(monkeypatch):
    from cce_inductor.bench.train import largest_batch

    def step(batch):
        if batch > 37:
            raise torch.OutOfMemoryError

    freed = []
    monkeypatch.setattr(measure, "free_memory", lambda: freed.append(True))
    found = largest_batch(step, 2, 512, "cpu", heads.Budget(math.inf))
    assert 37 * 7 / 8 <= found <= 37
    assert freed


def test_a_head_from_a_file_is_what_is_measured(monkeypatch, tmp_path):
    save_file = pytest.importorskip("safetensors.torch", reason="heads are safetensors files").save_file
    hidden, classifier = torch.randn(24, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    targets = torch.randint(40, (24,), dtype=torch.int32)
    path = tmp_path / "head.safetensors"
    save_file({"hidden": hidden, "classifier": classifier, "targets": targets}, path)
    read = read_head(path, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(read, (hidden, classifier, targets.long()), strict=True))
    figures = run(monkeypatch, tmp_path, f"--head {path} --methods cce-direct --dtype fp32 --seconds 0")
    row = figures["results"][-1]
    assert (row["rows"], row["vocab"], row["width"], row["data"]) == (24, 40, 8, "head.safetensors")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("masked", [0.0, 0.6])
def test_the_reference_is_the_gradient_of_the_loss(masked, softcap, monkeypatch):
    monkeypatch.setattr(measure, "CHUNK_ELEMENTS", 300)  # chunks of a few rows, the last one shorter
    hidden, weight, target = make_data("trained", Shape(20, 96, 48), torch.float64, "cpu")
    target = mask_targets(target, masked)
    reference = Reference.of(hidden, weight, target, softcap)
    inputs = (hidden.requires_grad_(), weight.requires_grad_(), target)
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = torch.nn.functional.cross_entropy(logits, target)
    gradients = torch.autograd.grad(loss, inputs[:2])
    assert reference.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(reference.grad_hidden, gradients[0])
    torch.testing.assert_close(reference.grad_weight, gradients[1])
    errors = reference.errors(loss.detach(), gradients[0], 1.5 * gradients[1])
    assert errors["hidden_error"] < 1e-12
    assert errors["weight_error"] == pytest.approx(0.5)
    assert errors["weight_row_error"] == pytest.approx(0.5)


def test_float16_gradients_are_measured_with_a_scaled_loss():
    """Without one, many of them underflow."""
    hidden, weight, target = make_data("trained", Shape(2000, 96, 48), torch.float16, "cpu")
    reference = Reference.of(hidden, weight, target)
    inputs = (hidden.requires_grad_(), weight.requires_grad_(), target)

    def loss(hidden, weight, target):
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), target)

    found = measure.forward_and_backward(loss, inputs)
    errors = reference.errors(*found)
    assert errors["hidden_error"] < 2**-8
    assert errors["weight_error"] < 2**-8
    assert (found[1].float() / 2**15 - reference.grad_hidden).norm() <= 2**-8 * reference.grad_hidden.norm()


# data ---------------------------------------------------------------------------------------------

# count above 2^-12, and entropy in bits
CLAIMED = {"trained": (49, 2.4), "soft": (109, 3.9), "uneven": (53, 3.2), "uneven-soft": (116, 5.2)}


@pytest.mark.parametrize("data", CLAIMED)
def test_the_data_has_the_statistics_it_claims(data):
    hidden, weight, target = make_data(data, Shape(256, 32064, 3072), torch.float32, "cpu")
    figures = describe.statistics(hidden, weight, target)
    count, bits = CLAIMED[data]
    entropy = bits * math.log(2)
    assert figures["count"]["mean"] == pytest.approx(count, rel=0.1)
    assert figures["entropy"]["mean"] == pytest.approx(entropy, rel=0.1)
    if data.startswith("uneven"):
        # The real head: 0.17 and 5.9 at a mean of 2.9, and 0.33, 0.59 and 0.83 of the mass in the first ids.
        assert figures["entropy"]["quantiles"][0] < 0.3 * entropy  # rows differ: some are certain
        assert figures["entropy"]["quantiles"][2] > 1.5 * entropy
    # Targets are drawn from the softmax: their mean loss is the mean entropy, to within four standard errors.
    assert figures["loss"] == pytest.approx(figures["entropy"]["mean"], abs=4 * 2.5 / 256**0.5)
    if data == "uneven":
        first_ids = [figures["mass"][first] for first in (64, 512, 4096)]
        assert first_ids == pytest.approx([0.33, 0.59, 0.83], abs=0.1)


def test_untrained_data_is_close_to_uniform():
    hidden, weight, target = make_data("untrained", Shape(64, 4160, 256), torch.float32, "cpu")
    figures = describe.statistics(hidden, weight, target)
    assert figures["entropy"]["mean"] > 0.99 * math.log(4160)


def test_statistics_are_those_of_the_softmax():
    hidden, weight = torch.eye(3, 4), 8 * torch.eye(512, 4)  # row n has one logit of 8, the others are 0
    figures = describe.statistics(hidden, weight, torch.tensor([0, 1, 5]))
    p = torch.softmax(hidden.double() @ weight.T.double(), 1)
    assert figures["count"]["mean"] == 1 + 511 * (p[0, 1].item() > 2**-12)
    assert figures["entropy"]["mean"] == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-5)
    assert figures["log_p"][1][1] == pytest.approx(p[0, 0].log().item(), rel=1e-5)
    lighter = p[0, 256:].sum().item()  # the second tile of 256: all three peaks are in the first
    assert figures["active"] == {b: 1.0 if lighter > b else 0.5 for b in describe.BUDGETS}
    assert figures["rank"][0] == 0


@pytest.mark.parametrize("data", ["untrained", "trained", "uneven"])
def test_data_is_the_same_for_the_same_seed(data):
    first, second, other = (make_data(data, Shape(32, 256, 96), torch.bfloat16, "cpu", seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert all(t.isfinite().all() for t in first)


def test_masks_are_of_the_share_asked_for():
    masked = mask_targets(torch.zeros(4096, dtype=torch.long), 0.6)
    assert (masked == -100).float().mean().item() == pytest.approx(0.6, abs=0.01)


def test_shapes_are_names_or_numbers():
    assert parse_shapes("gpt2,phi3.5") == [SHAPES["gpt2"], SHAPES["phi3.5"]]
    assert parse_shapes("3,4,5") == [Shape(3, 4, 5)]
    with pytest.raises(ValueError, match=r"gemma2-2b.*not gpt3"):
        parse_shapes("gpt2,gpt3")


def test_the_methods_of_this_package_use_its_default():
    """What the default is, the package decides: no method but those named after a value sets it."""
    assert methods.METHODS["cce"].approximate_mass is None
    assert cce_inductor.Options().approximate_mass == cce_inductor.Options.approximate_mass
