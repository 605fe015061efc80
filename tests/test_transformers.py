"""The adapter for the Trainer of transformers, against README's loop, plain transformers and one process."""

import copy
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F  # noqa: N812

pytest.importorskip("transformers", reason="needs transformers: pip install 'disk-plugin[transformers]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'disk-plugin[transformers]'")

from transformers import (
    BertConfig,
    BertForTokenClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from disk_plugin import DiSKLoss, DualScheduler, GuideHead
from disk_plugin.features import DKD, Guided, Method
from disk_plugin.integrations.transformers import DiSKTrainer, DistillationMixin
from disk_plugin.taps import with_features

resumes = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason=f"transformers resumes with torch 2.6 or newer, got {torch.__version__}",
)

C = 5
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


class Images(torch.utils.data.Dataset):
    """Six images and more, whose label can be seen."""

    def __init__(self, count=12, label="labels"):
        self.count, self.label = count, label

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 8, 8, generator=generator) + index % C, self.label: index % C}


class Sentences(Images):
    """Token labels, of which each sentence has another number."""

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(C, (6,), generator=generator)
        labels = torch.where(torch.arange(6) <= index % 6, tokens, -100)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


class Projected(Method):
    """A method with features and parameters of its own."""

    reads = frozenset({"features"})

    def __init__(self, student_width, teacher_width):
        super().__init__()
        self.projector = nn.Linear(student_width, teacher_width)

    def forward(self, student, teacher, target):
        return {"error": (self.projector(student.features) - teacher.features).square().mean(1)}


def projected(**settings):
    torch.manual_seed(3)
    return Guided(loss_of(**settings), Projected(8, 16), logit_loss=True)


class Maps(Method):
    reads = frozenset({"last"})


