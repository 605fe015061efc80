"""CIFD's published settings as plain dicts to unpack; each value is marked "paper" or "ours".

``p = presets.IMAGENET_RESNET34_RESNET18``, then ``rdms = fit_rdms(cache, targets=..., **p["fit"])`` and
``CIFD(student_dim, teacher_dim, rdms=rdms, **p["method"])``; ``p["recipe"]`` is the rest of the training recipe.
"Paper" is CIFD (NeurIPS 2024) with its appendix; where it is silent, the value is ours. None of the ImageNet recipes
has been run by us.
"""

from typing import Any

Preset = dict[str, dict[str, Any]]

CIFAR100: Preset = {  # the standard pairs of RepDistiller and mdistiller
    "fit": {
        "distortion_weights": (1.0, 0.8, 0.6),  # paper, A.1.2
        "reduction": "sum",  # ours: a mean would close the channel at these R
        "distortion": "mse",  # paper, eq. (4)
        "epochs": 30,  # paper, A.1.2
        "ce_weight": 1.0,  # paper, eq. (5)
        "kl_weight": 1.0,  # ours
        "temperature": 2.0,  # ours: the student's
        "lr": 2e-3,  # ours
        "batch_size": 256,  # ours
    },
    "method": {
        "ce_weight": 1.0,  # paper, A.1.2
        "kl_weight": 1.0,  # paper, A.1.2
        "rdm_weights": (1.0,),  # paper, A.1.2: all 1
        "temperature": 2.0,  # paper, A.1.2
        "embedding_weight": 100.0,  # paper, A.1.2
        "distortion": "mse",  # paper, eq. (8); its mean over the width is ours
        "rate_weight": 0.005,  # paper, A.1.2; tried .001, .005, .01
        "dropout": 0.25,  # paper, A.1.2
        "gain": 1.0,  # paper
    },
    "recipe": {
        "optimizer": "sgd",  # paper, A.1.2
        "lr": 0.05,  # paper, A.1.2
        "lr_decay_epochs": (150, 160, 180),  # paper, A.1.2, as printed
        "lr_decay_rate": 0.1,  # paper, A.1.2
        "epochs": 240,  # paper, A.1.2
        "batch_size": 64,  # ours: RepDistiller's
        "momentum": 0.9,  # ours: RepDistiller's
        "weight_decay": 5e-4,  # ours: RepDistiller's
    },
}

_IMAGENET_FIT: dict[str, Any] = {
    "distortion_weights": (1e4, 5e3, 1e3),  # paper, A.2
    "reduction": "mean",  # ours: a sum would leave the channel open at these R
    "distortion": "smooth_l1",  # paper, A.2
    "held_out": 0.05,  # paper, A.2
    "epochs": 30,  # paper, A.2
    "ce_weight": 1.0,  # paper, eq. (5)
    "kl_weight": 1.0,  # ours
    "temperature": 2.0,  # ours: the student's
    "lr": 2e-3,  # ours
    "batch_size": 1024,  # ours
}
_IMAGENET_METHOD: dict[str, Any] = {
    "ce_weight": 1.0,  # paper, A.2
    "kl_weight": 1.0,  # paper, A.2
    "rdm_weights": (1.0,),  # paper, A.2: all 1
    "temperature": 2.0,  # paper, A.2
    "embedding_weight": 100.0,  # paper, A.2
    "distortion": "smooth_l1",  # paper, A.2; its mean over the width is ours
    "rate_weight": 0.001,  # paper, A.2
    "dropout": 0.25,  # paper, A.2
    "gain": 1.0,  # paper
}
_IMAGENET_RECIPE: dict[str, Any] = {
    "optimizer": "sgd",  # paper, A.2
    "lr": 2.0,  # paper, A.2
    "batch_size": 4096,  # paper, A.2: 4 x 1024
    "weight_decay": 5e-5,  # paper, A.2
    "epochs": 88,  # paper, A.2
    "momentum": 0.9,  # ours: FFCV's default
    "warmup_epochs": 2,  # ours: FFCV's default
    "label_smoothing": 0.1,  # ours: FFCV's default; the paper does not say whether it kept it
}

IMAGENET_RESNET34_RESNET18: Preset = {
    "fit": {**_IMAGENET_FIT, "hidden_dim": 512},  # paper, A.2
    "method": _IMAGENET_METHOD,
    "recipe": {**_IMAGENET_RECIPE, "teacher": "resnet34", "student": "resnet18"},  # paper
}

IMAGENET_RESNET50_MOBILENETV1: Preset = {
    "fit": {**_IMAGENET_FIT, "hidden_dim": 1024},  # paper, A.2; a last layer back to 2048 is ours
    "method": _IMAGENET_METHOD,
    "recipe": {**_IMAGENET_RECIPE, "teacher": "resnet50", "student": "mobilenetv1"},  # paper
}

CLIP: Preset = {  # for each modality: fit_rdms(Embeddings(features)), EmbeddingLoss, both in ContrastiveCIFD
    "fit": {
        "distortion_weights": (1e4, 5e3, 1e3),  # ours: the paper does not say
        "reduction": "mean",  # ours
        "distortion": "mse",  # paper, eq. (4)
        "epochs": 7,  # paper, A.3
        "nonnegative": False,  # ours: CLIP's embeddings have both signs
    },
    "method": {
        "embedding_weight": 100.0,  # ours: that of the classifiers
        "distortion": "mse",  # paper, eq. (8)
        "rate_weight": 0.001,  # ours: the paper chose one of four that it does not print
    },
    "contrastive": {
        "contrastive_weight": 0.005,  # paper, A.3; tried .0005
    },
    "recipe": {
        "batch_size": 1024,  # paper, A.3: 4 x 256
        "lr": 1e-3,  # paper, A.3
        "epochs": 32,  # paper, A.3, of 3 M pairs
    },
}
