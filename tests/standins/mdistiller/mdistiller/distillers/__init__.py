from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from ._base import Distiller, Vanilla


class KD(Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)
        self.temperature = cfg.KD.TEMPERATURE

    def forward_train(self, image, target, **kwargs):
        logits = self.student(image)[0]
        teacher_logits = self.teacher(image)[0].detach()
        t = self.temperature
        kd = t**2 * kl_div(log_softmax(logits / t, 1), softmax(teacher_logits / t, 1), reduction="batchmean")
        return logits, {"loss_ce": cross_entropy(logits, target), "loss_kd": kd}


distiller_dict = {"NONE": Vanilla, "KD": KD}
