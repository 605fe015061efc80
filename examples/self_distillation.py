"""The teacher as a moving average of the student (Kag et al., ICLR 2023, appendix A.7): no second network."""

import argparse

import digits
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from disk_plugin import DiSKLoss, DualScheduler, GuideHead
from disk_plugin.taps import with_features

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--dry-run", action="store_true", help="three epochs")
epochs = 3 if parser.parse_args().dry_run else 60

torch.manual_seed(0)
splits = digits.splits()
student = digits.warm_student(splits["train"], epochs // 2, seed=0)  # an average of random weights teaches nothing
print(f"start: validation accuracy {digits.accuracy(student, splits['validation']):.1f} %")
average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.99))
teacher = with_features(average.eval())
disk = DiSKLoss(GuideHead(digits.NUM_CLASSES, teacher.feature_dim), temperature=1.0)
dual = DualScheduler(disk, epochs=epochs)
optimizer = torch.optim.SGD([*student.parameters(), *disk.parameters()], lr=0.1, momentum=0.9)

for epoch in range(epochs):
    for x, y, _ in digits.batches(splits["train"], 0, epoch):
        with torch.no_grad():
            teacher_logits, teacher_features = teacher(x)
        loss = disk(student(x), teacher_logits, y, teacher_features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(student)
    dual.step()

for name, model in {"student": student, "moving average": average}.items():
    print(f"{name}: validation accuracy {digits.accuracy(model, splits['validation']):.1f} %")
