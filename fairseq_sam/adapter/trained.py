"""A trained model from a checkpoint, with its data and its loss: what the analyses measure."""

import contextlib
import inspect
import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.logging import metrics
from torch import Tensor, nn

from fairseq_sam.adapter.batches import Call, MicroBatch
from fairseq_sam.adapter.embeddings import word_embeddings
from fairseq_sam.adapter.errors import UserError
from fairseq_sam.adapter.slicing import Slicer
from fairseq_sam.analysis.epsilon import Probe, method_probe
from fairseq_sam.analysis.objective import Objective, evaluating
from fairseq_sam.core.method import Method

BLEU = {"eval_bleu": True, "eval_bleu_detok": "space", "eval_bleu_print_samples": False}
SKIPPED_METRICS = ("num_updates", "wps", "ups", "wpb", "bsz", "ntokens", "nsentences", "sample_size")


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
        UserError: if the checkpoint or its data cannot be read, or `bleu` is asked for and it does not translate.
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
        models, self.cfg, self.task = checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)
        self._use_cuda = torch.cuda.is_available() and not cpu
        self.model: Any = models[0].cuda() if self._use_cuda else models[0]
        if bleu and not getattr(self.task.cfg, "eval_bleu", False):
            raise UserError(f"--bleu needs a model that translates, but {path} is of the task {self.cfg.task._name}")
        self.criterion = _plain_criterion(self.task, self.cfg.criterion)

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
    ) -> list[Any]:
        """Return batches of a split of the data, on the model's device.

        Args:
            subset: the split.
            max_tokens: largest size of a batch, padding included; None for no limit.
            batch_size: largest number of sentences in a batch; None for no limit.
            number: how many batches, chosen at random; default all.
            seed: of the choice.

        Raises:
            UserError: if the data have no such split.
        """
        try:
            self.task.load_dataset(subset, combine=False, epoch=1, task_cfg=self.cfg.task)
        except FileNotFoundError as error:
            raise UserError(f"--subset {subset} is not in the data: {error}") from None
        iterator = self.task.get_batch_iterator(
            dataset=self.task.dataset(subset),
            max_tokens=max_tokens,
            max_sentences=batch_size,
            max_positions=utils.resolve_max_positions(self.task.max_positions(), self.model.max_positions()),
            ignore_invalid_inputs=True,
            required_batch_size_multiple=1,
            seed=seed,
        ).next_epoch_itr(shuffle=number is not None)
        found: list[Any] = []
        for batch in iterator:
            if number is not None and len(found) == number:
                break
            found.append(utils.move_to_cuda(batch) if self._use_cuda else batch)
        return found

    def loss_sum(self, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        """A batch's summed loss (bits) and its weight: number of tokens or sentences."""
        loss, sample_size, _ = self.criterion(model, batch)
        return loss / math.log(2), float(sample_size)

    def probe(self, batches: Sequence[Any], method: Method) -> Probe:
        """Return a probe of a method's perturbation in training: with the run's criterion, dropout and micro-batches.

        Args:
            batches: from ``batches``.
            method: the method; its `epsilon` is replaced.
        """
        criterion = self.task.build_criterion(self.cfg.criterion)
        backward, slicer = Backward(), Slicer(self.task)
        call = Call(self.task.train_step, self.model, criterion, backward, 0, {}, slicer, contextlib.nullcontext)
        embeddings = word_embeddings(self.model, self.task) if method.where == "embeddings" else None
        return method_probe(
            self.model,
            [MicroBatch(call, batch) for batch in batches],
            method,
            embeddings=embeddings,
            summed_loss=lambda result: float(result.loss) / math.log(2),
            modules={"": self.model, "criterion": criterion},
        )

    def objective(self, batches: Sequence[Any], exclude: str = "") -> Objective:
        """Return the loss over some batches as a function of the weights.

        Args:
            batches: from ``batches``.
            exclude: regular expression; parameters whose name it matches are held constant.
        """
        return Objective(self.model, batches, self.loss_sum, exclude=exclude)

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
            Its numbers by name; what is no single number, such as all predictions, is left out.
        """
        with evaluating(self.model):
            logs = [self.task.valid_step(batch, self.model, self.criterion)[2] for batch in batches]
        with metrics.aggregate(new_root=True) as found:
            self.task.reduce_metrics(logs, self.criterion)
        return {
            name: float(value)
            for name, value in found.get_smoothed_values().items()
            if name not in SKIPPED_METRICS and _is_number(value)
        }


class Backward:
    """Stands in for the optimizer where a task's ``train_step`` only needs its backward pass."""

    def backward(self, loss: Tensor) -> None:
        """Run backward."""
        loss.backward()  # type: ignore[no-untyped-call]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.dim() == 0)


def _plain_criterion(task: Any, cfg: Any) -> Any:
    """The criterion without label smoothing; in evaluation mode regularisers are off."""
    if "cross_entropy" in str(cfg._name):
        return CrossEntropyCriterion(task, sentence_avg=False).eval()
    return task.build_criterion(cfg).eval()
