"""Criteria with R-Drop, R3F and SMART: losses and gradients by hand, then whole runs."""

import contextlib

import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY
from torch.nn.functional import cross_entropy, log_softmax, mse_loss

from fairseq_sam.adapter.regularizers import PREDICTIONS, register_regularized_criteria
from fairseq_sam.core.regularizers import REGULARIZERS
from tests.adapter import runs
from tests.adapter.test_tasks import RECIPES
from tests.adapter.test_workers import run_one, run_two

SENTENCES = RECIPES["sentence_prediction"]
BASES = {
    "cross_entropy": ("translation", runs.TRANSLATION),
    "label_smoothed_cross_entropy": ("translation", runs.TRANSLATION),
    "masked_lm": RECIPES["masked_lm"],
    "sentence_prediction": SENTENCES,
    "regression": RECIPES["sentence_prediction_regression"],
}
# Large enough for float32 to show every part of the term.
SETTINGS = {
    "rdrop": ["--rdrop-alpha", "0.7"],
    "r3f": ["--r3f-lambda", "0.7", "--r3f-eps", "0.2", "--r3f-noise", "normal"],
    "smart": [
        "--smart-lambda", "0.7", "--smart-steps", "2", "--smart-step-size", "0.1", "--smart-eps", "0.15",
        "--smart-init", "0.1",
    ],
}  # fmt: skip
OFF = {"r3f": ["--r3f-lambda", "0"], "smart": ["--smart-lambda", "0"]}
NO_DROPOUT = ["--dropout", "0", "--attention-dropout", "0"]
PAD = 1
SMOOTHING = 0.1


@pytest.fixture
def trainer_for(translation_data, language_model_data, classification_data):
    data = {"translation": translation_data, "lm": language_model_data, "cls": classification_data}

    def build(base, regularizer, *flags, optimizer=("--optimizer", "adam")):
        kind, recipe = BASES[base]
        recipe = list(recipe)
        at = recipe.index("--criterion") + 1
        name = "sentence_prediction" if base == "regression" else base
        recipe[at] = f"{name}_{regularizer}" if regularizer else name
        if base == "cross_entropy":
            recipe = recipe[: at + 1]  # without --label-smoothing
        return runs.build_trainer(data[kind], *recipe, *optimizer, *flags)

    return build


def two_updates(trainer, batches):
    logged = [trainer.train_step(batches[2 * number : 2 * number + 2]) for number in range(2)]
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, logged


def evaluate(trainer, sample, seed=11):
    """Loss, logging output and gradients of the trainer's criterion."""
    trainer.model.train()
    trainer.model.zero_grad()
    torch.manual_seed(seed)
    loss, sample_size, logging_output = trainer.criterion(trainer.model, sample)
    assert all(p.grad is None for p in trainer.model.parameters()), "a forward pass leaves gradients"
    assert not any(module._forward_hooks for module in trainer.model.modules()), "a forward pass leaves hooks"
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), sample_size, logging_output, gradients


# -- by hand -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def added(model, perturbations):
    """Each call of an embedding adds what the next of the functions gives for its words and its output."""
    tables = {id(m): m for name, m in model.named_modules() if name.endswith("embed_tokens")}.values()
    plain = {table: table.forward for table in tables}
    remaining = iter(perturbations)
    for table in tables:

        def forward(words, table=table):
            output = plain[table](words)
            return output + next(remaining)(words.ne(PAD).unsqueeze(-1), output)

        table.forward = forward
    try:
        yield
    finally:
        for table in tables:
            del table.forward


def predict_and_score(base, model, sample):
    """Logits or scores of every unit, and the base criterion's summed loss."""
    words = sample["net_input"]
    target = sample["target"]
    if base in ("sentence_prediction", "regression"):
        logits = model(**words, features_only=True, classification_head_name="head")[0]
        if base == "regression":
            return logits[:, 0], mse_loss(logits[:, 0], target.view(-1).float(), reduction="sum")
        return logits, cross_entropy(logits, target.view(-1), reduction="sum")
    logits = (
        model(**words, masked_tokens=target.ne(PAD))[0] if base == "masked_lm" else model(**words)[0][target.ne(PAD)]
    )
    target = target[target.ne(PAD)]
    loss = cross_entropy(logits, target, reduction="sum")
    if base == "label_smoothed_cross_entropy":
        share = SMOOTHING / (logits.size(-1) - 1)
        loss = (1 - SMOOTHING - share) * loss - share * log_softmax(logits, -1).sum()
    return logits, loss


