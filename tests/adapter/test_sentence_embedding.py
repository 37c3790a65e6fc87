"""Mirror-BERT's task and loss: by hand in float64, with one view perturbed, and through fairseq-train."""

import math

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.logging import metrics
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch.func import functional_call

from fairseq_sam import PRESETS
from fairseq_sam.adapter.errors import ConfigurationError
from fairseq_sam.adapter.optimizers import unwrap
from fairseq_sam.adapter.seam import SharpnessAwareTrainStep
from fairseq_sam.core.perturbation import WeightPerturbation
from fairseq_sam.criterions.mirror import InfoNCE, pooled
from fairseq_sam.tasks.sentence_embedding import SentenceViews
from tests.adapter import runs
from tests.adapter.test_tasks import ENCODER
from tests.adapter.test_workers import UPDATES, run_two

RECIPE = [
    "--task", "sentence_embedding", "--criterion", "mirror", "--arch", "bert", *ENCODER, "--attention-dropout", "0.1",
    "--batch-size", "8",
]  # fmt: skip
NO_DROPOUT = ["--dropout", "0", "--attention-dropout", "0"]
ONE_VIEW = "--perturb-one-view"
TEMPERATURE, EPSILON, SEED = 0.04, 0.05, 5
PAD = 1


@pytest.fixture
def trainer_for(language_model_data):
    def build(*flags, optimizer=("--optimizer", "adam")):
        return runs.build_trainer(language_model_data, *RECIPE, *optimizer, *flags)

    return build


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def updates(trainer, batches, number=2):
    for update in range(number):
        trainer.train_step(batches[2 * update : 2 * update + 2])
    return weights_of(trainer)


def loss_of(trainer, sample, training=True):
    trainer.model.train(training)
    torch.manual_seed(11)
    return trainer.criterion(trainer.model, sample)


# -- by hand -----------------------------------------------------------------------------------------------------------


def pooled_by_hand(features, tokens, pooling):
    rows = []
    for sentence, words in zip(features, tokens, strict=True):
        number = int((words != PAD).sum())
        rows.append(sentence[0] if pooling == "cls" else sentence[:number].mean(0))
    return torch.stack(rows)


def contrast_by_hand(first, second, temperature=TEMPERATURE):
    """One sentence after the other, as the equation is written."""
    views = [*first, *second]
    number, losses = len(first), []

    def similarity(a, b):
        return torch.exp(torch.dot(a, b) / (a.norm() * b.norm()) / temperature)

    for i, view in enumerate(views):
        twin = (i + number) % len(views)
        others = sum(similarity(view, other) for j, other in enumerate(views) if j != i)
        losses.append(-torch.log(similarity(view, views[twin]) / others))
    return (torch.stack(losses[:number]) + torch.stack(losses[number:])) / 2


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("span", ["0", "2"])
def test_loss_equals_the_equation(trainer_for, pooling, span):
    trainer, batches = trainer_for("--pooling", pooling, "--mask-span", span, "--temperature", "0.3")
    model, sample = trainer.model.double(), batches[0]
    assert ("second_input" in sample) == (span != "0")
    loss, sample_size, logged = loss_of(trainer, sample)
    torch.manual_seed(11)
    views = []
    for inputs in (sample["net_input"], sample.get("second_input", sample["net_input"])):
        tokens = inputs["src_tokens"]
        views.append(pooled_by_hand(model(tokens, features_only=True)[0], tokens, pooling))
    expected = contrast_by_hand(*views, temperature=0.3)
    assert loss.dtype == torch.float64 and sample_size == len(expected) == 8
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-12, atol=0)
    assert logged == {"loss": loss, "ntokens": sample["ntokens"], "nsentences": 8, "sample_size": 8}
    losses, *_ = trainer.criterion(model.eval(), sample, reduce=False)
    assert losses.shape == (8,)


def test_views_differ_by_dropout_alone(trainer_for):
    """Without it they are one, and the loss is that of evaluation."""
    trainer, batches = trainer_for("--mask-span", "0")
    dropped, evaluated = loss_of(trainer, batches[0])[0], loss_of(trainer, batches[0], training=False)[0]
    assert torch.equal(dropped, loss_of(trainer, batches[0])[0]) and not torch.isclose(dropped, evaluated)
    still, _ = trainer_for("--mask-span", "0", *NO_DROPOUT)
    assert torch.equal(loss_of(still, batches[0])[0], evaluated)


