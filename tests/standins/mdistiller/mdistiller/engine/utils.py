import numpy as np
import torch
from torch.nn.functional import cross_entropy


class AverageMeter:
    def __init__(self):
        self.sum = self.count = self.avg = 0

    def update(self, value, n=1):
        self.sum, self.count = self.sum + value * n, self.count + n
        self.avg = self.sum / self.count


def log_msg(msg, mode="INFO"):
    return f"[{mode}] {msg}"


def accuracy(output, target, topk=(1,)):
    ranked = output.topk(max(topk), 1).indices
    return [(ranked[:, :k] == target[:, None]).any(1).float().mean(0, keepdim=True) * 100 for k in topk]


def validate(val_loader, distiller):
    distiller.eval()
    top1, top5, losses = AverageMeter(), AverageMeter(), AverageMeter()
    with torch.no_grad():
        for image, target in val_loader:
            image, target = image.cuda(), target.cuda()
            output = distiller(image=image)
            acc1, acc5 = accuracy(output, target, (1, 5))
            top1.update(acc1[0], len(target))
            top5.update(acc5[0], len(target))
            losses.update(cross_entropy(output, target).item(), len(target))
    return top1.avg, top5.avg, losses.avg


def adjust_learning_rate(epoch, cfg, optimizer):
    # a NumPy scalar after the first decay, as in the host: torch refuses to load it
    decays = np.sum(epoch > np.asarray(cfg.SOLVER.LR_DECAY_STAGES))
    if decays == 0:
        return cfg.SOLVER.LR
    for group in optimizer.param_groups:
        group["lr"] = cfg.SOLVER.LR * cfg.SOLVER.LR_DECAY_RATE**decays
    return optimizer.param_groups[0]["lr"]


def save_checkpoint(obj, path):
    torch.save(obj, path)


def load_checkpoint(path):
    return torch.load(path, map_location="cpu")
