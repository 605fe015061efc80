"""Tails of teachers: what they compute, gradient and modes, sizes, and what is refused."""

import copy
import pickle

import pytest
import torch
from tail_teachers import FAMILIES, ISOTROPIC, STAGES, MDistillerResNet, images, timm_teacher
from torch import nn

from disk_plugin.taps import TeacherTail, get_tail

MDISTILLER = {"cifar": {}, "cifar, one block": {"depth": 1}, "imagenet": {"widths": (8, 8, 16, 24), "preact": True}}


def input_of(teacher, module, x):
    """What a module of the teacher reads."""
    seen = []
    hook = teacher.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        teacher(x)
    hook.remove()
    return seen[0]


def nchw(teacher, value):
    return value.permute(0, 3, 1, 2) if getattr(teacher, "output_fmt", "") == "NHWC" else value


def without_prefix(teacher, entry, size):
    """The last two blocks and the norm on patch tokens, in a copy that knows no other tokens."""
    teacher = copy.deepcopy(teacher)
    prefix, rope = teacher.num_prefix_tokens, getattr(teacher, "rope", None)
    shared = getattr(teacher, "rel_pos_bias", None)
    tokens = entry
    for index in (1, 2):
        block, options = teacher.blocks[index], {}
        if rope is not None:
            block.attn.num_prefix_tokens = 0
            embed = rope.get_embed(shape=list(size))
            options["rope"] = embed[index] if getattr(teacher, "rope_mixed", False) else embed
        if shared is not None:
            options["shared_rel_pos_bias"] = shared()[:, prefix:, prefix:]
        if getattr(block.attn, "relative_position_bias_table", None) is not None:
            bias = block.attn._get_rel_pos_bias()[..., prefix:, prefix:]
            block.attn._get_rel_pos_bias = lambda bias=bias: bias
        tokens = block(tokens, **options)
    return teacher.norm(tokens)


@pytest.mark.parametrize("name", STAGES)
def test_the_tail_of_a_teacher_with_stages_is_the_rest_of_its_own_pass(name):
    teacher, x = timm_teacher(name), images(name, 3)
    tail = get_tail(teacher, images(name))
    entry = nchw(teacher, input_of(teacher, FAMILIES[name][3], x))
    with torch.no_grad():
        final = nchw(teacher, teacher.forward_features(x))
        torch.testing.assert_close(tail(entry), final)
    assert (tail.entry_width, *tail.entry_size) == tuple(entry.shape[1:])
    assert (tail.final_width, *tail.final_size) == tuple(final.shape[1:])