def divergence_by_hand(base, first, second):
    if base == "regression":
        return ((first - second) ** 2).sum()
    p, q = first.softmax(-1), second.softmax(-1)
    return (p * (p.log() - q.log())).sum() + (q * (q.log() - p.log())).sum()


def rdrop_by_hand(base, model, sample):
    first, loss = predict_and_score(base, model, sample)
    second, other = predict_and_score(base, model, sample)
    term = 0.7 * divergence_by_hand(base, first, second) / (1 if base == "regression" else 2)
    return (loss + other) / 2 + term, term


def r3f_by_hand(base, model, sample):
    first, loss = predict_and_score(base, model, sample)
    with added(model, [lambda is_token, output: torch.empty(output.shape).normal_(0, 0.2) * is_token] * 2):
        second, _ = predict_and_score(base, model, sample)
    term = 0.7 * divergence_by_hand(base, first, second)
    return loss + term, term


def smart_by_hand(base, model, sample):
    first, loss = predict_and_score(base, model, sample)
    deltas = []

    def start(is_token, output):
        deltas.append((torch.empty(output.shape).normal_(0, 0.1) * is_token).requires_grad_())
        masks.append(is_token)
        return deltas[-1]

    masks = []
    num_calls = 2 if "prev_output_tokens" in sample["net_input"] else 1
    perturbations = [start] * num_calls
    for _ in range(2):
        with added(model, perturbations):
            second, _ = predict_and_score(base, model, sample)
        gradients = torch.autograd.grad(divergence_by_hand(base, first.detach(), second), deltas)
        for row in range(len(deltas[0])):
            largest = max(gradient[row].abs().max() for gradient in gradients)
            for delta, gradient, mask in zip(deltas, gradients, masks, strict=True):
                moved = (delta[row].detach() + 0.1 * gradient[row] / largest).clamp(-0.15, 0.15)
                delta.data[row] = moved * mask[row]
        perturbations = [lambda is_token, output, delta=delta: delta for delta in deltas]
    perturbations = [lambda is_token, output, delta=delta: delta.detach() for delta in deltas]
    with added(model, perturbations):
        second, _ = predict_and_score(base, model, sample)
    term = 0.7 * divergence_by_hand(base, first, second)
    return loss + term, term


BY_HAND = {"rdrop": rdrop_by_hand, "r3f": r3f_by_hand, "smart": smart_by_hand}


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("base", BASES)
def test_loss_and_gradient_by_hand(trainer_for, base, regularizer):
    trainer, batches = trainer_for(base, regularizer, *SETTINGS[regularizer])
    sample = batches[0]
    found, _, logged, gradients = evaluate(trainer, sample)
    trainer.model.zero_grad()
    torch.manual_seed(11)
    expected, term = BY_HAND[regularizer](base, trainer.model, sample)
    expected.backward()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logged["reg_loss"], term.detach(), rtol=1e-4, atol=1e-6)
    assert logged["loss"] == found and logged["reg_loss"] > 1e-4
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularizer", OFF)
@pytest.mark.parametrize("base", ["label_smoothed_cross_entropy", "masked_lm"])
def test_weight_zero_is_the_base_bit_for_bit(trainer_for, base, regularizer):
    plain, plain_logs = two_updates(*trainer_for(base, None))
    found, logs = two_updates(*trainer_for(base, regularizer, *OFF[regularizer]))
    assert runs.same_bits(plain, found)
    assert [log["loss"] for log in plain_logs] == [log["loss"] for log in logs]


@pytest.mark.parametrize("base", BASES)
def test_rdrop_without_dropout_is_the_base(trainer_for, base):
    plain, batches = trainer_for(base, None, *NO_DROPOUT)
    trainer, _ = trainer_for(base, "rdrop", *NO_DROPOUT)
    expected, _, _, expected_gradients = evaluate(plain, batches[0])
    found, _, logged, gradients = evaluate(trainer, batches[0])
    assert found == expected and logged["reg_loss"] == 0
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


NO_NOISE = {"r3f": ["--r3f-eps", "0"], "smart": ["--smart-eps", "0"]}


@pytest.mark.parametrize("regularizer", NO_NOISE)
@pytest.mark.parametrize("base", BASES)
def test_without_noise_and_dropout_the_term_is_zero(trainer_for, base, regularizer):
    trainer, batches = trainer_for(base, regularizer, *NO_DROPOUT, *NO_NOISE[regularizer])
    assert evaluate(trainer, batches[0])[2]["reg_loss"] == 0


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_two_passes_have_different_dropout_masks(trainer_for, regularizer):
    trainer, batches = trainer_for("sentence_prediction", regularizer, *NO_NOISE.get(regularizer, []))
    assert evaluate(trainer, batches[0])[2]["reg_loss"] > 0


