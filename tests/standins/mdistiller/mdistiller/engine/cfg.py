from yacs.config import CfgNode

CFG = CfgNode(
    {
        "EXPERIMENT": {"PROJECT": "distill", "NAME": "", "TAG": "default"},
        "DATASET": {"TYPE": "cifar100", "NUM_WORKERS": 2, "TEST": {"BATCH_SIZE": 64}},
        "DISTILLER": {"TYPE": "NONE", "TEACHER": "teacher", "STUDENT": "student"},
        "SOLVER": {
            "TRAINER": "base",
            "BATCH_SIZE": 64,
            "EPOCHS": 240,
            "LR": 0.05,
            "LR_DECAY_STAGES": [150, 180, 210],
            "LR_DECAY_RATE": 0.1,
            "WEIGHT_DECAY": 0.0001,
            "MOMENTUM": 0.9,
            "TYPE": "SGD",
        },
        "LOG": {"TENSORBOARD_FREQ": 500, "SAVE_CHECKPOINT_FREQ": 40, "PREFIX": "./output", "WANDB": True},
        "KD": {"TEMPERATURE": 4, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}},
    }
)


def show_cfg(cfg):
    print(cfg.dump())
