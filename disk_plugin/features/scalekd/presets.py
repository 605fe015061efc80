"""ScaleKD's published pairs as plain dicts to unpack; each value is marked "paper", "authors' code" or "ours".

``p = presets.PAIRS["swin_large -> resnet50"]``, then ``ScaleKD.for_pair(pair, **p["method"])``; ``p["recipe"]`` is the
rest of the training recipe, ``p["models"]`` are names in timm with the settings that ``create_model`` needs for 224
pixels, and ``p["top1"]`` the accuracies on ImageNet-1K. "Paper" is ScaleKD (NeurIPS 2024), "authors' code" its public
repository. The authors' weights are sums over locations, ours means: they are multiplied by the number of locations.
Guided by DiSK, its own loss takes the place of ``ce_weight`` and ``kd_weight``. We have run none of these recipes.
"""

from typing import Any

Preset = dict[str, dict[str, Any]]

_SWIN_METHOD: dict[str, Any] = {
    "ce_weight": 0.5,  # authors' code: 1 - a
    "kd_weight": 0.5,  # authors' code: a
    "temperature": 1.0,  # authors' code
    "original_weight": 0.08 * 49,  # authors' code
    "dc_removed_weight": 0.06 * 49,  # authors' code
    "proxy_weight": 1.0,  # authors' code
    "proxy_heads": 8,  # authors' code
    "main_heads": 8,  # authors' code
    "attention_scale": 5.0,  # authors' code
    "norm": "batch",  # authors' code
}
_EVA_METHOD: dict[str, Any] = {
    **_SWIN_METHOD,
    "original_weight": 0.016 * 256,  # authors' code
    "dc_removed_weight": 0.008 * 256,  # authors' code
    "attention_scale": 1.0,  # authors' code
    "tail_blocks": 2,  # authors' code
    "tail_final_blocks": 0,  # authors' code
}
_CNN_RECIPE: dict[str, Any] = {
    "optimizer": "lamb",  # authors' code
    "lr": 5e-3,  # authors' code
    "weight_decay": 0.02,  # authors' code
    "batch_size": 2048,  # authors' code: 32 x 64
    "epochs": 300,  # authors' code
    "warmup_epochs": 5,  # authors' code
    "schedule": "cosine",  # authors' code
    "rand_augment": "rand-m7-n2-mstd0.5",  # authors' code
    "random_erasing": 0.25,  # authors' code
    "clip_grad": 5.0,  # authors' code
    "task_loss": "bce",  # authors' code; with DiSK's guide a cross-entropy is needed
}
_MOBILENET_RECIPE: dict[str, Any] = {
    **_CNN_RECIPE,
    "lr": 2e-3,  # authors' code, a configuration that was deleted later
    "weight_decay": 0.004,  # authors' code, likewise
    "task_loss": "ce",  # authors' code
    "label_smoothing": 0.1,  # authors' code
}
_VIT_RECIPE: dict[str, Any] = {
    "optimizer": "adamw",  # authors' code
    "lr": 1e-3,  # authors' code
    "weight_decay": 0.05,  # authors' code; none on norms, biases and positions
    "batch_size": 512,  # authors' code: 16 each, on the 32 GPUs of its README; a comment has 1024
    "epochs": 300,  # authors' code
    "warmup_epochs": 20,  # authors' code
    "schedule": "cosine",  # authors' code
    "min_lr": 1e-5,  # authors' code
    "rand_augment": "rand-m9-mstd0.5",  # authors' code
    "random_erasing": 0.25,  # authors' code
    "clip_grad": 5.0,  # authors' code
    "ema": 1e-4,  # authors' code, as momentum of the new weights
    "task_loss": "ce",  # authors' code
    "label_smoothing": 0.1,  # authors' code
}
_SWIN, _EVA = "swin_large_patch4_window7_224", "eva_large_patch14_196"


def _pair(
    teacher: str,
    student: str,
    top1: tuple[float, float],
    method: dict[str, Any],
    recipe: dict[str, Any],
    **student_settings: int,
) -> Preset:
    models: dict[str, Any] = {"teacher": teacher, "student": student, "image_size": 224}  # ours: timm's names
    teacher_settings = {"img_size": 224} if teacher == _EVA else {}  # ours: timm's model is for 196
    models |= {"teacher_settings": teacher_settings, "student_settings": student_settings}
    published = {"baseline": top1[0], "scalekd": top1[1]}  # paper, Table 3
    return {"models": models, "method": method, "recipe": recipe, "top1": published}