@pytest.mark.parametrize("base", BASES)
def test_validation_and_sample_size_are_the_base_criterions(trainer_for, base):
    plain, batches = trainer_for(base, None)
    validated = plain.task.valid_step(batches[0], plain.model, plain.criterion)
    _, sample_size, logged, _ = evaluate(plain, batches[0])
    for regularizer in REGULARIZERS:
        trainer, _ = trainer_for(base, regularizer)
        assert trainer.task.valid_step(batches[0], trainer.model, trainer.criterion) == validated
        _, found_size, found_logged, _ = evaluate(trainer, batches[0])
        assert found_size == sample_size and found_logged.keys() == {*logged, "reg_loss"}


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "ga_sam"])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("base", BASES)
def test_training(trainer_for, base, regularizer, optimizer):
    flags = ("--optimizer", optimizer, *(["--sam-steps", "1"] if optimizer == "ga_sam" else []))
    trainer, batches = trainer_for(base, regularizer, *SETTINGS[regularizer], optimizer=flags)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    found, logs = two_updates(trainer, batches)
    assert all(torch.isfinite(w).all() for w in found.values()) and not runs.same_bits(before, found)
    for log in logs:
        assert 0 < log["reg_loss"] < log["loss"]
        assert "accuracy" in log or base != "sentence_prediction"


def test_the_term_is_logged_beside_the_base_metrics(trainer_for):
    """One micro-batch: the first pass is the base criterion's, so the rest of the loss and the accuracy are too."""
    (plain, batches), (trainer, _) = trainer_for("sentence_prediction", None), trainer_for("sentence_prediction", "r3f")
    expected, found = plain.train_step(batches[:1]), trainer.train_step(batches[:1])
    assert found["loss"] - found["reg_loss"] == pytest.approx(expected["loss"], abs=1.1e-3)
    assert found["accuracy"] == expected["accuracy"]


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_epsilon_zero_is_adam(trainer_for, regularizer):
    """All passes of a sharpness-aware step repeat the same dropout masks and noise, in both passes of a criterion."""
    arguments = ("label_smoothed_cross_entropy", regularizer, *SETTINGS[regularizer])
    plain, _ = two_updates(*trainer_for(*arguments))
    zero = ("--optimizer", "ga_sam", "--sam-epsilon", "0", "--sam-steps", "2")
    found, _ = two_updates(*trainer_for(*arguments, optimizer=zero))
    assert runs.same_bits(plain, found)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_half_precision(trainer_for, regularizer):
    half = ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4")
    trainer, batches = trainer_for("label_smoothed_cross_entropy", regularizer, *SETTINGS[regularizer], *half)
    found, logs = two_updates(trainer, batches)
    assert all(w.dtype == torch.float16 and torch.isfinite(w).all() for w in found.values())
    single, _ = trainer_for("label_smoothed_cross_entropy", regularizer, *SETTINGS[regularizer])
    assert logs[0]["reg_loss"] == pytest.approx(two_updates(single, batches)[1][0]["reg_loss"], rel=0.05)


@pytest.mark.parametrize("base", ["masked_lm", "label_smoothed_cross_entropy"])
def test_a_sample_without_targets_has_no_term(trainer_for, base):
    trainer, batches = trainer_for(base, "rdrop")
    sample = batches[0]
    sample["target"] = torch.full_like(sample["target"], PAD)
    loss, *_, logged, _ = evaluate(trainer, sample)
    assert loss == 0 and logged["reg_loss"] == 0


def test_prefix_tokens_are_left_out(trainer_for):
    trainer, batches = trainer_for("label_smoothed_cross_entropy", "r3f", *SETTINGS["r3f"])
    whole = evaluate(trainer, batches[0])[2]["reg_loss"]
    trainer.criterion.ignore_prefix_size = 2
    assert 0 < evaluate(trainer, batches[0])[2]["reg_loss"] < whole


@pytest.mark.slow
def test_two_workers_equal_one_with_all_their_micro_batches(translation_data, tmp_path):
    """torch's DDP allows two forward passes before one backward pass, and both losses have a gradient."""
    flags = ["--optimizer", "sgd", "--lr", "0.5", "--dropout", "0", "--criterion", "label_smoothed_cross_entropy_rdrop"]
    (first, second), _ = run_two(translation_data, tmp_path / "two", "pytorch_ddp", *flags)
    assert runs.same_bits(first, second)
    for name, weights in run_one(translation_data, *flags).items():
        torch.testing.assert_close(first[name], weights, rtol=0, atol=1e-6)