def test_evaluation_has_no_masks_noise_and_second_call(trainer_for):
    trainer, batches = trainer_for("--input-noise", "0.3")
    calls = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    plain, _ = trainer_for("--mask-span", "0")
    sample = {**batches[0], "second_input": None}
    assert torch.equal(loss_of(trainer, sample, training=False)[0], loss_of(plain, sample, training=False)[0])
    assert len(calls) == 1
    valid = trainer.task.load_dataset("valid")
    assert "second_input" not in valid.collater([valid[0], valid[1]])


def test_a_sentence_alone_has_no_loss():
    embedding = torch.randn(1, 5, requires_grad=True)
    losses = InfoNCE(0.04)(embedding, embedding + 1)
    losses.sum().backward()
    assert losses.tolist() == [0.0] and not embedding.grad.any()


@pytest.mark.parametrize("one_view", [[], [ONE_VIEW]])
def test_noise_is_on_the_words_of_the_second_view(trainer_for, one_view):
    trainer, batches = trainer_for("--input-noise", "0.4", *NO_DROPOUT, *one_view)
    model, sample = trainer.model.double(), batches[0]
    assert sample["net_input"]["src_tokens"].eq(PAD).any()
    loss, *_ = loss_of(trainer, sample)
    torch.manual_seed(11)
    tokens = [sample[key]["src_tokens"] for key in ("net_input", "second_input")]
    embedded = model.encoder.sentence_encoder.embed_tokens(tokens[1])
    noise = torch.empty_like(embedded).uniform_(-0.4, 0.4) * tokens[1].ne(PAD).unsqueeze(-1)
    features = [
        model.encoder.extract_features(tokens[0])[0],
        model.encoder.extract_features(tokens[1], token_embeddings=embedded + noise)[0],
    ]
    views = [pooled_by_hand(f, t, "mean") for f, t in zip(features, tokens, strict=True)]
    torch.testing.assert_close(loss, contrast_by_hand(*views).sum(), rtol=1e-12, atol=0)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_embedding_does_not_depend_on_the_batch(trainer_for, pooling):
    trainer, batches = trainer_for()
    model, tokens = trainer.model.double().eval(), batches[0]["net_input"]["src_tokens"]
    together = pooled(model(tokens, features_only=True)[0], tokens, PAD, pooling)
    for row, embedding in zip(tokens, together, strict=True):
        alone = row[row.ne(PAD)].unsqueeze(0)
        expected = pooled(model(alone, features_only=True)[0], alone, PAD, pooling)[0]
        torch.testing.assert_close(embedding, expected, rtol=1e-9, atol=1e-9)


# -- sharpness-aware updates -------------------------------------------------------------------------------------------


class Twin:
    """The gradient of an update with the ascent on the second view, from explicit weights of both views."""

    def __init__(self, trainer, sample):
        self.model, self.sample = trainer.model, sample
        self.weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    def leaves(self, direction=None, factor=0.0):
        moved = {n: w if direction is None else w + factor * direction[n] for n, w in self.weights.items()}
        return {name: weight.detach().clone().requires_grad_() for name, weight in moved.items()}

    def losses(self, first, second):
        torch.manual_seed(SEED)
        self.model.train()
        views = []
        for weights, key in ((first, "net_input"), (second, "second_input")):
            tokens = self.sample[key]["src_tokens"]
            features = functional_call(self.model, weights, (tokens,), {"features_only": True})[0]
            views.append(pooled_by_hand(features, tokens, "mean"))
        return contrast_by_hand(*views)

    def gradient(self, loss, weights):
        found = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), found, strict=True)}

    def descent(self, instance_weights=None):
        second = self.leaves()
        losses = self.losses(self.weights, second)
        weighted = losses.sum() if instance_weights is None else (instance_weights.detach() * losses).sum()
        ascent = self.gradient(weighted, second)
        length = torch.cat([g.flatten() for g in ascent.values()]).norm()
        first, second = self.leaves(), self.leaves(ascent, EPSILON / length)
        loss = self.losses(first, second).sum()
        clean, moved = self.gradient(loss, first), self.gradient(loss, second)
        return {name: clean[name] + moved[name] for name in clean}


