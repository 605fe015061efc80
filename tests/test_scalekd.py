"""ScaleKD: projector, views, losses and the path through the teacher, against explicit attention and DCT."""

import math

import pytest
import torch
from tail_teachers import MDistillerResNet, images, timm_teacher
from torch import nn
from torch.nn import functional as F  # noqa: N812

from disk_plugin.features.scalekd import (
    CrossAttentionProjector,
    ScaleKDLoss,
    logit_losses,
    view_distance,
    without_dc,
)
from disk_plugin.taps import TeacherTail, get_tail

NAMES = ["proxy", "main", "proxy_no_dc", "main_no_dc"]


# ---- oracles, in loops -----------------------------------------------------------------------------------------------


def dct_matrix(size):
    """DCT-II, not normalised: its inverse undoes any normalisation."""
    steps = torch.arange(size, dtype=torch.double)
    return torch.cos(math.pi / size * (steps.unsqueeze(0) + 0.5) * steps.unsqueeze(1))


def high_pass_by_dct(feature_map):
    rows, columns = dct_matrix(feature_map.shape[2]), dct_matrix(feature_map.shape[3])
    frequencies = torch.einsum("ih,nchw,jw->ncij", rows, feature_map, columns)
    frequencies[:, :, 0, 0] = 0
    return torch.einsum("hi,ncij,wj->nchw", torch.linalg.inv(rows), frequencies, torch.linalg.inv(columns))


def distance_by_hand(student_map, teacher_map, dc=True):
    """The mean over locations of 2 (1 - cos), one sample and location at a time."""
    if not dc:
        student_map, teacher_map = high_pass_by_dct(student_map), high_pass_by_dct(teacher_map)
    count, _, height, width = student_map.shape
    found = []
    for b in range(count):
        cosines = [
            torch.dot(student_map[b, :, h, w], teacher_map[b, :, h, w])
            / (student_map[b, :, h, w].norm() * teacher_map[b, :, h, w].norm())
            for h in range(height)
            for w in range(width)
        ]
        found.append(2 * (1 - sum(cosines) / len(cosines)))
    return torch.stack(found)


