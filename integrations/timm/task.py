"""DiSK as timm's training tasks: on logits, and as the weight of any other distillation method."""

from .guided_task import GuidedTask


class DiSKTask(GuidedTask):
    r"""Distilling Scaffolded Knowledge, Kag et al. (ICLR 2023), eq. (5), as a task of timm >= 1.0.27.

    $$w_{task}\,criterion(s) + w_{distill}\,L_{dist}(s, g)
    + \lambda\,\Big(\tfrac1N\sum_i g_i CE_i - \delta\Big)_+$$

    is timm's ``LogitDistillationTask`` with the scaffold and the budget; weights and ``temperature`` mean what they
    mean there. The criterion is the host's, with its smoothing and soft targets; the budget's CE is the plain one, on
    the argmax of a soft target. *Joint*: the guide is part of ``get_trainable_module()`` and so of the host's
    optimizer, DDP and clipping. *Alternating*: Algorithm 1, the guide has its own optimizer, see ``run_guide_passes``.
    Validation, EMA and checkpoints know the bare student alone; ``task_state`` holds the guide and its schedule.

    With a ``method`` it is eq. (6), A.7, for any of them:

    $$w_{task}\,criterion(p) + w_{distill}\,\tfrac1N\sum_i w(g_i)\,\ell_i$$

    with the method's losses per sample and the guide's loss of its prediction p. Of a method with a prediction of its
    own (the teacher's head on a projected map, say) what is validated, averaged and saved is a ``MethodModel``,
    without which the student cannot predict. A method by itself has ``weight="uniform"``.

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
        method: a name in ``disk_plugin.features.METHODS``, a ``Method`` class or one that is built; None for DiSK.
        method_settings: keywords of the method's class; a cross-entropy of its own is 0 by default, as the
            criterion is one.
        weight: what weighs a sample, one of ``FEATURE_WEIGHTS``.
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
            a pair that the method cannot use; values out of range.
        TypeError: unknown keywords.
    """
