"""What single methods promise inside fairseq: FreeLB on every model, GSAM's radius, LookSAM's passes, Fisher's mask."""

import math

import pytest
import torch
from fairseq.logging import metrics

from fairseq_sam import PRESETS
from fairseq_sam.adapter.optimizers import unwrap
from fairseq_sam.adapter.slicing import UnsliceableBatchError
from fairseq_sam.core.embedding_perturbation import EmbeddingPerturbation
from tests.adapter import runs
from tests.adapter.test_slicing import CASES
from tests.adapter.test_tasks import data_of  # noqa: F401

READERS = {
    "transformer": ("translation", runs.TRANSLATION),
    **{
        name: CASES[name]
        for name in (
            "lstm_translation", "lstm_lm", "transformer_lm", "masked_lm", "denoising", "sentence_prediction",
            "bart_sentence_prediction",
        )
    },
}  # fmt: skip
TWO_SIDES = ("transformer", "lstm_translation", "denoising", "bart_sentence_prediction")


class Seen:
    """What FreeLB added to the embeddings, for each pass and each call of a table."""

    def __init__(self, monkeypatch, model):
        self.passes, self.random = [], []
        plain = EmbeddingPerturbation._perturb

        def watch(perturbation, call, is_token, output):
            changed = plain(perturbation, call, is_token, output)
            self.passes[-1][call] = (is_token, (changed - output).detach())
            return changed

        def start(module, arguments):
            self.passes.append({})
            self.random.append(torch.get_rng_state())

        monkeypatch.setattr(EmbeddingPerturbation, "_perturb", watch)
        model.register_forward_pre_hook(start)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", READERS)
def test_freelb_moves_words_of_every_model_and_never_padding(data_of, monkeypatch, name, norm):  # noqa: F811
    kind, recipe = READERS[name]
    flags = ["--optimizer", "freelb", "--sam-steps", "2", "--sam-epsilon", "0.3", "--sam-norm", norm]
    trainer, batches = runs.build_trainer(data_of[kind], *recipe, *flags)
    batch = max(batches, key=lambda sample: sample["net_input"]["src_tokens"].eq(1).sum())
    has_padding = bool(batch["net_input"]["src_tokens"].eq(1).any())
    seen = Seen(monkeypatch, trainer.model)
    trainer.train_step([batch])
    assert len(seen.passes) == 3, "K + 1 passes"
    assert all(torch.equal(state, seen.random[0]) for state in seen.random), "dropout masks are held"
    for calls in seen.passes:
        assert sorted(calls) == ([0, 1] if name in TWO_SIDES else [0])
        for is_token, delta in calls.values():
            number = len(batch["net_input"]["src_tokens"])
            assert len(delta) == number, "the batch is the first dimension"
            moved = delta.masked_select(is_token)
            assert not delta.masked_select(~is_token).any() and float((moved != 0).float().mean()) > 0.9
            order = math.inf if norm == "linf" else 2
            assert float(delta.flatten(1).norm(order, dim=1).max()) <= 0.3 * (1 + 1e-5)
    if has_padding:
        assert any(not is_token.all() for is_token, _ in seen.passes[0].values())
    assert not torch.equal(seen.passes[0][0][1], seen.passes[2][0][1]), "the attack moves on"


def log_of(trainer, samples):
    with metrics.aggregate(new_root=True) as logged:
        trainer.train_step(samples)
    return logged.get_smoothed_values()