SGD = ("--base-optimizer", "sgd", "--lr", "0.5", "--sam-epsilon", str(EPSILON))


def descent(trainer, sample):
    """The gradient that the step leaves, in float64; fairseq's trainer would clip it in float32."""
    optimizer = unwrap(trainer.optimizer)
    step = SharpnessAwareTrainStep(trainer, optimizer, [sample])
    torch.manual_seed(SEED)
    with metrics.aggregate(new_root=True):
        step(sample, trainer.model, trainer.criterion, trainer.optimizer, 0)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal(found, expected):
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-8)
    assert max(float(g.abs().max()) for g in expected.values()) > 0.1


def test_sam_on_one_view_equals_its_twin(trainer_for):
    trainer, batches = trainer_for(ONE_VIEW, optimizer=("--optimizer", "sam", *SGD))
    trainer.model.double()
    expected = Twin(trainer, batches[0]).descent()
    assert_equal(descent(trainer, batches[0]), expected)
    both, _ = trainer_for(optimizer=("--optimizer", "sam", *SGD))
    both.model.double()
    with pytest.raises(AssertionError):
        assert_equal(descent(both, batches[0]), expected)


def test_delta_sam_on_one_view_equals_its_twin(trainer_for, monkeypatch):
    """The random shifts that weigh the instances are of the second view, too."""
    drawn, plain = [], WeightPerturbation.gaussian

    def gaussian(self, random):
        drawn.append(plain(self, random))
        return drawn[-1]

    monkeypatch.setattr(WeightPerturbation, "gaussian", gaussian)
    eta = 1e-3
    optimizer = ("--optimizer", "delta_sam", *SGD, "--sam-delta-eta", str(eta))
    trainer, batches = trainer_for(ONE_VIEW, optimizer=optimizer)
    trainer.model.double()
    twin, found = Twin(trainer, batches[0]), descent(trainer, batches[0])
    assert len(drawn) == 1
    direction = dict(zip(twin.weights, drawn[0], strict=True))
    up, down, clean = (twin.losses(twin.weights, twin.leaves(direction, sign)).detach() for sign in (1.0, -1.0, 0.0))
    weights = (up + down - 2 * clean).abs() / (up - down).abs().clamp(min=eta)
    assert weights.std() > 0
    assert_equal(found, twin.descent(weights))


@pytest.mark.parametrize("one_view", [[], [ONE_VIEW]])
@pytest.mark.parametrize("preset", ["sam", "delta_sam", "ga_sam", "freelb", "random_sam"])
def test_epsilon_zero_is_adam(trainer_for, preset, one_view):
    flags = ("--input-noise", "0.1", "--mask-span", "1", *one_view)
    plain, batches = trainer_for(*flags)
    zero, _ = trainer_for(*flags, optimizer=("--optimizer", preset, "--sam-epsilon", "0"))
    before = weights_of(plain)
    found = updates(zero, batches)
    assert runs.same_bits(updates(plain, batches), found) and not runs.same_bits(before, found)


WHOLE = [preset for preset in PRESETS if not PRESETS[preset].slices]
DESCENDING = ("multistep_defense", "ga_sam", "gsam", "look_sam")


@pytest.mark.parametrize("scope", ["microbatch", "update"])
@pytest.mark.parametrize("one_view", [[], [ONE_VIEW]])
@pytest.mark.parametrize("preset", WHOLE)
def test_methods_on_whole_batches(trainer_for, preset, one_view, scope):
    if preset == "freelb" and scope == "update":
        scope = "microbatch"
    optimizer = ("--optimizer", preset, "--sam-scope", scope)
    if one_view and preset in DESCENDING:
        with pytest.raises(ConfigurationError, match=r"--perturb-one-view: .* --sam-descent last"):
            trainer_for(*one_view, optimizer=optimizer)
        return
    trainer, batches = trainer_for(*one_view, optimizer=optimizer)
    before = weights_of(trainer)
    found = updates(trainer, batches)
    assert all(torch.isfinite(w).all() for w in found.values()) and not runs.same_bits(before, found)


