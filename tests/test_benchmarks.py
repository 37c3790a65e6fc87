"""The benchmarks: what they time and count, on numbers that are known; one run of each on a tiny model."""

import shutil
import time
from types import SimpleNamespace

import pytest
import torch

from fairseq_sam.analysis.tables import read_rows, write_rows

pytest.importorskip("fairseq")
from benchmarks import growth, measure, memory, models, peers, report, slopes, steps, workers
from benchmarks.models import Model

TINY = Model(models._transformer(16, 32, 2, 1, 60), 6)
SETTINGS = {"gsam": "--sam-epsilon-min 0.01 --sam-lr-max 1e-3", "fisher_sam": "--sam-fisher-samples 4"}
# Copies of the weights at the worst moment. With several steps a mean has another one: the perturbation so far.
COPIES = {
    "sam": 1, "asam": 1, "layer_sam": 1, "awp": 1, "efficient_sam": 1, "delta_sam": 1, "esam": 1, "random_sam": 1,
    "model_perturbation": 1, "fisher_sam": 1.25, "ga_sam": 2, "gsam": 2, "multistep_defense": 3, "look_sam": 3,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", TINY)
    return "tiny"


def test_seconds_inside_are_counted_once():
    """A call inside another counts with it; functions are as before afterwards."""
    passed = []
    things = SimpleNamespace(outer=lambda: (things.inner(), passed.append(2)), inner=lambda: passed.append(3))
    outer, inner = things.outer, things.inner
    with measure.seconds_inside(lambda: sum(passed), (things, "outer"), (things, "inner")) as inside:
        things.outer()
        things.inner()
        passed.append(5)
    assert inside[0] == 8
    assert (things.outer, things.inner) == (outer, inner)


def test_methods_of_a_class_are_its_own_again():
    class Base:
        def run(self):
            return 1

    class Child(Base):
        pass

    with pytest.raises(KeyError), measure.seconds_inside(time.perf_counter, (Child, "run")):
        assert Child().run() == 1 and "run" in vars(Child)
        raise KeyError
    assert "run" not in vars(Child) and Child().run() == 1


def test_the_peak_is_that_of_the_worst_moment():
    def build():
        kept = torch.zeros(1000)

        def step(number):
            other = torch.zeros(2000)
            del other
            kept.add_(1.0)

        return step

    assert measure.peak_bytes(build, 3, cuda=False) == pytest.approx(3000 * 4, rel=0.02)


def test_rounds_end_when_they_have_taken_too_long(monkeypatch):
    assert [is_warm_up for _, is_warm_up in measure.rounds_of(4, 100.0)] == [True, True, False, False, False, False]
    assert len(list(measure.rounds_of(10, 0.0))) == measure.WARM_UPS + measure.FEWEST
    assert len(list(measure.rounds_of(3, 100.0, 0, 5))) == 5 == len(list(measure.rounds_of(20, 0.0, 0, 5)))
    assert len(list(measure.rounds_of(6, 100.0, 1, 5))) == 11, "whole intervals"
    assert measure.ratio([(2.0, 1.0), (9.0, 3.0), (4.0, 1.0)]) == 3.0
    assert measure.ratio([(2.0, 1.0), (9.0, 3.0), (4.0, 1.0)], is_even=False) == 3.0


@pytest.mark.parametrize("method", COPIES)
def test_memory_is_that_of_the_card(method):
    """The most that is allocated, activations included, is above the base optimizer's by the copies of the weights."""
    name, tokens, facts = "Transformer, 1M", 256, {}
    flags = f"--optimizer {method} {SETTINGS.get(method, '')} --base-optimizer adam"
    base = memory.peak(name, tokens, "--optimizer adam", "", False, {})
    own = memory.peak(name, tokens, flags, "", False, facts)
    assert (own - base) / facts["bytes"] == pytest.approx(COPIES[method], abs=0.06)
    if method != "multistep_defense":
        assert facts["copies"] == COPIES[method]


def test_memory_while_the_fisher_mask_is_made():
    """Weights, the sums of before and after the update, the mask of before and after: what an undone update needs."""
    name, tokens, facts = "Transformer, 1M", 256, {}  # 6 updates of 8 instances do not end the collection of 128
    base = memory.peak(name, tokens, "--optimizer adam", "", False, {})
    own = memory.peak(name, tokens, "--optimizer fisher_sam --base-optimizer adam", "", False, facts)
    assert (own - base) / facts["bytes"] == pytest.approx(3.5, abs=0.06)


def test_a_table_of_steps(tiny, tmp_path):
    """The floor is counted in the passes of the method; a row that is there is not measured again."""
    out = tmp_path / "steps.tsv"
    arguments = ["--models", tiny, "--tokens", "24", "--rounds", "2", "--cpu", "--out", str(out)]
    steps.main([*arguments, "--methods", "sam", "delta_sam", "fisher_sam", "before the start"])
    rows = {row["method"]: row for row in read_rows(out)}
    passes = {name: (float(row["passes"]), float(row["forwards"])) for name, row in rows.items()}
    assert passes == {"sam": (2, 0), "delta_sam": (2, 2), "fisher_sam": (2, 0), "before the start": (1, 0)}
    assert all(float(row["over base"]) > 0 and float(row["over floor"]) > 0 for row in rows.values())
    assert float(rows["fisher_sam"]["refresh"]) > 0 and not rows["sam"]["refresh"]
    before = out.read_text()
    steps.main([*arguments, "--methods", "sam"])
    assert out.read_text() == before


class Counted:
    """A clock that work moves on by known seconds: 1 a pass, 0.25 a forward pass, 1.5 to 5 a step."""

    def __init__(self, monkeypatch, slow):
        self.seconds, self.order, self.slow = 0.0, [], slow
        monkeypatch.setattr(steps, "forward_backward", lambda *args: self.pass_by("pass", 1.0))
        monkeypatch.setattr(steps, "forward_only", lambda *args: self.pass_by("forward", 0.25))
        monkeypatch.setattr(steps, "step_of", self.step_of)

    def __call__(self, work):
        start = self.seconds
        work()
        return self.seconds - start

    def pass_by(self, name, seconds):
        self.order.append(name)
        self.seconds += seconds

    def step_of(self, made, sample, clock):
        optimizer = steps.unwrap(made.optimizer)
        name = "base" if optimizer is None else optimizer.method.name
        self.order.append(name)
        more = 2.0 if self.order.count(name) <= self.slow.get(name, 0) else 0.0
        return {"base": (1.5, 0.1), "sam": (3.0, 0.2), "delta_sam": (3.3, 0.43), "fisher_sam": (3.0 + more, 0.2)}[name]


def test_the_columns_of_a_row_of_steps(tiny, monkeypatch):
    options = SimpleNamespace(rounds=3, limit=100.0, flags="")
    collecting = -(-128 // models.sentences(TINY, 24))
    clock, row = Counted(monkeypatch, {"fisher_sam": collecting}), {}
    for method in ("sam", "delta_sam", "fisher_sam"):
        clock.order.clear()
        row[method] = steps.measured(tiny, 24, steps.METHODS[method], options, clock, False)
        works = 5 if method == "delta_sam" else 3
        firsts = clock.order[::works]
        assert len(set(firsts[:works])) == works, "each comes first in its turn"
    sam, delta, fisher = row["sam"], row["delta_sam"], row["fisher_sam"]
    assert sam["over floor"] == pytest.approx(3.0 / 2.5) and sam["over base"] == pytest.approx(2.0)
    assert sam["beside"] == pytest.approx(0.1 / 3.0) and sam["over SAM"] == sam["refresh"] == ""
    assert delta["over floor"] == pytest.approx(3.3 / 3.0) and delta["error"] == pytest.approx(0.0, abs=1e-9)
    assert delta["over SAM"] == pytest.approx(1.1) and delta["beside"] == pytest.approx(0.1)
    assert fisher["over floor"] == pytest.approx(1.2)
    assert fisher["refresh"] == pytest.approx(collecting * 2.5 / (3.0 * 100))
    assert measure.error_of([1.0, 1.2, 1.1]) == pytest.approx(1.2533 * 0.1 / 3**0.5, rel=1e-4)
    assert measure.error_of([1.0]) == ""


def test_a_table_of_peers(tiny, tmp_path):
    pytest.importorskip("pytorch_optimizer")
    peers.main(["--models", tiny, "--tokens", "24", "--rounds", "1", "--cpu", "--out", str(tmp_path / "peers.tsv")])
    rows = read_rows(tmp_path / "peers.tsv")
    assert [row["peer"] for row in rows] == list(peers.PAIRS)
    assert all(float(row["peer over ours"]) > 0 for row in rows)


@pytest.mark.slow
def test_a_table_of_growth(monkeypatch, tmp_path):
    for name, value in (("TENSORS", [4, 8]), ("NUMBERS", 64), ("TOKENS", [12, 24]), ("STEPS", [1, 2])):
        monkeypatch.setattr(growth, name, value)
    monkeypatch.setitem(models.MODELS, "Transformer, 5M", TINY)
    monkeypatch.setitem(models.MODELS, "Transformer, 1M", TINY)
    out = tmp_path / "growth.tsv"
    words = ["--cpu", "--rounds", "1", "--models", "Transformer, 1M", "Transformer, 5M", "--out", str(out)]
    growth.main([*words, "--axes", "parameters", "tokens", "K", "tensors"])
    rows = read_rows(out)
    assert [row["axis"] for row in rows] == ["parameters"] * 2 + ["tokens"] * 2 + ["K"] * 2 + ["tensors"] * 2
    assert all(float(row["step (s)"]) > 0 for row in rows)


@pytest.mark.slow
def test_workers_are_timed_together(monkeypatch):
    plain, sam = workers.seconds_of_workers(2, 1, False, "--optimizer adam", "--optimizer sam")
    assert 0 < plain < sam


def test_slopes():
    """Of logarithms; of the numbers themselves over K."""
    rows = [
        *({"axis": "tokens", "value": str(n), "step (s)": f"{0.5 * n**1.5}"} for n in (10, 100, 1000)),
        *({"axis": "K", "value": str(k), "step over pass": f"{1.0 + k}"} for k in (1, 2, 3)),
    ]
    assert slopes.slope(rows, "tokens", "step (s)") == pytest.approx(1.5)
    assert slopes.slope(rows, "K", "step over pass") == pytest.approx(1.0)
    assert slopes.slope(rows, "tokens", "own (s)") is None


def test_what_misses_its_target_is_named(tmp_path):
    """Marked in the table and listed below it, if the target is one of the row."""
    columns = ("tokens", "method", "over base", "over floor", "over SAM", "beside")
    values = [
        ("4000", "sam", "2", "1.0104", "", "0.01"),
        ("4000", "asam", "2", "1.02", "", "0.03"),
        ("512", "sam", "2", "1.09", "", "0.03"),
        ("4000", "delta_sam", "2.5", "1.04", "1.25", "0.01"),
        ("512", "before the start", "1.004", "1", "", "0"),
    ]
    common = {"model": "M", "device": "CPU"}
    write_rows(tmp_path / "steps.tsv", [{**common, **dict(zip(columns, row, strict=True))} for row in values])
    write_rows(tmp_path / "peers.tsv", [{**common, "tokens": "512", "peer": "P", "peer over ours": "0.98"}])
    readme = tmp_path / "README.md"
    readme.write_text((report.FOLDER / "README.md").read_text())
    report.main(["--results", str(tmp_path), "--readme", str(readme)])
    text = readme.read_text()
    lines = [line for line in text.splitlines() if line.startswith("- M, ")]
    assert lines == [
        "- M, 4000, asam: over floor 1.020, target at most 1.010",
        "- M, 4000, asam: beside 0.030, target at most 0.020",
        "- M, 4000, delta_sam: over floor 1.040, target at most 1.010",
        "- M, 4000, delta_sam: over SAM 1.250, target at most 1.200",
        "- M, 512, P: peer over ours 0.980, target at least 1.000",
    ]
    assert text.count("✗") == 6 and "1.020 ✗" in text and "1.010 ✗" not in text
    report.main(["--results", str(tmp_path), "--readme", str(readme)])
    assert readme.read_text() == text
    readme.write_text("nothing")
    with pytest.raises(ValueError, match=r"steps: made by benchmarks/report\.py"):
        report.main(["--results", str(tmp_path), "--readme", str(readme)])


def test_the_tables_are_those_of_the_results(tmp_path):
    """The committed README is what the command makes of the committed results."""
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text((report.FOLDER / "README.md").read_text())
    shutil.copytree(report.FOLDER / "results", results)
    report.main(["--readme", str(readme), "--results", str(results)])
    assert readme.read_text() == (report.FOLDER / "README.md").read_text()
