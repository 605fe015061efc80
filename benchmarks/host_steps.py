"""A training step with DiSK inside a host's own loop, against the host's plain KD: same student, teacher, batch, SGD.

resnet50 -> resnet18, 1000 classes, random weights and images. Lightning: a whole step of ``Trainer.fit``, with
``DiSKCallback`` or with a ``training_step`` of plain KD. torchdistill: ``forward_process`` and
``post_forward_process``, with the criterion's term ``DiSK`` or its own ``KDLoss``; the teacher is in evaluation mode in
both, which the host leaves to its user. transformers: ``training_step`` and what the Trainer does after it, with
``DiSKTrainer`` or with a ``compute_loss`` of plain KD.

Usage: python benchmarks/host_steps.py [--host NAME,NAME] [--pairs N] [--image-size N] [--dry-run]
"""

import argparse
import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pairs import compare, keep, results, row, table
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset
from torchvision.models import resnet18, resnet50

TEMPERATURE = 4.0
Step = Callable[[], None]


def tiny() -> nn.Module:
    """Return a model for the dry run."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))


def lightning_steps(student: nn.Module, teacher: nn.Module, image: Tensor, target: Tensor) -> tuple[Step, Step, str]:
    """Return a step with DiSK and one of plain KD, each of a ``Trainer`` in a thread of its own."""
    import lightning

    from disk_plugin.integrations.lightning import DiSKCallback

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(student).train()

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                teacher_logits = teacher(batch[0])
            log_probs, soft = ((each / TEMPERATURE).log_softmax(-1) for each in (self(batch[0]), teacher_logits))
            return kl_div(log_probs, soft, reduction="batchmean", log_target=True) * TEMPERATURE**2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    class OneByOne(lightning.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

        def on_train_batch_start(self, *_: Any) -> None:
            self.go.acquire()

        def on_train_batch_end(self, *_: Any) -> None:
            self.done.release()

        def step(self) -> None:
            self.go.release()
            self.done.acquire()

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}
    batches = DataLoader([(image, target)] * 10_000, batch_size=None)  # type: ignore[arg-type]

    def begun(callbacks: list[Any]) -> Step:
        turns = OneByOne()
        trainer = lightning.Trainer(callbacks=[*callbacks, turns], **quiet)
        threading.Thread(target=trainer.fit, args=(Module(), batches), daemon=True).start()
        return turns.step

    return begun([DiSKCallback(teacher, temperature=TEMPERATURE)]), begun([]), f"lightning {lightning.__version__}"


def torchdistill_steps(student: nn.Module, teacher: nn.Module, image: Tensor, target: Tensor) -> tuple[Step, Step, str]:
    """Return a step with DiSK and one of plain KD, each of a box of its own."""
    import torchdistill
    from torchdistill.core.distillation import get_distillation_box

    import disk_plugin.integrations.torchdistill  # noqa: F401

    paths = {"student_module_path": ".", "student_module_io": "output"}
    paths |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    terms = {
        "disk": {"key": "DiSK", "kwargs": {"num_classes": 1000, "loss": {"temperature": TEMPERATURE}}},
        "default": {"key": "KDLoss", "kwargs": {**paths, "temperature": TEMPERATURE, "alpha": 1.0}},
    }

    def box_of(name: str) -> Any:
        ending = "" if name == "disk" else "_with_teacher"
        sampler = {"class_or_func": SequentialSampler, "kwargs": None}
        loader = {"dataset_id": "data", "sampler": sampler, "kwargs": {"batch_size": len(image)}}
        model = {"forward_proc": "forward_batch_only", "sequential": []}
        config = {
            "num_epochs": 1,
            "train_data_loader": copy.deepcopy(loader),
            "val_data_loader": copy.deepcopy(loader),
            "teacher": {**model, "requires_grad": False},
            "student": model,
            "optimizer": {"key": "SGD", "kwargs": {"lr": 1e-3, "momentum": 0.9}},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {name: {"criterion": terms[name], "weight": 1.0}}},
            },
        }
        config |= {f"{when}_epoch_process": f"{name}_{when}_epoch_process{ending}" for when in ("pre", "post")}
        data = {"data": TensorDataset(image, target)}
        pair = copy.deepcopy(teacher), copy.deepcopy(student)
        box = get_distillation_box(*pair, data, config, torch.device("cpu"), None, False, 1)
        box.pre_epoch_process(epoch=0)
        box.teacher_model.eval()
        return box

    def stepper(box: Any) -> Step:
        def step() -> None:
            box.post_forward_process(loss=box.forward_process(image, target, {}))

        return step

    return stepper(box_of("disk")), stepper(box_of("default")), f"torchdistill {torchdistill.__version__}"


def transformers_steps(student: nn.Module, teacher: nn.Module, image: Tensor, target: Tensor) -> tuple[Step, Step, str]:
    """Return a step with DiSK and one of plain KD, each of a ``Trainer`` that has begun."""
    import tempfile

    import transformers

    from disk_plugin.integrations.transformers import DiSKTrainer

    class Classifier(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.net(pixel_values)}

    class KDTrainer(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            pixels = {"pixel_values": inputs["pixel_values"]}
            with torch.no_grad():
                teacher_logits = frozen(**pixels)["logits"]
            both = model(**pixels)["logits"], teacher_logits
            log_probs, soft = ((each / TEMPERATURE).log_softmax(-1) for each in both)
            return kl_div(log_probs, soft, reduction="batchmean", log_target=True) * TEMPERATURE**2

    frozen = Classifier(teacher).eval().requires_grad_(False)
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    quiet |= {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.0}
    rate = {"optim": "sgd", "learning_rate": 1e-3, "optim_args": "momentum=0.9"}
    data = [{"pixel_values": each, "labels": int(label)} for each, label in zip(image[:4], target[:4], strict=True)]

    def begun(kind: type[Any], **own: Any) -> Step:
        args = transformers.TrainingArguments(output_dir=tempfile.mkdtemp(), **quiet, **rate)
        trainer = kind(model=Classifier(student), args=args, train_dataset=data, **own)
        trainer.train()
        handler, state = trainer.callback_handler, (trainer.args, trainer.state, trainer.control)

        def step() -> None:
            batch = {"pixel_values": image, "labels": target}
            trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
            trainer.training_step(trainer.model_wrapped, batch)
            trainer.optimizer.step()
            trainer.model.zero_grad()
            handler.on_step_end(*state)

        return step

    ours = begun(DiSKTrainer, teacher=Classifier(teacher), temperature=TEMPERATURE)
    return ours, begun(KDTrainer), f"transformers {transformers.__version__}"


HOSTS = {"lightning": lightning_steps, "torchdistill": torchdistill_steps, "transformers": transformers_steps}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default=",".join(HOSTS), help="names, separated by commas")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--out", type=Path, help="folder for host_steps.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny models and images, six pairs")
    args = parser.parse_args()
    size, batch, pairs = (8, 4, 6) if args.dry_run else (args.image_size, args.batch_size, args.pairs)
    torch.manual_seed(0)
    teacher, student = (tiny(), tiny()) if args.dry_run else (resnet50(), resnet18())
    teacher.eval()
    image, target = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    rows, versions = [], []
    for name in args.host.split(","):
        ours, theirs, version = HOSTS[name](student, teacher, image, target)
        rows.append(row(f"DiSK / plain KD in {name}", compare(ours, theirs, pairs=pairs), 1.05))
        versions.append(version)
    found = results(rows, f"resnet50 -> resnet18, {size} px, batch {batch}, {', '.join(versions)}")
    print(table(found))
    keep(found, args.out, "host_steps")


if __name__ == "__main__":
    main()