def test_which_methods_are_refused():
    assert set(PRESETS) - set(WHOLE) == {"efficient_sam", "msam", "fisher_sam", "esam", "instance_sam"}


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - set(WHOLE)))
def test_methods_on_parts_of_batches_are_refused(trainer_for, preset):
    with pytest.raises(ConfigurationError, match=r"takes batches apart .* use a method on whole batches"):
        trainer_for(optimizer=("--optimizer", preset))
    trainer_for(optimizer=("--optimizer", preset, "--sam-epsilon", "0"))


def test_an_error_in_the_second_view_leaves_the_weights(trainer_for):
    trainer, batches = trainer_for(ONE_VIEW, optimizer=("--optimizer", "sam", *SGD))
    before, calls = weights_of(trainer), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 4:  # the second view of the last pass
            raise RuntimeError("boom")

    handle = trainer.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.train_step(batches[:1])
    handle.remove()
    assert runs.same_bits(before, weights_of(trainer))
    undisturbed, _ = trainer_for(ONE_VIEW, optimizer=("--optimizer", "sam", *SGD))
    assert runs.same_bits(updates(undisturbed, batches), updates(trainer, batches))


def test_activation_checkpointing_would_compute_the_first_view_anew(trainer_for):
    trainer, batches = trainer_for(ONE_VIEW)
    checkpoint_wrapper(trainer.model.encoder.sentence_encoder.layers[0])
    with pytest.raises(ConfigurationError, match="--checkpoint-activations"):
        trainer.criterion(trainer.model.train(), batches[0])
    trainer.criterion.perturb_one_view = False
    trainer.criterion(trainer.model.train(), batches[0])[0].backward()


@pytest.mark.slow
@pytest.mark.parametrize("one_view", [[], [ONE_VIEW]])
def test_two_workers_equal_one_with_all_their_micro_batches(language_model_data, tmp_path, monkeypatch, one_view):
    """torch's DDP finds every parameter used, since the LM head's own weights are frozen."""
    monkeypatch.setattr(runs, "TRANSLATION", RECIPE)
    flags = ["--optimizer", "sam", *SGD, *NO_DROPOUT, *one_view]
    (first, second), _ = run_two(language_model_data, tmp_path / "two", "pytorch_ddp", *flags)
    assert runs.same_bits(first, second)
    trainer, batches = runs.build_trainer(language_model_data, *RECIPE, *flags)
    before = weights_of(trainer)
    for numbers in UPDATES:
        trainer.train_step([batches[number] for number in numbers])
    for name, weights in weights_of(trainer).items():
        torch.testing.assert_close(first[name], weights, rtol=0, atol=2e-5)
    assert max(float((first[name] - before[name]).abs().max()) for name in before) > 1e-2


# -- data, commands, flags ---------------------------------------------------------------------------------------------


class Sentences(list):
    @property
    def sizes(self):
        return [len(sentence) for sentence in self]


@pytest.fixture
def views():
    dictionary = Dictionary()
    for number in range(40):
        dictionary.add_symbol(f"w{number}")
    dictionary.add_symbol("<mask>")
    lengths = [11, 12, 13, 30]
    sentences = Sentences(torch.cat([torch.arange(n) + 4, torch.tensor([dictionary.eos()])]) for n in lengths)

    def build(span, is_training=True, max_length=25, seed=1):
        return SentenceViews(
            sentences, dictionary, begin=0, max_length=max_length, mask_span=span, seed=seed, is_training=is_training
        )

    return build


def test_spans_are_masked_in_long_sentences(views):
    dataset, mask = views(2), 44
    assert dataset[0]["second"].equal(dataset[0]["first"])  # 11 words: fewer than six spans
    starts = set()
    for epoch in range(1, 200):
        dataset.set_epoch(epoch)
        first, second = dataset[1]["first"], dataset[1]["second"]
        start = int(second.eq(mask).nonzero())
        starts.add(start)
        assert len(second) == len(first) - 1
        assert second.equal(torch.cat([first[:start], torch.tensor([mask]), first[start + 2 :]]))
        assert second.equal(dataset[1]["second"])
    assert starts == set(range(1, 12))  # each start of two among the twelve words, never <s> or </s>
    assert dataset.set_epoch(5) is None and not views(2, seed=2)[3]["second"].equal(views(2)[3]["second"])


