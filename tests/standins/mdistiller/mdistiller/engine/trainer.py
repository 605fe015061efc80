import os

from torch.optim import SGD

from .utils import AverageMeter, accuracy, adjust_learning_rate, load_checkpoint, save_checkpoint, validate


class Writer:
    def __init__(self, path):
        self.scalars = []

    def add_scalar(self, name, value, epoch):
        self.scalars.append((name, float(value), epoch))


class BaseTrainer:
    def __init__(self, experiment_name, distiller, train_loader, val_loader, cfg):
        self.cfg, self.distiller = cfg, distiller
        self.train_loader, self.val_loader = train_loader, val_loader
        self.optimizer = self.init_optimizer(cfg)
        self.best_acc = -1
        self.log_path = os.path.join(cfg.LOG.PREFIX, experiment_name)
        os.makedirs(self.log_path, exist_ok=True)
        self.tf_writer = Writer(self.log_path)

    def init_optimizer(self, cfg):
        parameters = self.distiller.module.get_learnable_parameters()
        solver = cfg.SOLVER
        return SGD(parameters, lr=solver.LR, momentum=solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY)

    def log(self, lr, epoch, log_dict):
        self.best_acc = max(self.best_acc, log_dict["test_acc"])
        with open(os.path.join(self.log_path, "worklog.txt"), "a") as file:
            file.write(f"epoch: {epoch}\nlr: {lr:.2f}\n")
            for name, value in log_dict.items():
                self.tf_writer.add_scalar(name, value, epoch)
                file.write(f"{name}: {value:.2f}\n")

    def train(self, resume=False):
        epoch = 1
        if resume:
            state = load_checkpoint(os.path.join(self.log_path, "latest"))
            epoch = state["epoch"] + 1
            self.distiller.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best_acc = state["best_acc"]
        for number in range(epoch, self.cfg.SOLVER.EPOCHS + 1):
            self.train_epoch(number)
        print("Best accuracy", float(self.best_acc))

    def train_epoch(self, epoch):
        lr = adjust_learning_rate(epoch, self.cfg, self.optimizer)
        meters = {name: AverageMeter() for name in ("losses", "top1")}
        self.distiller.train()
        for data in self.train_loader:
            print(self.train_iter(data, epoch, meters))
        test_acc, test_acc_top5, test_loss = validate(self.val_loader, self.distiller)
        log = {"train_acc": meters["top1"].avg, "train_loss": meters["losses"].avg, "test_acc": test_acc}
        self.log(lr, epoch, {**log, "test_acc_top5": test_acc_top5, "test_loss": test_loss})
        state = {
            "epoch": epoch,
            "model": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_acc": self.best_acc,
        }
        student = {"model": self.distiller.module.student.state_dict()}
        names = ["latest", "student_latest"]
        names += ["best", "student_best"] if test_acc >= self.best_acc else []
        for name in names:
            save_checkpoint(student if name.startswith("student") else state, os.path.join(self.log_path, name))

    def train_iter(self, data, epoch, train_meters):
        self.optimizer.zero_grad()
        image, target, _ = data
        image, target = image.float().cuda(), target.cuda()
        logits, losses = self.distiller(image=image, target=target, epoch=epoch)
        loss = sum(value.mean() for value in losses.values())
        loss.backward()
        self.optimizer.step()
        train_meters["losses"].update(loss.item(), len(target))
        train_meters["top1"].update(accuracy(logits, target)[0][0], len(target))
        return f"Epoch:{epoch}| Loss:{loss.item():.4f}"