class Stop(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            control.should_save = control.should_training_stop = True


class Recorded(DiSKTrainer):
    """Keeps the training batches."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.__dict__.setdefault("seen", []).append(copy.deepcopy(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)


def convnext(width=8, seed=0, dropout=0.0, **config):
    """Of a family whose checkpoints the host itself resumes: of ViT, transformers 5.24 loads the classifier alone."""
    torch.manual_seed(seed)
    sizes = {"hidden_sizes": [width, width], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
    config = {"num_labels": C, "drop_path_rate": dropout, "layer_scale_init_value": 1.0} | config
    return ConvNextForImageClassification(ConvNextConfig(**sizes, **config))


def bert(width=8, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForTokenClassification(
        BertConfig(vocab_size=C, num_labels=C, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    )


def gpt(width=8, seed=0):
    torch.manual_seed(seed)
    sizes = {"n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=C, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes))


def t5(width=8, seed=0):
    torch.manual_seed(seed)
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=C, decoder_start_token_id=0, **sizes))


def loss_of(**settings):
    torch.manual_seed(2)
    return DiSKLoss(GuideHead(C, 16), **settings)


def arguments(folder, kind=TrainingArguments, **words):
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    plain = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    return kind(**{"output_dir": str(folder), **quiet, **plain, "per_device_train_batch_size": 4, **words})


def trained(folder, loss=None, data=None, kind=DiSKTrainer, resume=None, callbacks=None, **words):
    """Train a student that is always the same; return the trainer."""
    own = {name: words.pop(name) for name in ("model", "teacher", "epoch_steps", "dual", "optimizers") if name in words}
    own = {"model": convnext(dropout=words.pop("dropout", 0.0)), "teacher": convnext(16, seed=1)} | own
    args = arguments(folder, **{"num_train_epochs": 2, **words})
    trainer = kind(args=args, train_dataset=data or Images(), loss=loss, callbacks=callbacks, **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(one, other):
    """Compare two states bit for bit, at any depth."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_it_trains_as_readmes_loop_bit_for_bit(tmp_path):
    disk = loss_of(discount=0.3)
    trainer = trained(tmp_path, copy.deepcopy(disk), kind=Recorded)
    student, tapped = convnext(), with_features(convnext(16, seed=1).eval())
    optimizer = torch.optim.SGD([*student.parameters(), *disk.parameters()], lr=0.1)
    dual = DualScheduler(disk, epochs=2)
    student.train()
    assert len(trainer.seen) == 6
    for number, batch in enumerate(trainer.seen):
        with torch.no_grad():
            teacher_logits, features = tapped(batch["pixel_values"])
        loss = disk(student(batch["pixel_values"]).logits, teacher_logits, batch["labels"], features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number in (2, 5):
            dual.step()
    same(trainer.model.state_dict(), student.state_dict())
    same(trainer.guided.disk.state_dict(), disk.state_dict())
    assert disk.level.log_guide > -4
    first = next(convnext().parameters())
    assert not torch.equal(next(student.parameters()), first)


def test_the_loss_it_makes_fits_the_teacher_and_leaves_the_hosts_random_state(tmp_path):
    args = arguments(tmp_path)
    trainer = DiSKTrainer(
        model=convnext(), teacher=convnext(16, seed=1), args=args, train_dataset=Images(), temperature=3.0
    )
    after = torch.rand(1)
    Trainer(model=convnext(), args=args, train_dataset=Images())
    assert torch.equal(after, torch.rand(1))
    disk = trainer.guided.disk
    assert (disk.guide.num_classes, disk.guide.feature_dim, disk.temperature) == (C, 16, 3.0)


def test_the_host_logs_an_epochs_means(tmp_path):
    trainer = trained(tmp_path, loss_of(), num_train_epochs=3)
    logged = [each for each in trainer.state.log_history if "disk_logged_loss" in each]
    assert [each["epoch"] for each in logged] == [1.0, 2.0, 3.0]
    assert {"disk_discount_target", "disk_usage", "disk_teacher_accuracy", "disk_divergence"} <= logged[0].keys()
    assert trainer.guided_training.schedule.dual.epoch == 3


@pytest.mark.parametrize(
    ("words", "epochs", "stepped"),
    [
        ({"num_train_epochs": 1.5}, 2, 1),
        ({"max_steps": 7}, 3, 2),
        ({"max_steps": 6, "epoch_steps": 2}, 3, 3),
        ({"num_train_epochs": 1, "epoch_steps": 2}, 2, 1),
    ],
)
def test_the_schedule_spans_what_the_host_trains(tmp_path, words, epochs, stepped):
    trainer = trained(tmp_path, loss_of(), **words)
    dual = trainer.guided_training.schedule.dual
    assert (dual.epochs, dual.epoch) == (epochs, stepped)  # an epoch that is cut short does not step, but is logged
    assert sum("disk_usage" in each for each in trainer.state.log_history) == epochs


def test_a_dataset_without_a_length_has_a_schedule_over_the_steps(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from (Images()[index] for index in range(12))

    dual = trained(tmp_path, loss_of(), Stream(), max_steps=40).guided_training.schedule.dual
    assert (dual.epochs, dual.epoch, dual.loss.level.progress) == (20, 20, 1.0)


def test_a_single_epoch_has_a_schedule_within_it(tmp_path):
    dual = trained(tmp_path, loss_of(), Images(80), num_train_epochs=1).guided_training.schedule.dual
    assert (dual.epochs, dual.epoch, dual.loss.level.progress) == (20, 20, 1.0)


@resumes
@pytest.mark.parametrize("at", [1, 4, 6])  # in the first epoch, in the second, at its end
@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, at, strategy):
    words = {"num_train_epochs": 4, "dropout": 0.1, "optim": "adamw_torch", "learning_rate": 0.01}
    words |= {"lr_scheduler_type": "linear", "save_strategy": strategy}
    whole, half, rest = (projected() for _ in range(3))
    expected = trained(tmp_path / "whole", whole, **words)
    stopped = trained(tmp_path / "half", half, **words, callbacks=[Stop(at)])
    assert stopped.state.global_step == at
    folder = tmp_path / "half" / f"checkpoint-{at}"
    assert torch.load(folder / "disk.pt", weights_only=True).keys() == {"disk", "method", "dual"}
    with torch.no_grad():
        rest.disk.guide.mlp[0].bias.add_(1.0)  # what is loaded does not depend on what was there
    found = trained(tmp_path / "rest", rest, **words, resume=str(folder))
    assert found.state.global_step == expected.state.global_step == 12
    same(found.model.state_dict(), expected.model.state_dict())
    same(rest.state_dict(), whole.state_dict())
    same(found.optimizer.state_dict()["state"], expected.optimizer.state_dict()["state"])
    assert not torch.equal(stopped.model.classifier.weight, expected.model.classifier.weight)


def test_a_resume_without_the_guides_state_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="epoch", num_train_epochs=1)
    Trainer(model=convnext(), args=args, train_dataset=Images()).train()
    with pytest.raises(RuntimeError, match=r"resume without the guide's state: .*checkpoint-3 holds no disk.pt"):
        trained(tmp_path, loss_of(), resume=True)


@pytest.mark.parametrize("form", [{"discount": 0}, {"budget": 1e3, "multiplier": 5.0}, {"budget": 0.0}])
@pytest.mark.parametrize(("model", "data"), [(convnext, Images(14)), (bert, Sentences(14))])
def test_accumulated_micro_batches_are_the_full_batch(tmp_path, model, data, form):
    """Of 4 and 4 samples, then of 4 and 2; of sentences, each with another number of labels."""
    loss, teacher = loss_of(**form), model(16, seed=1)
    whole, parts = (copy.deepcopy(loss) for _ in range(2))
    words = {"teacher": teacher, "data": data, "num_train_epochs": 1, "max_grad_norm": 1.0}
    expected = trained(tmp_path, whole, model=model(), per_device_train_batch_size=8, **words)
    found = trained(tmp_path, parts, model=model(), gradient_accumulation_steps=2, **words)
    assert found.state.global_step == expected.state.global_step == 2
    for name in ("model", "guided"):
        mine, theirs = (getattr(each, name) for each in (found, expected))
        torch.testing.assert_close(dict(mine.named_parameters()), dict(theirs.named_parameters()), rtol=1e-5, atol=1e-7)
    if form != {"discount": 0}:
        assert not torch.equal(parts.guide.mlp[-1].bias, loss.guide.mlp[-1].bias)
    assert not torch.equal(found.model.classifier.weight, model().classifier.weight)


def test_a_last_step_of_fewer_micro_batches_has_the_mean_of_these(tmp_path):
    words = {"data": Images(10), "num_train_epochs": 1}
    expected = trained(tmp_path, loss_of(discount=0), per_device_train_batch_size=8, **words)
    found = trained(tmp_path, loss_of(discount=0), gradient_accumulation_steps=2, **words)
    both = (dict(each.model.named_parameters()) for each in (found, expected))
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-7)