@pytest.mark.parametrize("name", ISOTROPIC)
def test_the_tail_of_an_isotropic_teacher_is_its_last_blocks_on_patch_tokens_alone(name):
    teacher, size = timm_teacher(name), tuple(side // 8 for side in FAMILIES[name][2])
    tail = get_tail(teacher, images(name))
    assert tail.entry_size == tail.final_size == size
    assert tail.entry_width == tail.final_width == 48
    tokens = torch.randn(3, size[0] * size[1], 48)
    with torch.no_grad():
        expected = without_prefix(teacher, tokens, size)
        torch.testing.assert_close(tail(tokens, size).flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MDISTILLER)
def test_the_tail_of_mdistillers_resnets_makes_the_activated_last_map(kind):
    teacher, x = MDistillerResNet(**MDISTILLER[kind]).eval(), torch.randn(3, 3, 16, 16)
    tail = get_tail(teacher, torch.randn(2, 3, 16, 16))
    with torch.no_grad():
        final = teacher(x)[1]["feats"][-1]
        torch.testing.assert_close(tail(input_of(teacher, f"layer{teacher.stages_count}", x)), final)
    assert (tail.final_width, *tail.final_size) == tuple(final.shape[1:])


@pytest.mark.parametrize("name", ["swin", "convnext", "resnet", "vit", "beit", "eva 02"])
def test_the_gradient_reaches_the_input_and_leaves_the_teacher_as_it_was(name):
    teacher, x = timm_teacher(name), images(name)
    with torch.no_grad():
        before, state = teacher(x), {key: value.clone() for key, value in teacher.state_dict().items()}
    tail = get_tail(teacher, x)
    entry = torch.randn(2, tail.entry_width, *tail.entry_size, requires_grad=True)
    tail(entry).square().sum().backward()
    assert entry.grad.flatten(1).any(1).all()
    assert not any(parameter.requires_grad for parameter in tail.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    with torch.no_grad():
        assert torch.equal(teacher(x), before)


def test_training_mode_of_a_module_around_it_does_not_reach_the_teacher_and_the_teachers_own_is_refused():
    teacher = timm_teacher("resnet")
    tail = get_tail(teacher, images("resnet"))
    around = nn.ModuleDict({"tail": tail, "own": nn.Linear(2, 2)}).train()
    assert around["own"].training
    entry = torch.randn(2, tail.entry_width, *tail.entry_size)
    running = teacher.layer4[0].bn1.running_mean.clone()
    assert torch.equal(tail(entry), tail(entry))
    assert torch.equal(running, teacher.layer4[0].bn1.running_mean)
    teacher.train()
    with pytest.raises(RuntimeError, match=r"the teacher of this tail is in training mode.* call teacher.eval\(\)"):
        tail(entry)
    assert torch.equal(running, teacher.layer4[0].bn1.running_mean)
    with pytest.raises(RuntimeError, match="is in training mode"):
        get_tail(teacher, images("resnet"))
    teacher.eval()
    tail(entry)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradients_on_an_input_that_requires_them_is_refused(context):
    teacher = MDistillerResNet().eval()
    tail = get_tail(teacher, torch.randn(2, 3, 16, 16))
    entry = torch.randn(2, 16, 8, 8, requires_grad=True)
    with context(), pytest.raises(RuntimeError, match=r"called under torch.no_grad\(\) on an input that requires grad"):
        tail(entry)
    with context():
        assert not tail(entry.detach()).requires_grad  # as in validation


@pytest.mark.parametrize("name", ["swin", "vit", "resnet"])
def test_checkpointing_stores_less_and_changes_nothing(name):
    teacher, found = timm_teacher(name), []
    entry = None
    for checkpoint in (False, True):
        tail = get_tail(teacher, images(name), checkpoint=checkpoint)
        entry = torch.randn(2, tail.entry_width, *tail.entry_size) if entry is None else entry
        entry = entry.detach().requires_grad_()
        stored = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, stored=stored: stored.append(t.numel()) or t, lambda t: t
        ):
            final = tail(entry)
        final.square().sum().backward()
        found.append((final.detach(), entry.grad, sum(stored)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[1][2] < found[0][2] / 4


@pytest.mark.parametrize(("name", "size"), [("swin, any size", (3, 5)), ("convnext", (3, 2)), ("resnet", (5, 1))])
def test_other_sizes_are_read_where_the_teacher_reads_them_and_the_entrys_size_follows(name, size):
    tail = get_tail(timm_teacher(name), images(name))
    entry = torch.randn(2, tail.entry_width, *tail.entry_size_for(size))
    assert tuple(tail(entry).shape[2:]) == size
    assert tail.entry_size_for(tail.final_size) == tail.entry_size


@pytest.mark.parametrize("name", ["vit", "eva"])
def test_blocks_without_positions_of_their_own_read_any_size(name):
    tail = get_tail(timm_teacher(name), images(name))
    assert tail.entry_size_for((3, 7)) == (3, 7)
    assert tail(torch.randn(2, 48, 3, 7)).shape == (2, 48, 3, 7)


@pytest.mark.parametrize("name", ["swin, shifted windows", "beit", "eva 02", "rope, mixed"])
def test_another_size_than_that_of_stored_positions_or_masks_is_refused(name):
    tail = get_tail(timm_teacher(name), images(name))
    height, width = tail.entry_size
    with pytest.raises(ValueError, match=rf"reads maps of size \({height}, {width}\), got \({2 * height}, {width}\)"):
        tail(torch.randn(2, tail.entry_width, 2 * height, width))


def test_a_dynamic_teachers_rotary_positions_follow_the_size():
    teacher = timm_teacher("eva 02", dynamic_img_size=True)
    tail = get_tail(teacher, images("eva 02"))
    tokens = torch.randn(2, 15, 48)
    with torch.no_grad():
        expected = without_prefix(teacher, tokens, (3, 5)).transpose(1, 2).reshape(2, 48, 3, 5)
        torch.testing.assert_close(tail(tokens, (3, 5)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "eva 02"])
def test_the_number_of_blocks_and_those_left_to_finish_are_chosen(name):
    teacher, x = timm_teacher(name), torch.randn(2, 48, 4, 6)
    whole = get_tail(teacher, images(name), blocks=3)
    split = get_tail(teacher, images(name), blocks=2, final_blocks=1)
    with torch.no_grad():
        torch.testing.assert_close(split.finish(split(x)), whole(x))
        assert not torch.allclose(split(x), whole(x))
        assert torch.equal(whole.finish(x), x)


def test_it_is_in_no_state_and_a_state_without_it_loads_strictly():
    tail = get_tail(timm_teacher("vit"), images("vit"))
    around = nn.ModuleDict({"own": nn.Linear(2, 2), "tail": tail})
    assert sorted(around.state_dict()) == ["own.bias", "own.weight"]
    assert tail.state_dict() == {}
    other = nn.ModuleDict({"own": nn.Linear(2, 2), "tail": get_tail(timm_teacher("vit"), images("vit"))})
    kept = {name: value.clone() for name, value in other["tail"].named_parameters()}
    other.load_state_dict(around.state_dict())
    assert torch.equal(other["own"].weight, around["own"].weight)
    assert all(torch.equal(value, kept[name]) for name, value in other["tail"].named_parameters())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"own.bias": around["own"].bias})


def test_it_can_be_copied_and_pickled():
    tail = get_tail(timm_teacher("beit"), images("beit"))
    entry = torch.randn(2, tail.entry_width, *tail.entry_size)
    for other in (copy.deepcopy(tail), pickle.loads(pickle.dumps(tail))):
        assert torch.equal(other(entry), tail(entry))


def test_a_stage_that_writes_into_its_input_is_found_too():
    class Writing(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.add_(1))

    teacher = MDistillerResNet().eval()
    teacher.layer3 = Writing(16, 24, 3, stride=2, padding=1).eval()
    tail, entry = get_tail(teacher, torch.randn(2, 3, 16, 16)), torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(tail(entry.clone()), teacher.layer3(entry))


def unusable(name, size=64, **settings):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=5, **settings).eval(), torch.randn(2, 3, size, size)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: unusable("test_efficientnet"), "EfficientNet: its blocks must read tokens"),
        (
            lambda: unusable("vit_relpos_base_patch16_cls_224", 32, embed_dim=24, depth=2, num_heads=2, img_size=32),
            "VisionTransformerRelPos: The size of tensor",
        ),
        (lambda: with_more_than_blocks(), "VisionTransformer: its last 2 blocks and its norm do not reproduce"),
        (lambda: (nn.Linear(3, 5).eval(), torch.randn(2, 3, 4, 4)), "Linear: it has no stages, layers, blocks, layer3"),
        (
            lambda: (without_pooling(), torch.randn(2, 3, 16, 16)),
            "MDistillerResNet: it has neither forward_features nor",
        ),
        (lambda: (with_more_after(), torch.randn(2, 3, 16, 16)), "MDistillerResNet: Sequential and 0 norms do not"),
    ],
)
def test_a_teacher_without_a_tail_that_works_is_refused_with_those_that_do(make, reason):
    teacher, x = make()
    with pytest.raises(ValueError, match=f"no tail found in {reason}") as raised:
        get_tail(teacher, x)
    assert "timm's Swin, SwinV2, ConvNeXt, ResNet, ViT, DeiT, BEiT and EVA" in str(raised.value)


