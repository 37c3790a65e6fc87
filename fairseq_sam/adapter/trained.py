"""A trained model from a checkpoint, with its data and its loss: what the analyses measure."""

import contextlib
import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.logging import metrics
from fairseq.logging.meters import AverageMeter
from torch import Tensor, nn

from fairseq_sam.adapter.batches import Call, MicroBatch, UpdateBatch, summed_loss
from fairseq_sam.adapter.embeddings import word_embeddings
from fairseq_sam.adapter.errors import CheckpointError, UserError
from fairseq_sam.adapter.slicing import Slicer
from fairseq_sam.analysis.epsilon import Probe, method_probe
from fairseq_sam.analysis.memory import is_out_of_memory
from fairseq_sam.analysis.objective import Objective, evaluating
from fairseq_sam.core.method import Method

BLEU = {"eval_bleu": True, "eval_bleu_detok": "space", "eval_bleu_print_samples": False}
FOR_ANALYSES = "; analyses take the checkpoints that fairseq-train writes, whole ones"
# Counts, speeds, and what repeats the loss.
SKIPPED_METRICS = ("nll_loss", "num_updates", "wps", "ups", "wpb", "bsz", "ntokens", "nsentences", "sample_size")


class Trained:
    """A model of fairseq with its task and the criterion that it was trained with.

    Models with token targets are measured by plain cross entropy, without label smoothing; all others by their own
    criterion without a regulariser. Losses are in bits, as fairseq's.

    Args:
        path: checkpoint.
        data: folder of the task's data; default the one that the checkpoint names.
        cpu: stay on the CPU even if there is a GPU.
        bleu: let ``scores`` translate too, with this beam; 0 for not.
        remove_bpe: how subwords are joined before BLEU is computed, as in ``fairseq-generate --remove-bpe``.

    Raises:
        UserError: if the checkpoint or its data cannot be read, do not fit together or hold weights that are no
            finite numbers, or `bleu` is asked for and it does not translate.
    """

    def __init__(
        self,
        path: str | Path,
        data: str | Path | None = None,
        *,
        cpu: bool = False,
        bleu: int = 0,
        remove_bpe: str | None = "@@ ",
    ) -> None:
        overrides: dict[str, Any] = {} if data is None else {"data": str(data)}
        if bleu:
            overrides |= {**BLEU, "eval_bleu_args": f'{{"beam": {bleu}}}', "eval_bleu_remove_bpe": remove_bpe}
        if not Path(path).is_file():
            raise UserError(f"expected a checkpoint, got {path}, which is no file")
        self.path = Path(path)
        models, self.cfg, self.task = _loaded(path, overrides)
        self._use_cuda = torch.cuda.is_available() and not cpu
        self.model: Any = models[0].cuda() if self._use_cuda else models[0]
        if bleu and not getattr(self.task.cfg, "eval_bleu", False):
            raise UserError(f"--bleu needs a model that translates, but {path} is of the task {self.cfg.task._name}")
        self.criterion = _plain_criterion(self.task, self.cfg.criterion)
        _check_finite(path, dict(self.model.named_parameters()))

    @property
    def data(self) -> str:
        """The folder of its data."""
        return str(getattr(self.cfg.task, "data", ""))

    def forget(self, seed: int) -> None:
        """Put the model's weights back to before training: new ones.

        Args:
            seed: of the random weights.

        Raises:
            UserError: if training began with the weights of a pretrained model.
        """
        pretrained = self.cfg.checkpoint.finetune_from_model
        if pretrained:
            raise UserError(
                f"--fresh is of models that were trained from random weights, but {self.path} began with "
                f"those of {pretrained}; measure a checkpoint of its first epoch"
            )
        torch.manual_seed(seed)
        takes_checkpoints = "from_checkpoint" in inspect.signature(self.task.build_model).parameters
        options = {"from_checkpoint": True} if takes_checkpoints else {}  # as fairseq does
        model = self.task.build_model(self.cfg.model, **options)
        self.model = model.cuda() if self._use_cuda else model

    def batches(
        self,
        subset: str,
        *,
        max_tokens: int | None = 4000,
        batch_size: int | None = None,
        number: int | None = None,
        seed: int = 1,
        flag: str = "--subset",
    ) -> list[Any]:
        """Return batches of a split of the data, on the model's device.

        Args:
            subset: the split.
            max_tokens: largest size of a batch, padding included; None for no limit.
            batch_size: largest number of sentences in a batch; None for no limit.
            number: how many batches, chosen at random; default all.
            seed: of the choice.
            flag: which names the split.

        Raises:
            UserError: if the data have no such split, or none of its sentences can be measured.
        """
        with _reading(f"{flag} {subset} of {self.data}"):
            self.task.load_dataset(subset, combine=False, epoch=1, task_cfg=self.cfg.task)
        dataset = self.task.dataset(subset)
        try:
            iterator = self._iterator(dataset, max_tokens, batch_size, seed)
        except AssertionError as error:
            if "max_tokens" not in str(error):
                raise
            longest = max(int(dataset.num_tokens(index)) for index in range(len(dataset)))
            raise UserError(
                f"--max-tokens must be at least {longest}, the tokens of the longest sentence of {subset}, "
                f"got {max_tokens}"
            ) from None
        batches = iterator.next_epoch_itr(shuffle=number is not None)
        found: list[Any] = []
        with _reading(f"{flag} {subset} of {self.data}"):
            for batch in batches:
                if number is not None and len(found) == number:
                    break
                found.append(utils.move_to_cuda(batch) if self._use_cuda else batch)
        if not found:
            raise UserError(f"{flag} {subset} of {self.data} has no sentence that the model of {self.path} takes")
        return found

    def _iterator(self, dataset: Any, max_tokens: int | None, batch_size: int | None, seed: int) -> Any:
        return self.task.get_batch_iterator(
            dataset=dataset,
            max_tokens=max_tokens,
            max_sentences=batch_size,
            max_positions=utils.resolve_max_positions(self.task.max_positions(), self.model.max_positions()),
            ignore_invalid_inputs=True,
            required_batch_size_multiple=1,
            seed=seed,
        )

    def loss_sum(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        """A batch's summed loss (bits) and its weight: number of tokens or sentences."""
        loss, sample_size, _ = self.criterion(model, batch)
        return loss / math.log(2), float(sample_size)

    @property
    def batch_limits(self) -> dict[str, int | None]:
        """The largest tokens and sentences of a micro-batch in training, as options of ``batches``."""
        dataset = self.cfg.dataset
        return {"max_tokens": dataset.max_tokens, "batch_size": dataset.batch_size}

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an update in training, at its end, those of all workers together."""
        workers = int(self.cfg.distributed_training.distributed_world_size or 1)
        return int(self.cfg.optimization.update_freq[-1]) * workers

    def probe(self, batches: Sequence[Any], method: Method, micro_batches: int | None = None) -> Probe:
        """Return a probe of a method's perturbation in training: with the run's criterion and dropout.

        Args:
            batches: from ``batches``.
            method: the method; its `epsilon` is replaced.
            micro_batches: how many batches make an update and, with the scope ``update``, share a perturbation;
                default that of training.
        """
        criterion = self.task.build_criterion(self.cfg.criterion)
        backward, slicer = Backward(), Slicer(self.task)
        call = Call(self.task.train_step, self.model, criterion, backward, 0, {}, slicer, contextlib.nullcontext)
        embeddings = word_embeddings(self.model, self.task) if method.where == "embeddings" else None
        micro = [MicroBatch(call, batch) for batch in batches]
        size = micro_batches or self.micro_batches
        updates = [micro[start : start + size] for start in range(0, len(micro), size)]
        grouped: list[Any] = [UpdateBatch(dict(enumerate(u))) for u in updates] if method.scope == "update" else micro
        return method_probe(
            self.model,
            grouped,
            method,
            embeddings=embeddings,
            summed_loss=lambda result: summed_loss(result) / math.log(2),
            modules={"": self.model, "criterion": criterion},
        )

    def objective(self, batches: Sequence[Any], exclude: str = "") -> Objective:
        """Return the loss over some batches as a function of the weights.

        Args:
            batches: from ``batches``.
            exclude: regular expression; parameters whose name it matches are held constant.

        Raises:
            UserError: if it matches all.
        """
        if exclude and all(re.search(exclude, name) for name, _ in self.model.named_parameters()):
            raise UserError(f"--exclude must leave a parameter of {self.path}, but {exclude!r} matches all")
        return Objective(self.model, batches, self.loss_sum, exclude=exclude)

    def weights_of(self, path: str | Path) -> dict[str, Tensor]:
        """Return the weights of another checkpoint by this model's names, as fairseq would load them.

        Args:
            path: the checkpoint, such as a pretrained one; what the model has more than it is not among them.

        Raises:
            UserError: if it cannot be read, or holds weights that are no finite numbers.
        """
        try:
            weights: dict[str, Tensor] = dict(checkpoint_utils.load_checkpoint_to_cpu(str(path))["model"])
        except CheckpointError as error:
            raise CheckpointError(error.finding, FOR_ANALYSES) from None
        self.model.upgrade_state_dict(weights)  # may fill in the model's own weights for those that are not there
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        found = {name: weight for name, weight in weights.items() if weight.untyped_storage().data_ptr() not in own}
        _check_finite(path, found)
        return found

    def save(self, path: Path) -> Path:
        """Write a checkpoint of the model as it is now, without the optimizer's state.

        Args:
            path: the file, which is returned.
        """
        state = checkpoint_utils.load_checkpoint_to_cpu(str(self.path))
        model = {name: value.cpu() for name, value in self.model.state_dict().items()}
        checkpoint_utils.torch_persistent_save({**state, "model": model, "last_optimizer_state": None}, str(path))
        return path

    def scores(self, batches: Sequence[Any]) -> dict[str, float]:
        """Return what fairseq's validation reports of the model as it is: loss, perplexity, accuracy, F1, BLEU.

        Args:
            batches: from ``batches``.

        Returns:
            Its numbers by name, means as they are, what fairseq computes of them (perplexity, BLEU, F1) with its
            rounding; what is no single number, such as all predictions, is left out.
        """
        with evaluating(self.model):
            logs = [self.task.valid_step(batch, self.model, self.criterion)[2] for batch in batches]
        with metrics.aggregate(new_root=True) as found:
            self.task.reduce_metrics(logs, self.criterion)
        values = found.get_smoothed_values()
        values |= {name: found[name].avg for name in values if isinstance(found[name], AverageMeter)}
        return {
            name: float(value) for name, value in values.items() if name not in SKIPPED_METRICS and _is_number(value)
        }


class Backward:
    """Stands in for the optimizer where a task's ``train_step`` only needs its backward pass."""

    def backward(self, loss: Tensor) -> None:
        """Run backward."""
        loss.backward()  # type: ignore[no-untyped-call]


def _loaded(path: str | Path, overrides: dict[str, Any]) -> tuple[list[Any], Any, Any]:
    """What fairseq makes of a checkpoint: models, configuration and task."""
    try:
        return checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)
    except CheckpointError as error:
        raise CheckpointError(error.finding, FOR_ANALYSES) from None
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        where = (
            f"those in {overrides['data']} (--data)"
            if "data" in overrides
            else "those that it names; --data names others"
        )
        raise UserError(
            f"{path} and its data do not fit together, or are of a model that is not known here (--user-dir): "
            f"{_line(error)}. The data are {where}; they must be those of the task that the model was trained on, with "
            "its dictionaries"
        ) from error


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Let errors of reading data, which are each task's own, say of which."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{what} cannot be read: {_line(error)}") from error


def _check_finite(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    bad = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(
            f"{path} holds weights that are no finite numbers, in {bad[0]}{more}; take a checkpoint of before its "
            "training diverged"
        )


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0)


def _plain_criterion(task: Any, cfg: Any) -> Any:
    """The criterion without label smoothing; in evaluation mode regularisers are off."""
    if "cross_entropy" in str(cfg._name):
        return CrossEntropyCriterion(task, sentence_avg=False).eval()
    return task.build_criterion(cfg).eval()