@pytest.mark.parametrize(
    ("options", "radius"),
    [
        ([], lambda lr: 0.02 + 0.08 * lr / 0.004),
        (["--sam-lr-max", "0.002"], lambda lr: 0.02 + 0.08 * min(lr / 0.002, 1)),
        (["--sam-lr-min", "0.002"], lambda lr: 0.02 + 0.08 * max((lr - 0.002) / 0.002, 0)),
        (["--sam-epsilon-min", "0.1"], lambda lr: 0.1),
    ],
)
def test_the_radius_of_gsam_follows_the_schedule(translation_data, options, radius):
    """Up with the warmup, down with the decay; ``sam_eps`` is the radius that the weights really moved by."""
    trainer, batches = runs.build_trainer(
        translation_data, *runs.TRANSLATION, "--optimizer", "gsam", "--sam-epsilon", "0.1", "--lr", "0.004",
        "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "3", "--warmup-init-lr", "0.0005", *options,
    )  # fmt: skip
    radii, expected = [], []
    for number in range(7):
        expected.append(radius(trainer.get_lr()))
        radii.append(log_of(trainer, batches[number : number + 1])["sam_eps"])
    assert radii == pytest.approx(expected, rel=1e-4)
    assert expected[3] == pytest.approx(0.1) and (len(set(radii)) >= 3 or "--sam-epsilon-min" in options)
    assert len({f"{radius:.4g}" for radius in radii}) == len({f"{radius:.4g}" for radius in expected})


@pytest.mark.parametrize("scope", ["microbatch", "update"])
def test_a_plain_step_of_looksam_costs_one_pass(translation_data, scope):
    trainer, batches = runs.build_trainer(
        translation_data, *runs.TRANSLATION, "--optimizer", "look_sam", "--sam-interval", "3", "--sam-scope", scope
    )
    count = []
    trainer.model.register_forward_pre_hook(lambda module, arguments: count.append(1))
    passes, logged = [], []
    for number in range(7):
        count.clear()
        logged.append(log_of(trainer, batches[number : number + 2])["sam_passes"])
        passes.append(len(count) / 2)
    assert passes == logged == [2, 1, 1, 2, 1, 1, 2]


def test_the_fisher_mask_keeps_its_exact_share_and_its_interval(translation_data, monkeypatch):
    """Masked weights do not move; the mask of update 0 stays until update 3, and costs its instances only then."""
    trainer, batches = runs.build_trainer(
        translation_data, *runs.TRANSLATION, "--optimizer", "fisher_sam", "--sam-fisher-samples", "7",
        "--sam-mask-interval", "3", "--sam-sparsity", "0.77",
    )  # fmt: skip
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    passes, moved = [], []

    def watch(module, arguments):
        passes.append(len(arguments) or 1)
        moved.append(sum(int((p.detach() != weights[n]).sum()) for n, p in module.named_parameters()))

    trainer.model.register_forward_pre_hook(watch)
    masks, counts = [], []
    for number in range(4):
        weights.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        passes.clear(), moved.clear()
        trainer.train_step(batches[number : number + 1])
        masks.append(unwrap(trainer.optimizer).memory.mask)
        counts.append(len(passes))
        total = sum(mask.numel() for mask in masks[-1].values())
        kept = sum(int(mask.sum()) for mask in masks[-1].values())
        assert kept == round(0.23 * total)
        assert 0 < moved[-1] <= kept and not any(moved[:-1])
    assert counts == [7 + 2, 2, 2, 7 + 2]
    assert runs.same_state(masks[0], masks[2]) and not runs.same_state(masks[0], masks[3])


@pytest.mark.parametrize("scope", ["microbatch", "update"])
def test_logged_counts_are_those_of_the_whole_batch(translation_data, scope):
    """Words per second and the batch size are those of the plain run, also where the first pass sees a quarter."""
    counts = []
    for flags in (["--optimizer", "adam"], ["--optimizer", "efficient_sam", "--sam-scope", scope]):
        trainer, batches = runs.build_trainer(translation_data, *runs.TRANSLATION, *flags)
        log = log_of(trainer, batches[:2])
        counts.append((log["wpb"], log["bsz"]))
        assert "sam_sharp" not in log and 0 < log["loss"] < 20
    assert counts[0] == counts[1]