PAIRS: dict[str, Preset] = {
    "swin_large -> mobilenetv1": _pair(
        _SWIN,
        "mobilenetv1_100",  # ours: timm's name
        (72.10, 75.15),  # paper
        {**_SWIN_METHOD, "proxy_heads": 16, "main_heads": 24},  # authors' code
        _MOBILENET_RECIPE,
    ),
    "swin_large -> resnet50": _pair(
        _SWIN,
        "resnet50d",  # authors' code: its student is ResNetV1d-50; the paper's table names ResNet-50
        (78.64, 82.03),  # paper
        {**_SWIN_METHOD, "proxy_heads": 16, "main_heads": 24},  # authors' code
        _CNN_RECIPE,
    ),
    "swin_large -> convnext_tiny": _pair(
        _SWIN,
        "convnext_tiny",  # ours: timm's name
        (82.14, 84.16),  # paper
        {**_SWIN_METHOD, "proxy_heads": 8, "main_heads": 16, "attention_scale": 1.0},  # authors' code
        _VIT_RECIPE,  # ours: its own was not found
    ),
    "swin_large -> mixer_s16": _pair(
        _SWIN,
        "mixer_s16_224",  # ours: timm's name
        (74.02, 78.63),  # paper
        _SWIN_METHOD,
        _VIT_RECIPE,  # ours: its own was not found
    ),
    "swin_large -> mixer_b16": _pair(
        _SWIN,
        "mixer_b16_224",  # ours: timm's name
        (76.44, 81.96),  # paper
        _SWIN_METHOD,
        _VIT_RECIPE,  # ours: its own was not found
    ),
    "swin_large -> vit_s16": _pair(
        _SWIN,
        "deit_small_patch16_224",  # ours: timm's name
        (79.90, 83.93),  # paper
        _SWIN_METHOD,
        _VIT_RECIPE,  # ours: its own was not found
    ),
    "swin_large -> swin_tiny": _pair(
        _SWIN,
        "swin_tiny_patch4_window7_224",  # ours: timm's name
        (81.18, 83.80),  # paper
        {**_SWIN_METHOD, "proxy_heads": 24, "main_heads": 48, "attention_scale": 1.0, "norm": "layer"},  # authors' code
        _VIT_RECIPE,  # ours: its own was not found
    ),
    "swin_large -> vit_b16": _pair(
        _SWIN,
        "deit_base_patch16_224",  # ours: timm's name
        (81.80, 85.53),  # paper
        _SWIN_METHOD,
        _VIT_RECIPE,
    ),
    "eva_large -> resnet50": _pair(
        _EVA,
        "resnet50d",  # ours: as from Swin-L
        (78.64, 82.34),  # paper
        {**_EVA_METHOD, "attention_scale": 0.2},  # authors' code
        _CNN_RECIPE,  # ours: its own was not found
    ),
    "eva_large -> mixer_b14": _pair(
        _EVA,
        "mixer_b16_224",  # ours: timm has none with patches of 14, but MlpMixer(patch_size=14, embed_dim=768)
        (76.62, 82.89),  # paper
        _EVA_METHOD,
        _VIT_RECIPE,  # ours: its own was not found
    ),
    "eva_large -> vit_b14": _pair(
        _EVA,
        "deit_base_patch16_224",  # ours: timm has none with patches of 14
        (82.02, 86.43),  # paper
        _EVA_METHOD,
        _VIT_RECIPE,  # ours: its own was not found
        patch_size=14,  # paper
    ),
}

CIFAR100: Preset = {  # ours altogether: the paper has none; ResNet32x4 and the like, whose maps are 16 x 16 and 8 x 8
    "method": {
        "ce_weight": 0.5,  # authors' code, on ImageNet
        "kd_weight": 0.5,  # authors' code, on ImageNet
        "temperature": 1.0,  # authors' code, on ImageNet
        "original_weight": 4.0,  # ours: about the authors', per location
        "dc_removed_weight": 3.0,  # ours: about the authors', per location
        "proxy_heads": 8,  # ours
        "main_heads": 8,  # ours
        "attention_scale": 5.0,  # authors' code, on ImageNet
        "norm": "batch",  # authors' code
    },
    "recipe": {
        "optimizer": "sgd",  # ours: mdistiller's
        "lr": 0.05,  # ours: mdistiller's
        "batch_size": 64,  # ours: mdistiller's
        "epochs": 240,  # ours: mdistiller's
        "momentum": 0.9,  # ours: mdistiller's
        "weight_decay": 5e-4,  # ours: mdistiller's
    },
}