def layer_norm_by_hand(tokens, norm):
    centred = tokens - tokens.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def project_by_hand(projector, student_map, queries=None):
    """The projector, head by head and query by query."""
    conv, norm = projector.stem[0], projector.stem[1]
    x = F.conv2d(student_map, conv.weight, conv.bias, padding=1)
    if isinstance(norm, nn.BatchNorm2d):
        shape, dims = (1, -1, 1, 1), (0, 2, 3)
        mean, variance = x.mean(dims).view(shape), x.var(dims, unbiased=False).view(shape)
        x = (x - mean) / (variance + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)
    else:
        x = layer_norm_by_hand(x.permute(0, 2, 3, 1), norm).permute(0, 3, 1, 2)
    keys = (x.clamp(min=0) + projector.positions).flatten(2).transpose(1, 2)
    if queries is None:
        queries = projector.table.flatten(2).transpose(1, 2).repeat(len(student_map), 1, 1)
    first, last = projector.query[0], projector.query[2]
    q = (queries @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    k = keys @ projector.key.weight.T + projector.key.bias
    v = keys @ projector.value.weight.T + projector.value.bias
    width = projector.teacher_width // projector.heads
    samples = []
    for b in range(len(student_map)):
        rows = []
        for i in range(q.shape[1]):
            read = []
            for head in range(projector.heads):
                part = slice(head * width, (head + 1) * width)
                scores = [torch.dot(q[b, i, part], k[b, j, part]) for j in range(k.shape[1])]
                powers = (projector.attention_scale * torch.stack(scores) / math.sqrt(width)).exp()
                read.append((powers / powers.sum()) @ v[b, :, part])
            rows.append(torch.cat(read))
        samples.append(torch.stack(rows))
    tokens = layer_norm_by_hand(torch.stack(samples) @ projector.out.weight.T + projector.out.bias, projector.norm)
    hidden = (tokens @ projector.ffn[0].weight.T + projector.ffn[0].bias).clamp(min=0)
    return tokens + hidden @ projector.ffn[2].weight.T + projector.ffn[2].bias


# ---- the projector ---------------------------------------------------------------------------------------------------


def test_learned_queries_give_one_token_per_location_of_the_table():
    projector = CrossAttentionProjector(64, 24, (14, 14), (14, 14))
    assert projector(torch.randn(2, 64, 14, 14)).shape == (2, 196, 24)
    assert projector(torch.randn(2, 64, 14, 14), size=(3, 5)).shape == (2, 15, 24)


def test_given_queries_give_one_token_each_whatever_the_students_size():
    projector = CrossAttentionProjector(128, 24, (14, 14))
    queries = torch.randn(2, 49, 24)
    for size in ((14, 14), (7, 7), (5, 9)):
        assert projector(torch.randn(2, 128, *size), queries).shape == (2, 49, 24)


def test_given_queries_go_before_the_table_and_without_either_it_raises():
    projector, student_map = CrossAttentionProjector(6, 8, (4, 4), (3, 3), heads=2).eval(), torch.randn(2, 6, 4, 4)
    queries = torch.randn(2, 9, 8)
    given = projector(student_map, queries)
    assert not torch.allclose(given, projector(student_map))
    with torch.no_grad():
        projector.table.copy_(queries[:1].transpose(1, 2).reshape(1, 8, 3, 3))
    torch.testing.assert_close(projector(student_map)[0], given[0])
    with pytest.raises(ValueError, match="has no table of queries: give queries, or build it with query_size"):
        CrossAttentionProjector(6, 8, (4, 4), heads=2)(student_map)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("given", [False, True])
def test_it_is_explicit_attention_head_by_head(norm, given):
    projector = CrossAttentionProjector(6, 8, (4, 3), None if given else (2, 3), heads=4, norm=norm).double()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    student_map = torch.randn(3, 6, 4, 3, dtype=torch.double, requires_grad=True)
    queries = torch.randn(3, 5, 8, dtype=torch.double, requires_grad=True) if given else None
    found, expected = projector(student_map, queries), project_by_hand(projector, student_map, queries)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    inputs = [student_map, *projector.parameters()] + ([queries] if given else [])
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((weight * value).sum(), inputs) for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_positions_and_queries_are_interpolated_for_another_size():
    projector = CrossAttentionProjector(6, 8, (4, 4), (4, 4), heads=2).eval()
    other = CrossAttentionProjector(6, 8, (7, 5), (3, 6), heads=2).eval()
    state = projector.state_dict()
    for name, size in {"positions": (7, 5), "table": (3, 6)}.items():
        state[name] = F.interpolate(state[name], size=size, mode="bilinear", align_corners=False)
    other.load_state_dict(state)
    student_map = torch.randn(2, 6, 7, 5)
    torch.testing.assert_close(projector(student_map, size=(3, 6)), other(student_map))
    assert not torch.allclose(projector(student_map)[:, :1], projector(student_map)[:, 1:2])


def test_without_sharpness_the_attention_is_uniform_and_the_query_does_not_matter():
    projector, student_map = CrossAttentionProjector(6, 8, (4, 4), heads=2).eval(), torch.randn(2, 6, 4, 4)
    queries = torch.randn(2, 2, 9, 8).unbind()
    assert not torch.allclose(*(projector(student_map, each) for each in queries))
    projector.attention_scale = 0.0
    torch.testing.assert_close(*(projector(student_map, each) for each in queries))


def test_with_a_layer_norm_samples_do_not_influence_each_other():
    student_map = torch.randn(4, 6, 4, 4)
    for norm, alike in {"layer": True, "batch": False}.items():
        projector = CrossAttentionProjector(6, 8, (4, 4), (2, 2), heads=2, norm=norm)
        assert torch.allclose(projector(student_map)[:2], projector(student_map[:2]), atol=1e-5) == alike


def test_the_parameters_for_swin_l_and_resnet_50_are_counted_to_the_digit():
    with torch.device("meta"):
        proxy = CrossAttentionProjector(1024, 768, (14, 14), (14, 14), heads=16)
        main = CrossAttentionProjector(2048, 1536, (7, 7), heads=24)
        body = nn.Conv2d(768, 1536, 2, stride=2).eval()
        loss = ScaleKDLoss(
            (1024, 14, 14),
            (2048, 7, 7),
            TeacherTail(body, (768, 14, 14), (1536, 7, 7)),
            proxy_heads=16,
            main_heads=24,
        )
    assert [sum(p.numel() for p in each.parameters()) for each in (proxy, main)] == [17_861_632, 70_117_376]
    assert sum(p.numel() for p in loss.trainable_parameters()) == 2 * (17_861_632 + 70_117_376)
    assert "trainable_parameters=175_958_016" in repr(loss)


# ---- the two views ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (7, 5), (1, 4)])
def test_the_map_without_its_mean_is_that_of_an_explicit_dct(size):
    feature_map = torch.randn(2, 3, *size, dtype=torch.double)
    torch.testing.assert_close(without_dc(feature_map), high_pass_by_dct(feature_map), rtol=1e-10, atol=1e-12)
    constant = torch.randn(2, 3, 1, 1, dtype=torch.double)
    torch.testing.assert_close(without_dc(feature_map + constant), without_dc(feature_map), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dc", [True, False])
def test_the_distance_is_the_mean_of_the_cosines_location_by_location(dc):
    student_map = torch.randn(3, 5, 4, 6, dtype=torch.double, requires_grad=True)
    teacher_map = torch.randn(3, 5, 4, 6, dtype=torch.double)
    found, expected = (measure(student_map, teacher_map, dc=dc) for measure in (view_distance, distance_by_hand))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(value.sum(), student_map)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_the_distance_ignores_the_length_at_each_location_and_is_4_for_opposite_maps():
    teacher_map = torch.randn(3, 5, 4, 6)
    scale = torch.rand(3, 1, 4, 6) + 0.1
    torch.testing.assert_close(view_distance(scale * teacher_map, teacher_map), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(view_distance(-teacher_map, teacher_map), torch.full((3,), 4.0))
    doubled = torch.cat([teacher_map, teacher_map])
    student_map = torch.randn(3, 5, 4, 6)
    once, twice = view_distance(student_map, teacher_map), view_distance(torch.cat([student_map] * 2), doubled)
    torch.testing.assert_close(twice, torch.cat([once, once]))


def test_without_the_mean_a_constant_per_channel_is_not_seen_and_with_it_it_is():
    teacher_map, constant = torch.randn(3, 5, 4, 6), torch.randn(1, 5, 1, 1)
    torch.testing.assert_close(
        view_distance(teacher_map + constant, teacher_map, dc=False), torch.zeros(3), rtol=0, atol=1e-5
    )
    assert (view_distance(teacher_map + constant, teacher_map) > 0.01).all()


def test_weights_per_location_are_the_authors_at_their_size():
    student_map, teacher_map = torch.randn(2, 8, 5, 7, 7)
    normalised = [F.normalize(each, dim=1) for each in (student_map, teacher_map)]
    authors = 0.08 * F.mse_loss(*normalised, reduction="sum") / 8
    torch.testing.assert_close(0.08 * 49 * view_distance(student_map, teacher_map).mean(), authors)


def test_a_flat_map_and_one_that_is_not_finite_do_not_spoil_the_gradient():
    teacher_map = torch.randn(3, 5, 4, 4)
    teacher_map[1] = 1.0
    teacher_map[2, 0, 0, 0] = torch.inf
    student_map = torch.randn(3, 5, 4, 4, requires_grad=True)
    for dc in (True, False):
        distance = view_distance(student_map, teacher_map, dc=dc)
        assert distance[:2].isfinite().all()
        assert distance[2].isnan()
        (gradient,) = torch.autograd.grad(torch.where(distance.isfinite(), distance, 0.0).sum(), student_map)
        assert gradient.isfinite().all()
        assert gradient[0].any()
        assert not gradient[2].any()
    flat = torch.ones(2, 5, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(view_distance(flat, teacher_map[:2], dc=False).sum(), flat)
    assert gradient.isfinite().all()


def test_a_target_does_not_require_grad_and_is_not_written_to():
    teacher_map = torch.randn(2, 5, 4, 4, requires_grad=True)
    before = teacher_map.detach().clone()
    student_map = torch.randn(2, 5, 4, 4, requires_grad=True)
    (view_distance(student_map, teacher_map) + view_distance(student_map, teacher_map, dc=False)).sum().backward()
    assert teacher_map.grad is None
    assert torch.equal(teacher_map, before)


def test_half_precision_is_upcast():
    maps = [1e3 * torch.randn(2, 5, 4, 4) for _ in range(2)]
    found = view_distance(maps[0].half(), maps[1].half(), dc=False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, view_distance(*maps, dc=False), rtol=1e-3, atol=1e-3)


# ---- the losses ------------------------------------------------------------------------------------------------------


def setting(dtype=torch.float32, samples=3, **settings):
    """A ScaleKD loss beside mdistiller's kind of teacher, and maps of a student."""
    torch.manual_seed(5)
    teacher = MDistillerResNet().to(dtype).eval()
    tail = get_tail(teacher, torch.randn(2, 3, 16, 16, dtype=dtype))
    loss = ScaleKDLoss((6, 8, 8), (10, 4, 4), tail, **{"proxy_heads": 2, "main_heads": 3, **settings}).to(dtype)
    stage3 = torch.randn(samples, 6, 8, 8, dtype=dtype, requires_grad=True)
    stage4 = torch.randn(samples, 10, 4, 4, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        teacher_map = teacher(torch.randn(samples, 3, 16, 16, dtype=dtype))[1]["feats"][-1]
    return loss, teacher, (stage3, stage4, teacher_map)


def to_map(tokens, size):
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *size)


def test_the_losses_are_the_papers_with_explicit_attention_and_dct():
    weights = {"original_weight": 3.92, "dc_removed_weight": 2.94, "proxy_weight": 0.5}
    loss, teacher, (stage3, stage4, teacher_map) = setting(torch.double, samples=2, **weights)
    found, expected = loss(stage3, stage4, teacher_map), {}
    for view, suffix, weight in (("original", "", 3.92), ("dc_removed", "_no_dc", 2.94)):
        proxy, _ = teacher.layer3(to_map(project_by_hand(loss.proxy[view], stage3), (8, 8)))
        main = to_map(project_by_hand(loss.main[view], stage4, proxy.flatten(2).transpose(1, 2)), (4, 4))
        dc = view == "original"
        expected[f"proxy{suffix}"] = 0.5 * weight * distance_by_hand(proxy, teacher_map, dc)
        expected[f"main{suffix}"] = weight * distance_by_hand(main, teacher_map, dc)
    assert list(found) == list(expected) == NAMES
    inputs = [stage3, stage4, *loss.trainable_parameters()]
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(sum(each.values()).sum(), inputs) for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-8)


def test_every_projector_and_both_stages_learn_and_the_teacher_does_not():
    loss, teacher, maps = setting()
    sum(loss(*maps).values()).mean().backward()
    assert all(value.grad.flatten(1).any(1).all() for value in maps[:2])
    assert all(parameter.grad is not None for parameter in loss.trainable_parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert set(loss.trainable_parameters()) == {p for p in loss.parameters() if p.requires_grad}


def test_stage_3_learns_through_the_queries_of_stage_4_unless_they_are_detached():
    loss, _, (stage3, stage4, teacher_map) = setting(proxy_weight=0.0)
    losses = loss(stage3, stage4, teacher_map)
    assert not losses["proxy"].any()
    (gradient,) = torch.autograd.grad(sum(losses.values()).sum(), stage3)
    assert gradient.flatten(1).any(1).all()
    queries = loss.project_proxy(stage3, "original", teacher_map)
    detached = view_distance(loss.project_main(stage4, "original", queries.detach()), teacher_map)
    assert torch.autograd.grad(detached.sum(), stage3, allow_unused=True) == (None,)


def test_the_teacher_stays_in_evaluation_mode_and_its_target_is_the_same_in_every_pass():
    teacher, x = timm_teacher("vit"), images("vit")
    loss = ScaleKDLoss((6, 4, 6), (8, 4, 6), get_tail(teacher, x))
    nn.ModuleList([loss]).train()
    assert loss.proxy["original"].training
    with torch.no_grad():
        assert torch.equal(teacher(x), teacher(x))
        entry = torch.randn(2, 48, 4, 6)
        assert torch.equal(loss.tail(entry), loss.tail(entry))


def test_a_teacher_in_training_mode_and_a_tail_without_gradients_are_refused():
    loss, teacher, maps = setting()
    with torch.no_grad():
        assert not loss(*maps)["main"].requires_grad  # a validation, with no gradient anywhere
    teacher.train()
    with pytest.raises(RuntimeError, match="the teacher of this tail is in training mode"):
        loss(*maps)


@pytest.mark.parametrize(("removed", "kept"), [("dc_removed_weight", NAMES[:2]), ("original_weight", NAMES[2:])])
def test_a_view_of_weight_0_has_no_projectors(removed, kept):
    loss, _, maps = setting(**{removed: 0.0})
    assert list(loss(*maps)) == kept
    assert len(loss.proxy) == len(loss.main) == 1


def test_the_state_holds_the_projectors_alone_and_loads_beside_another_copy_of_the_teacher():
    loss, _, maps = setting()
    assert {key.split(".")[0] for key in loss.state_dict()} == {"proxy", "main"}
    other, *_ = setting()
    with torch.no_grad():
        for parameter in loss.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other.load_state_dict(loss.state_dict())
    for module in (loss, other):
        module.eval()
    torch.testing.assert_close(loss(*maps), other(*maps))


@pytest.mark.parametrize("frozen", ["layer", "evaluation mode"])
def test_a_guide_of_0_changes_nothing_and_a_sample_of_weight_0_gets_no_gradient(frozen):
    loss, _, maps = setting(norm="layer" if frozen == "layer" else "batch")
    loss = loss.train(frozen == "layer")
    total = sum(loss(*maps).values())
    guide = torch.zeros(3)
    assert torch.equal((1 - guide) * total, total)
    guide[1] = 1.0
    gradients = torch.autograd.grad(((1 - guide) * total).mean(), maps[:2])
    for gradient in gradients:
        assert not gradient[1].any()
        assert gradient[[0, 2]].flatten(1).any(1).all()


def test_other_sizes_of_all_three_maps_are_read():
    loss, teacher, _ = setting()
    for size, entry in (((4, 4), (8, 8)), ((2, 5), (3, 7))):
        with torch.no_grad():
            final = teacher(torch.randn(2, 3, 4 * size[0], 4 * size[1]))[1]["feats"][-1]
        losses = loss(torch.randn(2, 6, *entry), torch.randn(2, 10, 3, 3), final)
        assert all(value.isfinite().all() for value in losses.values())


def test_the_last_blocks_of_an_isotropic_teacher_are_passed_by_the_main_projection_too():
    teacher, x = timm_teacher("eva 02"), images("eva 02")
    tail = get_tail(teacher, x, blocks=2, final_blocks=1)
    loss = ScaleKDLoss((6, 4, 6), (8, 4, 6), tail)
    stage4, queries = torch.randn(2, 8, 4, 6), torch.randn(2, 48, 4, 6)
    tokens = loss.main["original"](stage4, queries.flatten(2).transpose(1, 2))
    projected = loss.project_main(stage4, "original", queries)
    torch.testing.assert_close(projected, tail.finish(to_map(tokens, (4, 6))))
    assert not torch.allclose(projected, to_map(tokens, (4, 6)))


def test_under_autocast_the_losses_are_float32():
    loss, _, maps = setting(norm="layer")
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*maps)
    assert all(value.dtype == torch.float32 for value in found.values())
    torch.testing.assert_close(found, loss(*maps), rtol=0.05, atol=0.05)


def test_a_few_steps_lower_every_loss():
    loss, _, maps = setting()
    optimizer = torch.optim.Adam(loss.trainable_parameters(), lr=1e-3)
    first = {name: value.mean().item() for name, value in loss(*maps).items()}
    for _ in range(30):
        optimizer.zero_grad()
        sum(loss(*maps).values()).mean().backward()
        optimizer.step()
    assert all(value.mean().item() < 0.8 * first[name] for name, value in loss(*maps).items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: CrossAttentionProjector(6, 10, (4, 4), heads=4),
            ValueError,
            r"divide the teacher's width 10, one of \[1, 2",
        ),
        (lambda: CrossAttentionProjector(0, 8, (4, 4)), ValueError, "student_width must be >= 1, got 0"),
        (lambda: CrossAttentionProjector(6, 8, 4), ValueError, r"student_size must be \(height, width\), got 4"),
        (lambda: CrossAttentionProjector(6, 8, (4, 4), norm="group"), ValueError, "norm must be one of .* got 'group'"),
        (
            lambda: CrossAttentionProjector(6, 8, (4, 4))(torch.ones(2, 5, 4, 4)),
            ValueError,
            r"\(N, 6, H, W\), got \(2, 5",
        ),
        (
            lambda: CrossAttentionProjector(6, 8, (4, 4))(torch.ones(2, 6, 4, 4), torch.ones(2, 9, 7)),
            ValueError,
            r"queries must have shape \(2, L, 8\), got \(2, 9, 7\)",
        ),
        (lambda: without_dc(torch.ones(2, 3, 1, 1)), ValueError, "1 x 1 is its own mean.* set dc_removed_weight=0"),
        (lambda: view_distance(*[torch.ones(2, 3, 1, 1)] * 2, dc=False), ValueError, "1 x 1 is its own mean"),
        (lambda: view_distance(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 2, 2)), ValueError, "must have one shape"),
        (lambda: setting(original_weight=0, dc_removed_weight=0), ValueError, "must be > 0, got 0 and 0"),
        (lambda: setting(dc_removed_weight=-1.0), ValueError, "dc_removed_weight must be >= 0, got -1.0"),
        (lambda: ScaleKDLoss((6, 8, 8), (10, 4, 4), nn.Identity()), TypeError, "must be a TeacherTail.* got Identity"),
        (lambda: ScaleKDLoss(6, (10, 4, 4), tail_to_1x1()), ValueError, r"stage3_shape must be \(channels, height"),
        (lambda: ScaleKDLoss((6, 8, 8), (10, 4, 4), tail_to_1x1()), ValueError, "final map has size 1 x 1"),
        (
            lambda: setting()[0](*[torch.ones(2, 6, 8, 8)] * 3),
            ValueError,
            r"teacher_map must have shape \(N, 24, H, W\)",
        ),
        (
            lambda: setting()[0](torch.ones(1, 6, 8, 8), torch.ones(2, 10, 4, 4), torch.ones(2, 24, 4, 4)),
            ValueError,
            "stage3 must have the batch size of teacher_map 2, got 1",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def tail_to_1x1():
    return TeacherTail(nn.Conv2d(8, 8, 2).eval(), (8, 2, 2), (8, 1, 1))


def test_a_final_map_of_1_x_1_is_compared_as_it_is():
    loss = ScaleKDLoss((6, 2, 2), (10, 1, 1), tail_to_1x1(), dc_removed_weight=0)
    losses = loss(torch.randn(3, 6, 2, 2), torch.randn(3, 10, 1, 1), torch.randn(3, 8, 1, 1))
    assert list(losses) == ["proxy", "main"]


# ---- the losses of logits --------------------------------------------------------------------------------------------


def test_the_logit_losses_are_a_soft_cross_entropy_and_the_rest_of_the_cross_entropy():
    student, teacher = torch.randn(2, 6, 5, dtype=torch.double).unbind()
    student.requires_grad_()
    target = torch.arange(6) % 5
    found = logit_losses(student, teacher, target, ce_weight=0.7, kd_weight=0.3, temperature=2.0)
    for b in range(6):
        p, q = ((logits[b] / 2).exp() / (logits[b] / 2).exp().sum() for logits in (teacher, student))
        torch.testing.assert_close(found["kd"][b], -0.3 * 4 * sum(p[c] * q[c].log() for c in range(5)))
    torch.testing.assert_close(found["ce"], 0.7 * F.cross_entropy(student, target, reduction="none"))
    log_p, log_q = ((logits / 2).log_softmax(1) for logits in (teacher, student))
    divergence = 0.3 * 4 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    gradients = [torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for loss in (found["kd"], divergence)]
    torch.testing.assert_close(*gradients)


def test_without_distillation_the_cross_entropy_is_whole_and_ignored_targets_count_nothing():
    student, teacher, target = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, -100, 4])
    student[2] = torch.nan
    found = logit_losses(student, teacher, target, ce_weight=1.0, kd_weight=0.0)
    torch.testing.assert_close(found["ce"], F.cross_entropy(student, target, reduction="none"))
    assert not found["kd"].any()
    losses = logit_losses(student.requires_grad_(), teacher, target)
    assert not losses["kd"][2]
    (gradient,) = torch.autograd.grad(sum(losses.values()).sum(), student)
    assert gradient.isfinite().all()
    assert not gradient[2].any()


def test_logit_losses_take_probabilities_and_large_logits_in_half_precision():
    student, teacher, target = 100 * torch.randn(4, 5), 100 * torch.randn(4, 5), torch.randn(4, 5).softmax(1)
    found = logit_losses(student.half(), teacher.half(), target)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in found.values())
    torch.testing.assert_close(found["ce"], 0.5 * F.cross_entropy(student.half().float(), target, reduction="none"))
    with pytest.raises(ValueError, match=r"kd_weight must be >= 0, got -1\.5"):
        logit_losses(student, teacher, target, kd_weight=-1.5)