def process(rank, folder, port):
    """Train in one of two processes; train the same with a stop and a resume."""
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in address.items()})
    torch.set_num_threads(1)
    words = {"ddp_backend": "gloo", "max_steps": 4, "data": Images(16)}
    seen = {}
    for name, loss in losses().items():
        with torch.no_grad():
            next(loss.parameters()).add_(rank)  # what another seed would have made of it
        trainer = trained(f"{folder}/run", loss, **words)
        seen[name] = trainer.model.state_dict(), loss.state_dict(), trainer.state.log_history[-2]["disk_usage"]
    for at in (2, 3):  # at the end of the first epoch, before its end is reported, and in the second
        trained(f"{folder}/half", losses()["method"], **words, callbacks=[Stop(at)])
        loss = losses()["method"]
        trainer = trained(f"{folder}/half", loss, **words, resume=f"{folder}/half/checkpoint-{at}")
        seen[at] = trainer.model.state_dict(), loss.state_dict()
    torch.save(seen, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def losses():
    return {"method": projected(discount=0.3), "budget": Guided(loss_of(budget=0.3, multiplier=5.0))}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each process ended with; one launch for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, (str(folder), port), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@resumes
@pytest.mark.parametrize("name", ["method", "budget"])
def test_two_processes_train_as_one_with_the_whole_batch(both, tmp_path, name):
    loss = losses()[name]
    before = copy.deepcopy(loss.state_dict())
    trainer = trained(tmp_path, loss, Images(16), max_steps=4, per_device_train_batch_size=8)
    same(both[0][name][1], both[1][name][1])
    same(both[0][name][0], both[1][name][0])
    model, guided, usage = both[0][name]
    weights = [key for key, _ in loss.named_parameters()]
    for mine, theirs in ((model, trainer.model.state_dict()), (guided, loss.state_dict())):
        keys = weights if mine is guided else mine
        torch.testing.assert_close(*({key: each[key] for key in keys} for each in (mine, theirs)), rtol=1e-4, atol=1e-6)
    assert usage == pytest.approx(trainer.state.log_history[-2]["disk_usage"], rel=1e-4)
    assert all(not torch.equal(guided[key], before[key]) for key in weights)


@resumes
@pytest.mark.parametrize("at", [2, 3])
def test_two_processes_resume(both, at):
    same(both[0][at], both[1][at])
    for mine, theirs in zip(both[0][at], both[0]["method"][:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_the_teacher_is_untouched_and_in_no_checkpoint(tmp_path):
    teacher = convnext(16, seed=1, dropout=0.5)
    before = copy.deepcopy(teacher.state_dict())
    trainer = trained(tmp_path, teacher=teacher, save_strategy="epoch")
    same(teacher.state_dict(), before)
    assert not any(module.training for module in teacher.modules())
    assert all(not each.requires_grad and each.grad is None for each in teacher.parameters())
    assert {id(each) for each in teacher.parameters()}.isdisjoint(map(id, trainer.model.parameters()))
    held = {id(each) for group in trainer.optimizer.param_groups for each in group["params"]}
    assert held == {id(each) for each in (*trainer.model.parameters(), *trainer.guided.trainable_parameters())}
    again, info = ConvNextForImageClassification.from_pretrained(tmp_path / "checkpoint-6", output_loading_info=True)
    same(again.state_dict(), trainer.model.state_dict())
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    trainer.save_model(tmp_path / "student")
    assert not (tmp_path / "student" / "disk.pt").exists()


def test_evaluation_and_the_best_model_are_the_hosts_own(tmp_path):
    words = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "worst"}
    words |= {"load_best_model_at_end": True, "num_train_epochs": 3}
    args, found = arguments(tmp_path, **words), iter([1.0, 5.0, 2.0])
    trainer = DiSKTrainer(
        model=convnext(), teacher=convnext(16, seed=1), args=args, train_dataset=Images(), eval_dataset=Images(),
        compute_metrics=lambda _: {"worst": next(found)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    best = ConvNextForImageClassification.from_pretrained(tmp_path / "checkpoint-6")
    same(trainer.model.state_dict(), best.state_dict())
    plain = Trainer(model=best, args=arguments(tmp_path), eval_dataset=Images())
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    same(trainer.predict(Images()).predictions, plain.predict(Images()).predictions)


def test_what_decays_is_by_the_hosts_rule_and_gradients_are_zeroed(tmp_path):
    trainer = trained(tmp_path, weight_decay=0.5, optim="adamw_torch")
    decays = {id(each): group["weight_decay"] for group in trainer.optimizer.param_groups for each in group["params"]}
    for name, parameter in trainer.guided.named_parameters():
        plain = name.endswith("bias") or name.split(".")[-2] in ("1", "4")  # the two LayerNorms
        assert decays[id(parameter)] == (0.0 if plain else 0.5), name
        assert parameter.grad is None
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.1}


def test_an_optimizer_of_ones_own_gets_the_guide_too(tmp_path):
    student, loss = convnext(), loss_of()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    trainer = trained(tmp_path, loss, model=student, optimizers=(optimizer, None))
    assert len(optimizer.param_groups) == 3
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(ValueError, match="the optimizer of a scheduler must hold the guide, got one without it"):
        trained(tmp_path, loss, model=student, optimizers=(optimizer, scheduler))
    optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = trained(tmp_path, loss, model=student, optimizers=(optimizer, scheduler))
    assert len(trainer.optimizer.param_groups) == 1


def test_a_second_train_goes_on_and_model_init_begins_anew(tmp_path):
    args = arguments(tmp_path, num_train_epochs=1)
    trainer = DiSKTrainer(
        model_init=lambda: convnext(), teacher=convnext(16, seed=1), args=args, train_dataset=Images(), discount=0.3
    )
    trainer.train()
    first = copy.deepcopy((trainer.model.state_dict(), trainer.guided.state_dict()))
    trainer.train()
    same((trainer.model.state_dict(), trainer.guided.state_dict()), first)
    trainer = trained(tmp_path, loss_of(discount=0.3), num_train_epochs=1)
    first = trainer.guided.disk.guide.mlp[0].weight.clone()
    trainer.train()
    assert not torch.equal(trainer.guided.disk.guide.mlp[0].weight, first)


def guided_dkd():
    return Guided(loss_of(discount=0.3), DKD())


@pytest.mark.parametrize("make", [guided_dkd, lambda: projected(discount=0.3)])
def test_any_method_is_guided(tmp_path, make):
    guided = make()
    before = copy.deepcopy(guided.state_dict())
    trainer = trained(tmp_path, guided)
    assert all(not torch.equal(each, before[name]) for name, each in guided.named_parameters())
    assert "disk_feature" in trainer.state.log_history[-2]
    assert trainer.model.state_dict().keys() == convnext().state_dict().keys()


def test_token_labels_are_distilled_position_by_position(tmp_path):
    disk = loss_of(discount=0.3)
    trainer = trained(tmp_path, copy.deepcopy(disk), Sentences(), Recorded, model=bert(), teacher=bert(16, seed=1))
    batch = trainer.seen[0]
    with torch.no_grad():
        shown, features = with_features(bert(16, seed=1).eval())(batch["input_ids"], batch["attention_mask"])
    loss = disk(bert()(batch["input_ids"]).logits.mT, shown.mT, batch["labels"], features.mT)
    first = trained(tmp_path, loss_of(discount=0.3), Sentences(), model=bert(), teacher=bert(16, seed=1), max_steps=1)
    assert first.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_a_causal_model_is_distilled_on_the_token_that_follows(tmp_path):
    words = {"model": gpt(), "teacher": gpt(16, seed=1), "max_steps": 1}
    loss = DiSKLoss(GuideHead(C), ce_weight=1.0, distill_weight=0.0, discount=0)
    trainer = trained(tmp_path, loss, Sentences(4), Recorded, **words)
    plain = gpt()(**trainer.seen[0]).loss  # which shifts by itself
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(plain.item(), rel=1e-6)


class Distilling(DistillationMixin, Seq2SeqTrainer):
    pass


def test_the_mixin_serves_another_trainer_and_an_encoder_decoder(tmp_path):
    words = {"model": t5(), "teacher": t5(16, seed=1), "kind": Distilling}
    args = arguments(tmp_path, Seq2SeqTrainingArguments, num_train_epochs=1)
    own = {name: words[name] for name in ("model", "teacher")}
    trainer = Distilling(**own, args=args, train_dataset=Sentences(), eval_dataset=Sentences(), discount=0.3)
    before = t5().state_dict()
    trainer.train()
    assert not torch.equal(trainer.model.shared.weight, before["shared.weight"])
    assert "eval_loss" in trainer.evaluate()


def test_label_smoothing_is_that_of_the_loss(tmp_path):
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    words = {"args": args, "train_dataset": Images()}
    trainer = DiSKTrainer(model=convnext(), teacher=convnext(16), **words, ce_weight=1.0)
    assert trainer.guided.disk.label_smoothing == 0.1
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1, and in the loss, got 0.0"):
        DiSKTrainer(model=convnext(), teacher=convnext(16), **words, loss=loss_of())
    DiSKTrainer(model=convnext(), teacher=convnext(16), **words, loss=loss_of(label_smoothing=0.1, ce_weight=0.1))


def test_labels_under_another_name(tmp_path):
    def collate(rows):
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}

    args = arguments(tmp_path, num_train_epochs=1)
    words = {"args": args, "data_collator": collate, "teacher": convnext(16, seed=1), "loss": loss_of()}
    DiSKTrainer(model=convnext(), **words, train_dataset=Images(label="label")).train()
    with pytest.raises(
        ValueError, match=r"must hold labels under one of \['labels', 'label'\], got \['pixel_values'\]"
    ):
        DiSKTrainer(model=convnext(), **words, train_dataset=Images(label="other")).train()


class Headless(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, C)

    def forward(self, pixel_values, labels=None):
        return {"hidden": self.linear(pixel_values.flatten(1))}


def moved():
    """Two orders of the same labels."""
    orders = ["abcde", "edcba"]
    return [
        {"id2label": dict(enumerate(each)), "label2id": {name: i for i, name in enumerate(each)}} for each in orders
    ]


@pytest.mark.parametrize(
    ("kind", "message", "words"),
    [
        (TypeError, "must return logits .* got dict with keys", lambda: {"model": Headless()}),
        (TypeError, "must return logits .* got dict with keys", lambda: {"teacher": Headless(), "loss": loss_of()}),
        (
            ValueError,
            "the teacher must have the student's num_labels 5, got 7",
            lambda: {"teacher": convnext(16, num_labels=7)},
        ),
        (
            ValueError,
            r"the student's order of labels, got another label2id of \['a', 'b', 'd'\]",
            lambda: {"model": convnext(**moved()[0]), "teacher": convnext(16, **moved()[1])},
        ),
        (ValueError, "problem_type must be single_label", lambda: {"model": convnext(problem_type="regression")}),
        (TypeError, r"\['top_k'\] are settings of a loss", lambda: {"loss": loss_of(), "top_k": 3}),
        (TypeError, "loss must be a DiSKLoss or a Guided, got Linear", lambda: {"loss": nn.Linear(2, 2)}),
        (ValueError, "Maps reads \\['last'\\]", lambda: {"loss": Guided(loss_of(), Maps())}),
        (ValueError, "compute_loss_func must be None", lambda: {"compute_loss_func": F.cross_entropy}),
        (ValueError, "epoch_steps must be at least 1, got 0", lambda: {"epoch_steps": 0}),
        (TypeError, "unexpected keyword argument 'temprature'", lambda: {"temprature": 3.0}),
    ],
)
def test_errors_say_what_was_expected(tmp_path, kind, message, words):
    words = {"model": convnext(), "teacher": convnext(16, seed=1)} | words()
    with pytest.raises(kind, match=message):
        DiSKTrainer(args=arguments(tmp_path), train_dataset=Images(), **words).train()


def test_sharded_training_is_refused(tmp_path):
    class Sharded(DiSKTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

    with pytest.raises(
        ValueError, match=r"sharded training would neither shard nor save it.* got \['is_fsdp_enabled'\]"
    ):
        Sharded(model=convnext(), teacher=convnext(16), args=arguments(tmp_path), train_dataset=Images())


@pytest.mark.parametrize(
    ("module", "message"),
    [("None", "found none"), ("types.SimpleNamespace(__version__='4.40.1')", "got 4.40.1")],
)
def test_a_missing_or_old_host_is_named_with_the_pip_line(module, message):
    code = f"import sys, types; sys.modules['transformers'] = {module}; import disk_plugin.integrations.transformers"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: disk_plugin.integrations.transformers needs transformers")
    assert message in last
    assert "pip install 'transformers>=4.57.1' 'accelerate>=1.10'" in last
