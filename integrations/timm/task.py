"""DiSK as timm's training tasks: on logits, and as the weight of any other distillation method."""

from .guided_task import GuidedTask


class DiSKTask(GuidedTask):
    r"""Distilling Scaffolded Knowledge, Kag et al. (ICLR 2023), eq. (5), as a task of timm >= 1.0.27.

    It is timm's ``LogitDistillationTask`` with the scaffold and the bound of g, here the paper's budget:

    $$w_{task}\,criterion(s) + w_{distill}\,L_{dist}(s, g)
    + \lambda\,\Big(\tfrac1N\sum_i g_i CE_i - \delta\Big)_+$$

    Weights and ``temperature`` mean what they mean in timm. The criterion is the host's, with its smoothing and soft
    targets; the budget's CE is the plain one, to the argmax of a soft target.

    - *Joint*: the guide is part of ``get_trainable_module()``, and so of the host's optimizer, DDP and clipping.
    - *Alternating*: Algorithm 1; the guide has its own optimizer, see ``run_guide_passes``.

    Validation, EMA and checkpoints have the bare student; ``task_state`` holds the guide and its schedule.

    With a ``method`` it is eq. (6), A.7, for that method's losses per sample, and the guide's loss of its prediction p:

    $$w_{task}\,criterion(p) + w_{distill}\,\tfrac1N\sum_i w(g_i)\,\ell_i$$

    For a method that predicts (by the teacher's head on a projected map, for example), a ``MethodModel`` is validated,
    averaged and saved, as the student alone cannot predict. ``weight="uniform"`` is the method alone.

    The hinge is over one micro-batch of all ranks. Under gradient accumulation the mean gradient is that of the full
    batch if all micro-batches are within the budget or all exceed it, and differs otherwise.

    Args:
        student_model: the student, a timm model; it must return logits in training mode.
        teacher_model: a name, a module, or timm's ``DistillationTeacher``; it is frozen. It reads images normalised
            with the mean and std of its ``pretrained_cfg`` (if it was trained with others:
            ``create_model(..., pretrained_cfg_overlay={"mean": ...})``), or of the ``DistillationTeacher``; if neither
            has any, ImageNet's.
        criterion: the task's loss; None for cross-entropy.
        epochs: number of epochs that the schedules span. None for a constant ``discount``, or a constant ``multiplier``
            and ``budget``, which a loaded checkpoint overrides; an ``"auto"`` discount would stay 0.
        mode: ``"joint"`` or ``"alternating"``.
        guide: keywords of ``GuideHead``, and ``use_features`` (default True): whether the teacher's pre-logits are a
            second input beside its logits. Or a module, which gets both if it takes two inputs.
        dual: keywords of ``DualScheduler``; its ``budget`` defaults to the loss's.
        alternating: keywords of ``Recipe``.
        method: a name in ``disk_plugin.features.METHODS``, a ``Method`` class or a built ``Method``; None for DiSK.
        method_settings: keywords of the method's class; its own cross-entropy has weight 0 by default, as there is the
            criterion.
        weight: how the guide weights a sample, one of ``FEATURE_WEIGHTS``.
        input_size: (C, H, W) of the training images; None for the size that the student was built for.
        input_mean: mean that the images are normalised with, one value or one per channel; None for the student's
            ``pretrained_cfg``. The teacher gets them normalised as its own were.
        input_std: their standard deviation, likewise.
        allow_fresh_guide: whether a checkpoint without a guide may be resumed, with an untrained guide.
        **settings: those of timm's ``LogitDistillationTask`` (``task_loss_weight``, ``distill_loss_weight``,
            ``device``, ...) and of ``DiSKLoss`` (``top_k``, ``budget``, ``variant``, ...), whose ``ce_weight`` and
            ``distill_weight`` are other names of the two weights.

    Attributes:
        disk: the ``DiSKLoss``.
        dual: its ``DualScheduler``, or None. Call ``dual.step()`` after each epoch, or ``begin_epoch`` before and
            ``end_epoch`` after it. In alternating mode a step is an outer iteration of Algorithm 1, ``student_passes``
            epochs: there use those two methods, which count them.

    Raises:
        ValueError: a criterion with a sigmoid per class (BCE), or over several views (JSD); a teacher with other
            classes or another image size; a guide of other widths; a student that returns two predictions; a pair that
            the method cannot use; values out of range.
        TypeError: unknown keywords.
    """
