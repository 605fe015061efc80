"""Multi-process DiSK: the student in DistributedDataParallel, the loss outside it; digits, gloo on CPUs.

Each step takes two micro-batches per rank and has the gradient of the whole batch: one hinge, one guide.

Usage: torchrun --nproc_per_node 2 examples/torchrun.py [--dry-run]  (python examples/torchrun.py is one process)
"""

import argparse
import gc
from contextlib import nullcontext

import digits
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from disk_plugin import DiSKLoss, DualScheduler, GuideHead
from disk_plugin.accumulation import AccumulatedBatch
from disk_plugin.distributed import attach, share_statistics
from disk_plugin.schedule import estimate_budget
from disk_plugin.taps import with_features

MICRO_BATCHES = 2  # per step and rank
STEP_SIZE = 96  # samples per step, over all ranks


def start() -> None:
    """Initialize the process group of torchrun, or of a single process."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def train(student: nn.Module, teacher: nn.Module, disk: DiSKLoss, split: digits.Split, epochs: int):
    """The loop; lines needed only for several ranks have a comment."""
    dataset = TensorDataset(*split)
    sampler = DistributedSampler(dataset, drop_last=True)  # equally many batches on each rank
    micro_size = STEP_SIZE // MICRO_BATCHES // dist.get_world_size()
    loader = DataLoader(dataset, micro_size, sampler=sampler, drop_last=True)
    dual = DualScheduler(disk, epochs=epochs)
    model = DistributedDataParallel(student)  # freed before the process group: gloo's threads may abort otherwise
    optimizer = torch.optim.SGD([*student.parameters(), *disk.parameters()], lr=0.1, momentum=0.9)
    whole = AccumulatedBatch(disk)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for micro_batches in zip(*[iter(loader)] * MICRO_BATCHES, strict=False):
            optimizer.zero_grad()
            for number, (x, y) in enumerate(micro_batches, start=1):
                last = number == MICRO_BATCHES
                with nullcontext() if last else model.no_sync():  # one all-reduce of the student's gradients
                    with torch.no_grad():
                        teacher_logits, teacher_features = teacher(x)
                    loss = whole.add(model(x), teacher_logits, y, teacher_features)
                    (loss / MICRO_BATCHES).backward()
            whole.terms().guide_loss.backward()
            clip_grad_norm_(student.parameters(), 1.0)
            clip_grad_norm_(disk.parameters(), 1.0)
            optimizer.step()
        share_statistics(disk)  # same statistics for all schedulers
        usage = disk.statistics().usage
        dual.step()
    return usage


def guides_differ(disk: DiSKLoss) -> float:
    """Return the largest difference between two ranks' guides over all parameters."""
    largest = nn.utils.parameters_to_vector(disk.parameters()).detach()
    smallest = largest.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return (largest - smallest).max().item()


def main() -> None:
    """Teacher, warm start, DiSK; rank 0 reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="two epochs of each")
    epochs = {"teacher": 40, "warm": 30, "student": 60}
    if parser.parse_args().dry_run:
        epochs = dict.fromkeys(epochs, 2)
    start()
    splits = digits.splits()
    teacher = with_features(digits.trained_teacher(splits["train"], epochs["teacher"]))
    student = digits.warm_student(splits["train"], epochs["warm"], seed=0)
    budget = estimate_budget(student, [splits["validation"]])
    torch.manual_seed(dist.get_rank())  # attach broadcasts rank 0's guide, whatever the seed
    disk = DiSKLoss(GuideHead(digits.NUM_CLASSES, teacher.feature_dim), budget=budget)
    attach(disk)  # one hinge and one guide for all
    usage = train(student, teacher, disk, splits["train"], epochs["student"])
    difference = guides_differ(disk)
    if dist.get_rank() == 0:
        accuracy = digits.accuracy(student, splits["validation"])
        print(
            f"{dist.get_world_size()} processes: validation accuracy {accuracy:.1f}, usage {usage:.3f} of a budget of "
            f"{budget:.3f}; the guides differ by {difference:g}"
        )
    gc.collect()  # DistributedDataParallel is in a reference cycle, and has to be freed before the group
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