def test_layers_that_only_one_of_the_passes_uses_are_refused_under_torch_ddp(trainer_for, monkeypatch):
    from types import SimpleNamespace

    from fairseq_sam.adapter import regularizers

    trainer, batches = trainer_for("label_smoothed_cross_entropy", "rdrop")
    replica = SimpleNamespace(find_unused_parameters=True, require_backward_grad_sync=True)
    monkeypatch.setattr(regularizers, "torch_ddp", lambda model: replica)
    with pytest.raises(ValueError, match=r"--find-unused-parameters .* RDrop, .* --ddp-backend legacy_ddp"):
        trainer.train_step(batches[:1])
    replica.find_unused_parameters = False
    trainer.train_step(batches[:1])


@pytest.mark.slow
def test_replicas_stay_equal_with_an_ascent_of_their_own(translation_data, tmp_path):
    """The gradient of SMART's ascent is not reduced over workers; that of the loss is."""
    flags = [*SETTINGS["smart"], "--criterion", "label_smoothed_cross_entropy_smart", "--optimizer", "adam"]
    (first, second), _ = run_two(translation_data, tmp_path / "two", "pytorch_ddp", *flags)
    assert runs.same_bits(first, second)


def test_through_the_command(classification_data, tmp_path):
    flags = list(SENTENCES[1])
    flags[flags.index("--criterion") + 1] = "sentence_prediction_smart"
    common = [flag for flag in runs.common_flags() if flag != "--disable-validation"]
    common[common.index("--log-format") + 1] = "simple"
    done = runs.train_in_subprocess(
        str(classification_data), *common, *flags, "--smart-lambda", "3", "--update-freq", "2", "--optimizer", "ga_sam",
        "--max-update", "2", "--log-interval", "1", "--save-dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (done.stdout + done.stderr).splitlines()
    training = [line for line in lines if "| train_inner |" in line]
    validation = [line for line in lines if "| valid |" in line]
    assert training and all("reg_loss=" in line and "accuracy=" in line for line in training)
    assert validation and not any("reg_loss" in line for line in validation)
    kept = runs.load(tmp_path / "checkpoint_last.pt")["cfg"]["criterion"]
    assert (kept["_name"], kept["smart_lambda"], kept["smart_steps"]) == ("sentence_prediction_smart", 3.0, 1)


# -- refusals and registry ---------------------------------------------------------------------------------------------


def test_bad_flags_are_refused_when_the_criterion_is_built(trainer_for):
    with pytest.raises(ValueError, match="--r3f-noise must be one of uniform, normal, got 'cauchy'"):
        trainer_for("sentence_prediction", "r3f", "--r3f-noise", "cauchy")
    with pytest.raises(ValueError, match=r"--smart-steps must be finite and >= 1, got 0"):
        trainer_for("masked_lm", "smart", "--smart-steps", "0")


def test_what_cannot_work_is_refused(trainer_for):
    trainer, batches = trainer_for("label_smoothed_cross_entropy", "smart", "--checkpoint-activations")
    with pytest.raises(ValueError, match="--checkpoint-activations"):
        trainer.criterion(trainer.model.train(), batches[0])
    trainer, batches = trainer_for("label_smoothed_cross_entropy", "r3f", "--checkpoint-activations")
    with pytest.raises(ValueError, match="reduce must be True"):
        trainer.criterion(trainer.model.train(), batches[0], reduce=False)
    assert evaluate(trainer, batches[0])[3]


def test_every_pair_is_registered_once():
    register_regularized_criteria()
    for base in PREDICTIONS:
        for name in REGULARIZERS:
            assert issubclass(CRITERION_REGISTRY[f"{base}_{name}"], CRITERION_REGISTRY[base])
    assert len(PREDICTIONS) * len(REGULARIZERS) == 12


def test_every_flag_and_criterion_is_documented():
    page = (runs.ROOT / "docs" / "regularizers.md").read_text()
    for name, regularizer in REGULARIZERS.items():
        assert all(f"`--{flag.replace('_', '-')}`" in page for flag in regularizer.__dataclass_fields__)
        assert f"_{name}`" in page
    assert all(f"`{base}`" in page for base in PREDICTIONS)
