import argparse
import os

import torch
from mdistiller.dataset import get_dataset
from mdistiller.distillers import distiller_dict
from mdistiller.engine import trainer_dict
from mdistiller.engine.cfg import CFG as cfg
from mdistiller.engine.cfg import show_cfg
from mdistiller.engine.utils import load_checkpoint
from mdistiller.models import cifar_model_dict


def main(cfg, resume):
    show_cfg(cfg)
    name = os.path.join(cfg.EXPERIMENT.PROJECT, cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG)
    train_loader, val_loader, _, num_classes = get_dataset(cfg)
    student = cifar_model_dict[cfg.DISTILLER.STUDENT][0](num_classes=num_classes)
    if cfg.DISTILLER.TYPE == "NONE":
        distiller = distiller_dict["NONE"](student)
    else:
        net, path = cifar_model_dict[cfg.DISTILLER.TEACHER]
        teacher = net(num_classes=num_classes)
        teacher.load_state_dict(load_checkpoint(path)["model"])
        distiller = distiller_dict[cfg.DISTILLER.TYPE](student, teacher, cfg)
    distiller = torch.nn.DataParallel(distiller.cuda())
    trainer_dict[cfg.SOLVER.TRAINER](name, distiller, train_loader, val_loader, cfg).train(resume=resume)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg", default="")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    cfg.merge_from_file(args.cfg)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    main(cfg, args.resume)
