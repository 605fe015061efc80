"""DiSK as timm's training tasks: on logits, and as the weight of SimKD's feature matching."""

from typing import Any, cast

from torch import Tensor, nn

from disk_plugin import _checks
from disk_plugin.features.guided import FEATURE_WEIGHTS, FeatureWeight, GuidedFeatureTerms, guided_feature_terms
from disk_plugin.functional import DiSKTerms

from .guided_task import GuidedTask
from .simkd import SimKDModel
from .teacher import TeacherOutputs


class DiSKTask(GuidedTask):
    r"""Distilling Scaffolded Knowledge, Kag et al. (ICLR 2023), eq. (5), as a task of timm >= 1.0.27.

    .. math:: w_{task}\,criterion(s) + w_{distill}\,L_{dist}(s, g)
              + \lambda\,\Big(\tfrac1N\sum_i g_i CE_i - \delta\Big)_+

    is timm's ``LogitDistillationTask`` with the scaffold and the budget; weights and ``temperature`` mean what they
    mean there. The criterion is the host's, with its smoothing and soft targets; the budget's CE is the plain one, on
    the argmax of a soft target. *Joint*: the guide is part of ``get_trainable_module()`` and so of the host's
    optimizer, DDP and clipping. *Alternating*: Algorithm 1, the guide has its own optimizer, see ``run_guide_passes``.
    Validation, EMA and checkpoints know the bare student alone; ``task_state`` holds the guide and its schedule.

    The hinge is over one micro-batch, of all processes together. Under gradient accumulation the mean gradient is that
    of the full batch where all micro-batches keep to the budget or all exceed it, and differs where they disagree.

    Args:
        student_model: the student; it must return logits in training mode.
        teacher_model: a name, a module, or timm's ``DistillationTeacher``; it is frozen. Its images are normalised
            with the mean and std of its ``pretrained_cfg`` (``create_model(..., pretrained_cfg_overlay={"mean": ...})``
            for one that was trained otherwise), or of the ``DistillationTeacher``; ImageNet's where neither says.
        criterion: of the task, None for cross-entropy.
        epochs: whole epochs that the schedules span; None for a constant ``discount``, or a constant ``multiplier`` and
            ``budget``, which a checkpoint that is loaded then brings along: an automatic discount would stay 0.
        mode: ``"joint"`` or ``"alternating"``.
        guide: keywords of ``GuideHead``, and ``use_features`` (default True): the teacher's pre-logits as a second
            input beside its logits. Or a module, which gets both if it takes two inputs.
        dual: keywords of ``DualScheduler``; its ``budget`` defaults to the loss's.
        alternating: keywords of ``Recipe``.
        input_size: (C, H, W) of the training images; None for what the student was built for.
        input_mean: what the images are normalised with, one value or one per channel; None for the student's
            ``pretrained_cfg``. The teacher gets them normalised as its own were.
        input_std: the same.
        allow_fresh_guide: go on, with an untrained guide, from a checkpoint that holds none.
        **settings: those of timm's ``LogitDistillationTask`` (``task_loss_weight``, ``distill_loss_weight``,
            ``device``, ...) and of ``DiSKLoss`` (``top_k``, ``budget``, ``variant``, ...), whose ``ce_weight`` and
            ``distill_weight`` are other names of the two weights.

    Attributes:
        disk: the ``DiSKLoss``.
        dual: its ``DualScheduler``, or None. Call ``dual.step()`` after each epoch, or ``begin_epoch`` and
            ``end_epoch`` around it. In alternating mode a step is an outer iteration of Algorithm 1, ``student_passes``
            epochs, and only those two methods keep count.

    Raises:
        ValueError: a criterion without classes that exclude each other (BCE), or over several views (JSD); a teacher
            with other classes or another image size; a guide of other widths; a student that returns two predictions;
            values out of range.
        TypeError: unknown keywords.
    """

    def trained(self, student: nn.Module, image: Tensor) -> nn.Module:
        """Return the student as it is."""
        return student

    def terms(
        self,
        logits: Tensor,
        target: Tensor,
        teacher: TeacherOutputs,
        guide_logits: Tensor | None,
        feature_error: Tensor | None,
    ) -> DiSKTerms:
        """Evaluate (5) per sample."""
        return self.disk.terms(logits, teacher[0], target, teacher[1], guide_logits=guide_logits, reduction="none")


class DiSKSimKDTask(GuidedTask):
    r"""SimKD (Chen et al., CVPR 2022) weighted by DiSK's guide, Kag et al. (ICLR 2023), A.7, eq. (6).

    .. math:: w_{task}\,criterion(p) + w_{distill}\,\tfrac1N\sum_i w(g_i)\,\|\Psi(f_S)_i - f_{T,i}\|^2,

    p being the teacher's own head on the projected map, at inference too: what is validated, averaged and saved is a
    ``SimKDModel``, without which the student cannot predict. The guide feels scaffold and budget of p. SimKD itself
    has ``task_loss_weight=0`` and ``feature_weight="uniform"``.

    Args:
        student_model, teacher_model, criterion, **settings: those of ``DiSKTask``.
        feature_weight: what weighs a sample, one of ``FEATURE_WEIGHTS``.
        factor: the projector's inner width is the teacher's channels // factor.

    Raises:
        ValueError: besides ``DiSKTask``'s: a teacher whose head does not read the feature map.
    """

    matches_features = True

    def __init__(
        self, *models: Any, feature_weight: FeatureWeight = "one_minus_guide", factor: int = 2, **settings: Any
    ) -> None:
        _checks.choice("feature_weight", feature_weight, FEATURE_WEIGHTS)
        self._feature_weight, self._factor = feature_weight, factor
        super().__init__(*models, **settings)

    def trained(self, student: nn.Module, image: Tensor) -> SimKDModel:
        """Return student, projector and the teacher's head as one model."""
        return SimKDModel(student, self.teacher.model, image, teacher_image=self._normalize(image), factor=self._factor)

    def terms(
        self,
        logits: Tensor,
        target: Tensor,
        teacher: TeacherOutputs,
        guide_logits: Tensor | None,
        feature_error: Tensor | None,
    ) -> GuidedFeatureTerms:
        """Evaluate (6) and the guide's loss per sample."""
        return guided_feature_terms(
            self.disk,
            logits,
            teacher[0],
            target,
            teacher[1],
            cast(Tensor, feature_error),
            weight=self._feature_weight,
            feature_weight=self.distill_loss_weight,
            guide_logits=guide_logits,
            reduction="none",
        )