# ---- one step of training for each kind of pair ----------------------------------------------------------------------


def timm_student(name, **settings):
    return pytest.importorskip("timm").create_model(name, num_classes=5, **settings)


def resnet_50_like():
    resnet = pytest.importorskip("timm.models.resnet")
    return resnet.ResNet(resnet.Bottleneck, (1, 1, 1, 1), num_classes=5, channels=(4, 8, 12, 16), zero_init_last=False)


PAIRS = {
    "swin -> resnet 50": ("swin", resnet_50_like),
    "vit -> mobilenet": ("vit", lambda: timm_student("mobilenetv3_small_050")),
    "convnext -> vit": (
        "convnext",
        lambda: timm_student("vit_tiny_patch16_224", embed_dim=32, depth=3, num_heads=2, img_size=(64, 96)),
    ),
    "resnet -> resnet 8x4": ("resnet", lambda: MDistillerResNet((8, 12, 16), depth=1)),
}


def student_maps(student, x):
    if isinstance(student, MDistillerResNet):
        logits, features = student(x)
        return logits, features["feats"][-2:]
    final, maps = student.forward_intermediates(x, indices=[-2, -1] if hasattr(student, "blocks") else 2)
    return student.forward_head(final), maps


@pytest.mark.parametrize("name", PAIRS)
def test_one_step_trains_student_and_projectors_and_leaves_the_teacher_as_it_was(name):
    family, build = PAIRS[name]
    teacher, x, target = timm_teacher(family), images(family, 4), torch.arange(4) % 5
    student = build().train()
    with torch.no_grad():
        before, state = teacher(x), {key: value.clone() for key, value in teacher.state_dict().items()}
        shapes = [tuple(each.shape[1:]) for each in student_maps(student, x)[1]]
    loss = ScaleKDLoss(*shapes, get_tail(teacher, x), norm="layer")
    parameters = dict(nn.ModuleDict({"student": student, "loss": loss}).named_parameters())
    parameters = {each: value for each, value in parameters.items() if value.requires_grad}
    kept = {each: value.detach().clone() for each, value in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)

    with torch.no_grad():
        features = teacher.forward_features(x)
        teacher_logits = teacher.forward_head(features)
    teacher_map = final_map(teacher, features, loss.tail.final_size)
    logits, maps = student_maps(student, x)
    losses = {**logit_losses(logits, teacher_logits, target), **loss(*maps, teacher_map)}
    assert all(value.shape == (4,) and value.isfinite().all() for value in losses.values())
    sum(losses.values()).mean().backward()
    optimizer.step()

    still = [each for each, value in parameters.items() if torch.equal(value, kept[each])]
    assert all(each.endswith("key.bias") for each in still), still  # it adds the same to every score of a softmax
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    with torch.no_grad():
        assert torch.equal(teacher(x), before)