def test_long_sentences_are_cut_and_batches_padded(views):
    dataset = views(0, max_length=14)
    assert [len(dataset[i]["first"]) for i in range(4)] == [13, 14, 14, 14] == list(dataset.sizes)
    assert dataset[3]["first"].tolist() == [0, *range(4, 16), 2]
    batch = dataset.collater([dataset[0], dataset[3]])
    assert batch["net_input"]["src_tokens"][0, -1] == PAD and batch["net_input"]["src_lengths"].tolist() == [13, 14]
    assert (batch["ntokens"], batch["nsentences"], batch["id"].tolist()) == (27, 2, [0, 3])
    assert "second_input" not in batch and dataset.collater([]) == {}


def test_batches_of_each_epoch_are_others(trainer_for):
    trainer, _ = trainer_for()

    def ids(epoch):
        iterator = trainer.get_train_iterator(epoch=epoch).next_epoch_itr(shuffle=False)
        return [number for batch in iterator for number in batch["id"].tolist()]

    first, second = ids(1), ids(2)
    assert first != second and sorted(first) == sorted(second)
    assert ids(1) == first
    assert np.array_equal(trainer.task.load_dataset("valid").ordered_indices(), np.arange(30))


def test_the_head_alone_is_frozen(trainer_for):
    trainer, batches = trainer_for()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert frozen and all(".lm_head." in name for name in frozen)
    assert "encoder.sentence_encoder.embed_tokens.weight" in trained
    loss, *_ = loss_of(trainer, batches[0])
    loss.backward()
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("arch", ["bert", "roberta"])
def test_three_updates_and_a_resumed_run(language_model_data, tmp_path, arch):
    flags = [*RECIPE, "--arch", arch, "--optimizer", "delta_sam", ONE_VIEW, "--input-noise", "0.1"]
    flags = [flag for flag in flags if flag != "--disable-validation"]
    whole = runs.train(language_model_data, tmp_path / "whole", *flags, "--max-update", "3")
    runs.train(language_model_data, tmp_path / "parts", *flags, "--max-update", "1")
    parts = runs.train(language_model_data, tmp_path / "parts", *flags, "--max-update", "3")
    assert runs.same_bits(whole["model"], parts["model"])
    assert whole["cfg"]["criterion"]["perturb_one_view"] and whole["cfg"]["task"]["_name"] == "sentence_embedding"


def test_through_the_command(language_model_data, tmp_path):
    common = [flag for flag in runs.common_flags() if flag != "--disable-validation"]
    common[common.index("--log-format") + 1] = "simple"
    done = runs.train_in_subprocess(
        str(language_model_data), *common, *RECIPE, "--optimizer", "delta_sam", ONE_VIEW, "--max-update", "3",
        "--log-interval", "1", "--save-dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (done.stdout + done.stderr).splitlines()
    training = [line for line in lines if "| train_inner |" in line]
    assert len(training) == 3 and all("sam_forwards=2" in line and "sam_sharp=" in line for line in training)
    assert any("| valid |" in line and "loss " in line for line in lines)
    assert runs.load(tmp_path / "checkpoint_last.pt")["cfg"]["criterion"]["temperature"] == TEMPERATURE


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0"], r"--temperature must be a finite number > 0 .* got 0"),
        (["--temperature", "inf"], r"--temperature must be a finite number > 0 .* got inf"),
        (["--input-noise", "-1"], r"--input-noise must be a finite number >= 0 .* got -1"),
        (["--mask-span", "-2"], r"--mask-span must be an integer >= 0 .* got -2"),
        (["--init-token", "99999"], r"--init-token must be a number of the dictionary, .* got 99999"),
        (["--max-sentence-length", "2"], r"--max-sentence-length must be an integer >= 3, .* got 2"),
    ],
)
def test_bad_flags_are_refused(trainer_for, flags, message):
    with pytest.raises(ConfigurationError, match=message):
        trainer_for(*flags)


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"dict\.txt: binarise sentences by fairseq-preprocess --only-source"):
        runs.build_trainer(tmp_path, *RECIPE, "--optimizer", "adam")


def test_cosines_do_not_depend_on_length():
    first, second = torch.randn(2, 6, 5, dtype=torch.float64)
    losses = InfoNCE(TEMPERATURE)(first, second)
    torch.testing.assert_close(InfoNCE(TEMPERATURE)(3 * first, second * torch.arange(1, 7).view(6, 1)), losses)
    assert math.isfinite(float(InfoNCE(TEMPERATURE)(first.half(), second.half()).sum()))