@pytest.mark.parametrize("scope", ["microbatch", "update"])
def test_the_logged_loss_is_clean_where_the_ascent_sees_a_part(translation_data, scope):
    """Whatever the radius: micro-batches that the first pass did not see are estimated from those that it saw."""
    losses = []
    for epsilon in ("1e-9", "20"):
        trainer, batches = runs.build_trainer(
            translation_data, *runs.TRANSLATION, "--optimizer", "efficient_sam", "--sam-scope", scope, "--sam-epsilon",
            epsilon, "--dropout", "0",
        )  # fmt: skip
        losses.append(log_of(trainer, batches[:2])["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("preset", ["multistep_defense", "gsam", "esam"])
def test_a_dummy_batch_changes_nothing(translation_data, monkeypatch, preset):
    """A worker without data for its last micro-batch: it enters neither the ascent nor the sizes of gradients."""
    gradients = []
    for has_dummy in (False, True):
        trainer, batches = runs.build_trainer(
            translation_data, *runs.TRANSLATION, "--optimizer", preset, "--sam-ascent-fraction", "0.5",
            "--sam-scope", "update", "--dropout", "0",
        )  # fmt: skip
        trainer.reset_dummy_batch(batches[3])

        def keep(optimizer, factor):
            gradients.append([p.grad.clone() for p in trainer.model.parameters()])  # noqa: B023

        monkeypatch.setattr(type(trainer.optimizer), "multiply_grads", keep)
        trainer.train_step([batches[2], {}] if has_dummy else [batches[2]])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


MULTILINGUAL = [
    "--task", "multilingual_translation", "--lang-pairs", "src-tgt,tgt-src", "--arch", "multilingual_transformer",
    *runs.TINY, "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "scope"),
    [
        pytest.param(p, s, marks=[] if PRESETS[p].needs_instances else pytest.mark.mode("own train_step"))
        for p, s in runs.SCOPED
    ],
)
def test_methods_that_need_no_slices_take_any_batch(translation_data, preset, scope):
    """A multilingual task's sample is a dictionary of samples, and its train_step runs backward for each language."""
    trainer, batches = runs.build_trainer(
        translation_data, *MULTILINGUAL, "--optimizer", preset, "--sam-scope", scope, "--sam-epsilon", "0.05"
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    if PRESETS[preset].needs_instances:
        with pytest.raises(UnsliceableBatchError, match=r"src-tgt, tgt-src.*--optimizer sam or ga_sam"):
            trainer.train_step(batches[:2])
        assert runs.same_bits(before, dict(trainer.model.named_parameters()))
        return
    trainer.train_step(batches[:2])
    after = dict(trainer.model.named_parameters())
    assert not runs.same_bits(before, after) and all(torch.isfinite(p).all() for p in after.values())


def test_log_lines_of_plain_updates_have_numbers(translation_data):
    trainer, batches = runs.build_trainer(
        translation_data, *runs.TRANSLATION, "--optimizer", "sam", "--sam-interval", "2", "--sam-start-update", "1"
    )
    metrics.reset()  # what an earlier run in this process has logged
    with metrics.aggregate("train_inner"):
        lines = []
        for number in range(4):
            trainer.train_step(batches[number : number + 1])
            lines.append(metrics.get_smoothed_values("train_inner"))
            metrics.reset_meters("train_inner")
    assert "sam_eps" not in lines[0] and lines[1]["sam_eps"] == pytest.approx(0.05, rel=1e-3)
    assert lines[2]["sam_eps"] == 0 and lines[2]["sam_sharp"] == 0 and lines[3]["sam_eps"] > 0
    assert None not in lines[2].values()


def test_batches_in_buckets_of_length(translation_data):
    _, batches = runs.build_trainer(
        translation_data, *runs.TRANSLATION, "--optimizer", "sam", "--num-batch-buckets", "2"
    )
    assert len({batch["net_input"]["src_tokens"].shape[1] for batch in batches}) <= 2