def without_pooling():
    teacher = MDistillerResNet().eval()
    teacher.pool_of_another_name = teacher.avgpool
    del teacher.avgpool
    teacher.avgpool = lambda x: x.mean((2, 3))
    return teacher


def with_more_than_blocks():
    teacher = timm_teacher("vit")
    inner = teacher.forward_features
    teacher.forward_features = lambda x: 2 * inner(x)
    return teacher, images("vit")


def with_more_after():
    teacher = MDistillerResNet().eval()
    teacher.avgpool.register_forward_pre_hook(lambda _, args: (args[0].square(),))
    return teacher


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t, x: get_tail(len, x), TypeError, "teacher must be a Module, got builtin"),
        (lambda t, x: get_tail(t, x[0]), ValueError, r"images must have shape \(N, C, H, W\), got \(3, 16, 16\)"),
        (lambda t, x: get_tail(t, x, blocks=0), ValueError, "blocks must be >= 1, got 0"),
        (
            lambda t, x: get_tail(t, x, final_blocks=1),
            ValueError,
            "final_blocks must be 0 for a teacher without blocks",
        ),
        (lambda t, x: get_tail(t, x)(torch.randn(2, 8, 8, 8)), ValueError, r"map \(N, 16, H, W\).* got \(2, 8, 8, 8\)"),
        (lambda t, x: get_tail(t, x)(torch.randn(2, 64, 16)), ValueError, r"got \(2, 64, 16\) with size=None"),
        (lambda t, x: get_tail(t, x)(torch.randn(2, 64, 16), (8, 7)), ValueError, r"with size=\(8, 7\)"),
        (lambda t, x: TeacherTail(nn.Linear(1, 1), (1, 1, 1), (1, 1, 1)), RuntimeError, "is in training mode"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(MDistillerResNet().eval(), torch.randn(2, 3, 16, 16))


def test_more_blocks_than_the_teacher_has_are_refused():
    with pytest.raises(ValueError, match="it has 3 blocks, got blocks=3 and final_blocks=1"):
        get_tail(timm_teacher("vit"), images("vit"), blocks=3, final_blocks=1)


# ---- a teacher that is no longer as it was ---------------------------------------------------------------------------


def test_a_teacher_that_is_no_longer_frozen_is_refused_and_the_tail_itself_stays_frozen():
    teacher = timm_teacher("swin")
    tail = get_tail(teacher, images("swin"))
    tail.requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in tail.parameters())
    nn.ModuleList([tail]).requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"the teacher of this tail is not frozen, .*call teacher\.requires_grad_"):
        tail(torch.randn(2, tail.entry_width, *tail.entry_size))
    teacher.requires_grad_(False)
    assert tail(torch.randn(2, tail.entry_width, *tail.entry_size)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_teacher_in_another_precision_reads_and_returns_the_students(dtype, checkpoint):
    tail = TeacherTail(nn.Conv2d(4, 8, 2, stride=2).eval(), (4, 6, 6), (8, 3, 3), checkpoint=checkpoint)
    entry = torch.randn(2, 4, 6, 6, requires_grad=True)
    expected = tail(entry)
    tail.to(dtype)
    found = tail(entry)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    found.sum().backward()
    assert entry.grad.dtype == torch.float32
    assert entry.grad.abs().sum() > 0


@pytest.mark.parametrize(("shape", "named"), [((9, 3, 3), "9, 3, 3"), ((8, 4, 4), "8, 4, 4")])
def test_a_tail_that_does_not_return_its_declared_shape_is_refused(shape, named):
    tail = TeacherTail(nn.Conv2d(4, 8, 2, stride=2).eval(), (4, 6, 6), shape)
    message = rf"the tail's body must return its final_shape \({named}\), got \(8, 3, 3\)"
    with pytest.raises(ValueError, match=message):
        tail(torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("name", ["mixer_s16_224", "vit_relpos_small_patch16_224"])
def test_blocks_for_one_number_of_tokens_read_no_other(name):
    timm = pytest.importorskip("timm")
    teacher = timm.create_model(name, img_size=64, num_classes=5).eval()
    tail = get_tail(teacher, torch.randn(2, 3, 64, 64), blocks=1)
    with pytest.raises(ValueError, match=r"reads maps of size \(4, 4\), got \(6, 6\)"):
        tail(torch.randn(2, tail.entry_width, 6, 6))
