"""``fairseq-sam epsilon``: batches and updates as in training, and flags whose rise was measured."""

import re

import pytest
import torch
from fairseq.modules import FairseqDropout

from fairseq_sam.__main__ import main
from fairseq_sam.analysis.epsilon import Rise, Suggestion
from fairseq_sam.commands import epsilon
from fairseq_sam.core.method import Method
from tests.adapter import runs
from tests.adapter.test_analyses import column, flat, is_plot, losses, model_and_valid, rows_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "scope", "per_update"), [("ga_sam", "microbatch", 1), ("freelb", "microbatch", 1), ("sam", "update", 2)]
)
def test_epsilon(checkpoints, tmp_path, capsys, method, scope, per_update):
    """Perturbations of micro-batches, or of updates of two; the advice is measured, and fairseq takes it."""
    from fairseq_sam.adapter.trained import Trained

    words = ["--method", method, "--norm", "linf", "--fraction", "0.2", "--num-batches", "2", "--max-tokens", "200"]
    words += ["--scope", scope, *(["--update-freq", "2"] if scope == "update" else []), "--out", str(tmp_path)]
    assert main(["epsilon", checkpoints[1], *words]) == 0
    end = r"(?: --update-freq 2)? +\(.* by (\S+) of"
    advice = rf"ga_sam: --optimizer {method} --sam-epsilon (\S+) --sam-norm linf --sam-scope {scope}{end}"
    shown = re.search(advice, capsys.readouterr().out)
    rows = rows_of(tmp_path / "epsilon.tsv")
    assert column(rows, "epsilon") == sorted(column(rows, "epsilon"))
    assert {(row["norm"], row["scope"]) for row in rows} == {("linf", scope)}
    assert ("--update-freq 2" in shown[0]) == (scope == "update")
    torch.manual_seed(1)
    trained = Trained(checkpoints[1], cpu=True)
    batches = trained.batches("train", max_tokens=200, number=2 * per_update)
    assert len(batches) == 2 * per_update
    method_then = Method.from_preset(method, norm="linf", scope=scope)
    clean, moved = trained.probe(batches, method_then, micro_batches=per_update)(float(shown[1]))
    assert (moved - clean) / clean == pytest.approx(float(shown[2]), rel=1e-2) == pytest.approx(0.2, rel=0.06)
    assert is_plot(tmp_path / "epsilon.png")
    with runs.quiet():
        flags = shown[0].split("   ")[0].split()[1:]
        runs.configuration(["data", *runs.common_flags(), *runs.TRANSLATION, *flags])


def test_batches_of_the_epsilon_are_those_of_training(checkpoints, monkeypatch, tmp_path):
    """Sizes of micro-batches, and how many of them make an update, unless the command line says otherwise."""
    from fairseq_sam.adapter.trained import Trained

    seen = []
    plain = Trained.batches

    def batches(self, subset, **options):
        seen.append((subset, options["max_tokens"], options["batch_size"], options["number"]))
        return plain(self, subset, **options)

    def only_one(probe, **options):
        return Suggestion(Rise(0.1, *probe(0.1)), 0.1, (Rise(0.1, *probe(0.1)),))

    monkeypatch.setattr(Trained, "batches", batches)
    monkeypatch.setattr(epsilon, "suggest_epsilon", only_one)
    out = ["--out", str(tmp_path)]
    for words in ([], ["--scope", "update"], ["--scope", "update", "--update-freq", "3"], ["--max-tokens", "300"]):
        assert main(["epsilon", checkpoints[0], *words, *out, "--overwrite"]) == 0
    cfg = torch.load(checkpoints[0], weights_only=False)["cfg"]
    dataset, freq = cfg["dataset"], cfg["optimization"]["update_freq"][-1]
    sizes = (dataset["max_tokens"], dataset["batch_size"])
    assert any(sizes) and seen == [
        ("train", *sizes, 8), ("train", *sizes, 8 * freq), ("train", *sizes, 24), ("train", 300, sizes[1], 8),
    ]  # fmt: skip


def test_an_update_shares_its_perturbation(checkpoints):
    """Along the mean gradient of both batches, each weighted by its tokens, in place of its own."""
    from fairseq_sam.adapter.trained import Trained

    _, batches, pad = model_and_valid(checkpoints[0])
    trained = Trained(checkpoints[0], cpu=True)
    trained.cfg.criterion.label_smoothing = 0.0  # the loss of training is the formula's then
    for module in trained.model.modules():  # a pass of training puts the model into its mode
        if isinstance(module, FairseqDropout):
            module.p = 0.0
    parameters = [p for p in trained.model.parameters() if p.requires_grad]

    def loss_of(parts):
        pairs = losses(trained.model, parts, pad)
        return sum(loss for loss, _ in pairs) / sum(number for _, number in pairs)

    clean = loss_of(batches[:2])
    gradients = torch.autograd.grad(clean, parameters)
    norm = flat(gradients).norm()
    clean_found, moved_found = trained.probe(batches[:2], Method.from_preset("sam", scope="update"), 2)(0.3)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(gradient, alpha=float(0.3 / norm))
        moved = float(loss_of(batches[:2]))
    assert (clean_found, moved_found) == pytest.approx((float(clean), moved), rel=1e-5)


def test_epsilon_of_a_model_before_training(checkpoints, trained, translation_data, tmp_path):
    """With the seed of the runs, both are the model that they began with."""
    words = ["--fresh", "--seed", "3", "--num-batches", "1", "--max-tokens", "200", "--out", str(tmp_path)]
    assert main(["epsilon", *checkpoints, *words]) == 0
    rows = rows_of(tmp_path / "epsilon.tsv")
    curves = [[row["perturbed loss"] for row in rows if row["model"] == model] for model in ("adam", "ga_sam")]
    assert curves[0] == curves[1] and len(curves[0]) > 5
    assert main(["epsilon", checkpoints[0], *words[1:], "--overwrite"]) == 0
    assert rows_of(tmp_path / "epsilon.tsv")[0]["loss"] != rows[0]["loss"]
    flags = [*runs.TRANSLATION, "--finetune-from-model", checkpoints[0], "--optimizer", "adam", "--max-update", "1"]
    runs.train(translation_data, tmp_path / "tuned", *flags)
    assert main(["epsilon", str(tmp_path / "tuned" / "checkpoint_last.pt"), *words, "--overwrite"]) == 2
