"""What the adapter asks of the two models and of the Trainer around them."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from disk_plugin.taps import FeatureTap


def check_trainer(trainer: Any) -> None:
    """Raise ValueError for what cannot train beside a guide: sharded models, another loss."""
    flags = "is_fsdp_enabled", "is_fsdp_xla_enabled", "is_deepspeed_enabled"
    sharded = [name for name in (*flags, "is_distributed_loading_by_transformers") if getattr(trainer, name, False)]
    if sharded:
        raise ValueError(
            f"the guide is outside the model, where sharded training would neither shard nor save it: use DDP "
            f"(torchrun), got {sharded}"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func must be None: the training loss is the distillation's, give it as loss")


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError for a problem without a softmax and for classifiers of other labels."""
    configs: list[Any] = [getattr(model, "config", None) for model in (student, teacher)]
    for config in configs:
        problem = getattr(config, "problem_type", None)
        if problem in ("regression", "multi_label_classification"):
            raise ValueError(f"problem_type must be single_label_classification, got {problem}: there is no softmax")
    if not all("Classification" in type(model).__name__ for model in (student, teacher)) or None in configs:
        return
    mine, theirs = (config.num_labels for config in configs)
    if mine != theirs:
        raise ValueError(f"the teacher must have the student's num_labels {mine}, got {theirs}")
    mine, theirs = (dict(config.label2id) for config in configs)
    if mine != theirs and mine.keys() == theirs.keys():
        moved = sorted(name for name in mine if mine[name] != theirs[name])[:3]
        raise ValueError(f"the teacher must have the student's order of labels, got another label2id of {moved}")


def is_causal(trainer: Any, model: nn.Module) -> bool:
    """Whether position i predicts label i + 1, as the Trainer itself finds out."""
    bare = trainer.accelerator.unwrap_model(model)
    bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare  # of an adapter by peft
    shifts = getattr(trainer, "_loss_shifts_labels", False)
    return bool(shifts or type(bare).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that a model has arguments for, as the Trainer does for the student's."""
    parameters = inspect.signature((model.model if isinstance(model, FeatureTap) else model).forward).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name in parameters}


def places_itself(model: nn.Module) -> bool:
    """Whether a model was spread over devices, or quantized, when it was loaded."""
    return getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
