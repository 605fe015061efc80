"""A training script with the names and contracts that DiSK's launcher relies on in timm's train.py, and little else.

It trains on random images held in memory, with timm's own task, optimizer, schedule, EMA and checkpoints.
"""

import argparse
import logging
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from timm import utils
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import LogitDistillationTask, load_task_ema_checkpoint, resume_task_checkpoint

_logger = logging.getLogger("train")

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument("-c", "--config", default="")
parser = argparse.ArgumentParser(description="stand-in")
for name, default in {
    "model": "test_vit",
    "kd-model-name": None,
    "kd-loss-type": "kl",
    "initial-checkpoint": "",
    "resume": "",
    "output": "out",
    "experiment": "run",
    "val-split": "",  # there is nothing to validate on
    "opt": "sgd",
}.items():
    parser.add_argument(f"--{name}", default=default)
parser.add_argument("--kd-distill-type", default="logit", choices=["logit", "feature", "token"])
for name in ("mean", "std"):
    parser.add_argument(f"--{name}", type=float, nargs="+")
for name, default in {"num-classes": 5, "img-size": 32, "epochs": 2, "cooldown-epochs": 0, "seed": 42}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
for name, default in {
    "kd-temperature": 4.0,
    "task-loss-weight": None,
    "distill-loss-weight": None,
    "smoothing": 0.1,
    "clip-grad": None,
    "lr": 0.05,
    "momentum": 0.9,
    "weight-decay": 0.0,
}.items():
    parser.add_argument(f"--{name}", type=float, default=default)
for name in ("bce-loss", "jsd-loss", "naflex-loader", "torchscript", "model-ema", "no-resume-opt"):
    parser.add_argument(f"--{name}", action="store_true")


def _parse_args():
    config, remaining = config_parser.parse_known_args()
    if config.config:
        parser.set_defaults(**yaml.safe_load(Path(config.config).read_text()))
    args = parser.parse_args(remaining)
    return args, yaml.safe_dump(vars(args))


def main():
    utils.setup_default_logging()
    args, args_text = _parse_args()
    args.rank = args.local_rank = 0
    args.prefetcher, args.channels_last, args.sched, args.distributed = False, False, "cosine", False
    utils.random_seed(args.seed, 0)
    model = create_model(
        args.model, num_classes=args.num_classes, checkpoint_path=args.initial_checkpoint, img_size=args.img_size
    )
    task = LogitDistillationTask(
        student_model=model,
        teacher_model=args.kd_model_name,
        criterion=torch.nn.CrossEntropyLoss(label_smoothing=args.smoothing),
        loss_type=args.kd_loss_type,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        temperature=args.kd_temperature,
        device=torch.device("cpu"),
        dtype=None,
        verbose=True,
    )
    model = task.get_trainable_module()
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    carried = None if args.no_resume_opt else optimizer
    start = resume_task_checkpoint(task, args.resume, optimizer=carried) if args.resume else 0
    if args.model_ema:
        task.setup_ema(decay=0.9)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    folder = Path(args.output, args.experiment)
    folder.mkdir(parents=True)
    (folder / "args.yaml").write_text(args_text)
    keywords = {"checkpoint_dir": str(folder), "decreasing": True, "task": task}
    saver = utils.CheckpointSaver(model, optimizer, args=args, **keywords)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=2)
    scheduler.step(start)
    for epoch in range(start, epochs):
        # what a resumed run draws depends on the epoch alone
        generator = torch.Generator().manual_seed(epoch)
        size = (8, 3, args.img_size, args.img_size)
        loader = [
            (torch.randn(size, generator=generator), torch.randint(args.num_classes, (8,), generator=generator))
            for _ in range(2)
        ]
        metrics = train_one_epoch(
            epoch,
            model,
            loader,
            optimizer,
            args,
            task=task,
            device=torch.device("cpu"),
            amp_autocast=nullcontext,
            model_dtype=None,
            mixup_fn=None,
        )
        scheduler.step(epoch + 1)
        utils.update_summary(epoch, metrics, None, filename=folder / "summary.csv", write_header=epoch == start)
        saver.save_checkpoint(epoch, metric=metrics["loss"])


def train_one_epoch(epoch, model, loader, optimizer, args, task=None, **_):
    task.get_trainable_module().train()
    losses = []
    for update, (image, target) in enumerate(loader):
        optimizer.zero_grad()
        clipped = task.get_clip_parameters() if args.clip_grad else None
        loss = task(image, target)["loss"]
        loss.backward()
        if clipped is not None:
            utils.dispatch_clip_grad(clipped, value=args.clip_grad)
        optimizer.step()
        task.update_ema(step=epoch * len(loader) + update + 1)
        losses.append(loss.item())
    return OrderedDict([("loss", sum(losses) / len(losses))])


if __name__ == "__main__":
    main()