def final_map(teacher, features, size):
    if features.ndim == 3:
        return to_map(features[:, teacher.num_prefix_tokens :], size)
    return features.permute(0, 3, 1, 2) if getattr(teacher, "output_fmt", "") == "NHWC" else features


def gradient_of_the_last_map(attention_scale, half):
    torch.manual_seed(0)
    tail = TeacherTail(nn.Conv2d(32, 48, 2, stride=2).eval(), (32, 8, 8), (48, 4, 4))
    loss = ScaleKDLoss((12, 8, 8), (24, 4, 4), tail, attention_scale=attention_scale, norm="layer")
    before, last = torch.randn(4, 12, 8, 8), torch.randn(4, 24, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = loss(before, last, torch.randn(4, 48, 4, 4))
    return torch.autograd.grad(found["main_no_dc"].sum(), last)[0].flatten()


@pytest.mark.parametrize(("attention_scale", "low", "high"), [(5.0, 0.7, 1.0), (0.2, -1.0, 0.4)])
def test_a_soft_attention_is_rounded_away_in_half_precision_as_the_page_says(attention_scale, low, high):
    full, half = (gradient_of_the_last_map(attention_scale, half) for half in (False, True))
    assert low < nn.functional.cosine_similarity(full, half, dim=0) <= high
