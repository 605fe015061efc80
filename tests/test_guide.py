import copy
import inspect
import re

import pytest
import torch
from torch import nn

from disk_plugin import GuideHead

N, C, D = 6, 10, 7


def inputs(*positions, dtype=torch.float32):
    return torch.randn(N, C, *positions, dtype=dtype), torch.randn(N, D, *positions, dtype=dtype)


def layers_of(guide, kind):
    return [module for module in guide.modules() if isinstance(module, kind)]


# ---- values and shapes -----------------------------------------------------------------------------------------------


def test_values_of_a_case_worked_by_hand():
    guide = GuideHead(2, 1, hidden_dims=(2,))
    first, last = layers_of(guide, nn.Linear)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))  # (l_0 + f, l_1)
        first.bias.zero_()
        last.weight.copy_(torch.tensor([[3.0, -5.0]]))
        last.bias.fill_(0.5)
    logits, features = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
    # LayerNorm of two values is (1, -1) or (-1, 1). Sample 0: (4, 2) -> (1, -1) -> ReLU (1, 0) -> 3 + .5;
    # sample 1: (1, 2) -> (-1, 1) -> ReLU (0, 1) -> -5 + .5. Its eps of 1e-5 costs less than 1e-3.
    torch.testing.assert_close(guide(logits, features), torch.tensor([3.5, -4.5]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("masked", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("classes", [20, 100, 1000])
def test_masked_classes_do_not_drown_the_others(masked, classes):
    guide, logits = GuideHead(classes), 3 * torch.randn(256, classes)
    plain = guide(logits).sigmoid().std()
    logits[:, [1, 3]] = masked
    found = guide(logits).sigmoid()
    assert found.isfinite().all()
    assert found.std() > 0.2 * plain
    dense = logits.reshape(16, 16, classes).movedim(2, 1)
    torch.testing.assert_close(guide(dense).sigmoid().flatten(), found)
    found.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in guide.parameters())


def test_a_logit_far_above_all_others_is_finite_and_ordinary_ones_are_read_as_they_are():
    guide, logits = GuideHead(C), 3 * torch.randn(N, C)
    torch.testing.assert_close(guide(logits), guide.mlp(logits).squeeze(1), rtol=0, atol=0)
    logits[:, 0] = 3e38
    assert guide(logits).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(value):
    logits, features = inputs()
    features[0, 0] = value
    assert not GuideHead(C, D)(logits, features)[0].isfinite()
    logits[1, 0] = torch.nan
    assert GuideHead(C, D)(logits, features)[1].isnan()


@pytest.mark.parametrize("positions", [(), (3,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_output_has_one_value_per_position(positions, norm):
    logits, features = inputs(*positions)
    assert GuideHead(C, D, norm=norm)(logits, features).shape == (N, *positions)
    assert GuideHead(C, norm=norm)(logits).shape == (N, *positions)


def test_pooled_features_are_shared_by_all_positions():
    guide, (logits, _) = GuideHead(C, D), inputs(3, 4)
    features = torch.randn(N, D)
    expanded = features[:, :, None, None].expand(N, D, 3, 4).contiguous()
    assert torch.equal(guide(logits, features), guide(logits, expanded))


def test_dense_output_is_that_of_each_position_alone():
    guide, (logits, features) = GuideHead(C, D), inputs(2, 3)
    dense = guide(logits, features)
    for row in range(2):
        for column in range(3):
            alone = guide(logits[:, :, row, column], features[:, :, row, column])
            torch.testing.assert_close(dense[:, row, column], alone)


def test_permuting_the_batch_permutes_the_output():
    guide, (logits, features), order = GuideHead(C, D), inputs(2), torch.randperm(N)
    torch.testing.assert_close(guide(logits[order], features[order]), guide(logits, features)[order])


def test_every_input_moves_the_output():
    guide, (logits, features) = GuideHead(C, D), inputs()
    values = guide(logits.requires_grad_(), features.requires_grad_())
    for gradient in torch.autograd.grad(values.sum(), [logits, features]):
        assert (gradient.abs().sum(0) > 0).all()


def test_use_logits_false_ignores_the_logits():
    guide, (logits, features) = GuideHead(C, D, use_logits=False), inputs()
    assert torch.equal(guide(logits, features), guide(torch.full_like(logits, float("nan")), features))
    assert layers_of(guide, nn.Linear)[0].in_features == D


def test_use_logits_false_takes_the_positions_from_the_logits():
    guide = GuideHead(C, D, use_logits=False)
    values = guide(torch.randn(N, C, 3, 4), torch.randn(N, D))
    assert values.shape == (N, 3, 4)
    torch.testing.assert_close(values, values[:, :1, :1].expand(N, 3, 4))


def test_output_is_not_squashed():
    guide, (logits, features) = GuideHead(C, D), inputs()
    with torch.no_grad():
        layers_of(guide, nn.Linear)[-1].bias.fill_(100.0)
    assert (guide(logits, features) > 1).all()


def test_empty_batch_gives_no_values():
    assert GuideHead(C, D)(torch.zeros(0, C), torch.zeros(0, D)).shape == (0,)


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "present", "absent"),
    [({}, nn.LayerNorm, nn.BatchNorm1d), ({"norm": "batch"}, nn.BatchNorm1d, nn.LayerNorm)],
)
def test_norm_chooses_the_norm_of_every_hidden_layer(settings, present, absent):
    guide = GuideHead(C, D, **settings)
    assert len(layers_of(guide, present)) == len(layers_of(guide, nn.ReLU)) == 2
    assert layers_of(guide, absent) == []


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_parameters_are_those_of_the_three_layer_mlp(norm):
    # 256 + 100 = 356 inputs: Linear 356 * 64 + 64 = 22848, norm 2 * 64 = 128, Linear 64 * 128 + 128 = 8320,
    # norm 2 * 128 = 256, Linear 128 + 1 = 129; together 31681
    guide = GuideHead(num_classes=100, feature_dim=256, norm=norm)
    assert sum(parameter.numel() for parameter in guide.parameters()) == 31681
    assert all(parameter.requires_grad for parameter in guide.parameters())


@pytest.mark.parametrize(
    ("settings", "width"), [({}, C), ({"feature_dim": D}, C + D), ({"feature_dim": D, "use_logits": False}, D)]
)
def test_layers_have_the_widths_asked_for(settings, width):
    guide = GuideHead(C, hidden_dims=(5, 4, 3), **settings)
    assert [(layer.in_features, layer.out_features) for layer in layers_of(guide, nn.Linear)] == [
        (width, 5),
        (5, 4),
        (4, 3),
        (3, 1),
    ]


@pytest.mark.parametrize("positions", [(), (1, 1)])
def test_layer_norm_trains_on_a_batch_of_one(positions):
    guide = GuideHead(C, D).train()
    logits, features = torch.randn(1, C, *positions), torch.randn(1, D, *positions)
    values = guide(logits, features)
    values.sum().backward()
    assert values.shape == (1, *positions)
    assert values.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in guide.parameters())


def test_layer_norm_gives_the_same_in_training_and_evaluation():
    guide, (logits, features) = GuideHead(C, D), inputs()
    assert torch.equal(guide.train()(logits, features), guide.eval()(logits, features))


def test_batch_norm_sees_the_positions_of_all_samples():
    guide, (logits, features) = GuideHead(C, D, norm="batch").train(), inputs(2, 3)
    folded = [value.permute(0, 2, 3, 1).reshape(N * 6, -1) for value in (logits, features)]
    torch.testing.assert_close(guide(logits, features).flatten(), guide(*folded))


# ---- dtype, memory layout, gradients, copies -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_are_cast_to_the_dtype_of_the_parameters(dtype):
    guide, (logits, features) = GuideHead(C, D), inputs(dtype=dtype)
    values = guide(logits, features)
    assert values.dtype == torch.float32
    assert torch.equal(values, guide(logits.float(), features.float()))


def test_double_guide_computes_in_double():
    guide, (logits, features) = GuideHead(C, D), inputs()
    single, double = guide(logits, features), copy.deepcopy(guide).double()(logits, features)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single)


def test_logits_and_features_may_differ_in_dtype():
    guide, (logits, features) = GuideHead(C, D), inputs()
    assert torch.equal(guide(logits.double(), features), guide(logits, features))


def test_non_contiguous_inputs_give_the_same():
    guide = GuideHead(C, D)
    logits, features = torch.randn(3, 4, C, N).permute(3, 2, 0, 1), torch.randn(N, 2 * D)[:, ::2]
    assert not logits.is_contiguous()
    assert not features.is_contiguous()
    torch.testing.assert_close(guide(logits, features), guide(logits.contiguous(), features.contiguous()))


def test_channels_last_inputs_give_the_same():
    guide, (logits, features) = GuideHead(C, D), inputs(2, 3)
    last = [value.to(memory_format=torch.channels_last) for value in (logits, features)]
    torch.testing.assert_close(guide(*last), guide(logits, features))


def test_gradients_reach_every_parameter_and_inputs_that_ask_for_them():
    guide, (logits, features) = GuideHead(C, D), inputs(2)
    logits.requires_grad_()
    guide(logits, features).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in guide.parameters())
    assert logits.grad.isfinite().all()
    assert features.grad is None


def test_gradients_are_right_in_double():
    guide = GuideHead(3, 2, hidden_dims=(4, 5)).double()
    logits, features = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(guide, (logits.requires_grad_(), features.requires_grad_()))


def test_inputs_are_left_as_they_are():
    guide, (logits, features) = GuideHead(C, D), inputs()
    before = logits.clone(), features.clone()
    guide(logits, features)
    assert torch.equal(logits, before[0])
    assert torch.equal(features, before[1])


def test_huge_logits_give_finite_values_and_gradients():
    guide = GuideHead(C)
    values = guide(torch.tensor([[1e4, -1e4] * (C // 2)]))
    values.sum().backward()
    assert values.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in guide.parameters())


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_deepcopy_gives_the_same_and_is_independent(norm):
    guide, (logits, features) = GuideHead(C, D, norm=norm).eval(), inputs()
    copied = copy.deepcopy(guide)
    before = guide(logits, features)
    assert torch.equal(copied(logits, features), before)
    with torch.no_grad():
        layers_of(copied, nn.Linear)[-1].bias.add_(1)
    assert torch.equal(guide(logits, features), before)


def test_compiled_guide_gives_the_same_in_one_graph():
    guide, (logits, features) = GuideHead(C, D), inputs(2)
    compiled = torch.compile(guide, fullgraph=True, backend="eager")
    assert torch.equal(compiled(logits, features), guide(logits, features))


# ---- errors and documentation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_classes": 1}, ValueError, "num_classes must be >= 2, got 1"),
        ({"feature_dim": -1}, ValueError, "feature_dim must be >= 0, got -1"),
        ({"norm": "group"}, ValueError, r"norm must be one of \['layer', 'batch'\], got 'group'"),
        ({"use_logits": False}, ValueError, "use_logits=False needs feature_dim > 0, got feature_dim=0"),
        ({"hidden_dims": ()}, ValueError, r"hidden_dims must name at least one layer, got \(\)"),
        ({"hidden_dims": (64, 0)}, ValueError, "hidden_dims must be >= 1, got 0"),
        ({"num_classes": 10.0}, TypeError, r"num_classes must be an int, got float 10\.0"),
        ({"num_classes": True}, TypeError, "num_classes must be an int, got bool True"),
        ({"feature_dim": None}, TypeError, "feature_dim must be an int, got NoneType"),
        ({"hidden_dims": (64.0,)}, TypeError, r"hidden_dims must be an int, got float 64\.0"),
        ({"hidden_dims": 64}, TypeError, "int"),
    ],
)
def test_constructor_refuses(settings, error, message):
    with pytest.raises(error, match=message):
        GuideHead(**{"num_classes": C} | settings)


@pytest.mark.parametrize(
    ("feature_dim", "logits", "features", "error", "message"),
    [
        (0, (N, C + 1), None, ValueError, r"teacher_logits must have shape \(N, 10, \.\.\.\), got \(6, 11\)"),
        (0, (C,), None, ValueError, r"teacher_logits must have shape \(N, 10, \.\.\.\), got \(10,\)"),
        (D, (N, C), None, ValueError, "the guide was built with feature_dim=7, got no teacher_features"),
        (0, (N, C), (N, D), ValueError, r"built without features \(feature_dim=0\), got .* of shape \(6, 7\)"),
        (D, (N, C), (N, D + 1), ValueError, r"teacher_features must have shape \(6, 7\), got \(6, 8\)"),
        (D, (N, C), (N + 1, D), ValueError, r"teacher_features must have shape \(6, 7\), got \(7, 7\)"),
        (D, (N, C), (N, D, 2, 2), ValueError, r"teacher_features must have shape \(6, 7\), got \(6, 7, 2, 2\)"),
        (D, (N, C, 2), (N, D, 3), ValueError, r"must have shape \(6, 7\) or \(6, 7, 2\), got \(6, 7, 3\)"),
        (D, (N, C, 2, 2), (N, D, 1, 1), ValueError, r"\(6, 7\) or \(6, 7, 2, 2\), got \(6, 7, 1, 1\)"),
    ],
)
def test_forward_refuses_another_shape(feature_dim, logits, features, error, message):
    with pytest.raises(error, match=message):
        GuideHead(C, feature_dim)(torch.zeros(logits), None if features is None else torch.zeros(features))


@pytest.mark.parametrize(
    ("logits", "features", "message"),
    [
        ([[0.0] * C], torch.zeros(1, D), "teacher_logits must be a Tensor, got list"),
        (torch.zeros(1, C, dtype=torch.int64), torch.zeros(1, D), r"teacher_logits .*floating-point, got torch\.int64"),
        (torch.zeros(1, C), [[0.0] * D], "teacher_features must be a Tensor, got list"),
        (torch.zeros(1, C), torch.zeros(1, D, dtype=torch.bool), r"teacher_features .*floating-point, got torch\.bool"),
    ],
)
def test_forward_refuses_another_type(logits, features, message):
    with pytest.raises(TypeError, match=message):
        GuideHead(C, D)(logits, features)


def test_use_logits_false_still_checks_the_logits():
    with pytest.raises(ValueError, match="teacher_logits must have shape"):
        GuideHead(C, D, use_logits=False)(torch.zeros(N, C + 1), torch.zeros(N, D))


def test_docstring_names_the_arguments_of_the_signature():
    block = re.search(r"Args:\n(.*?)\n\n", inspect.cleandoc(GuideHead.__doc__), re.DOTALL).group(1)
    assert re.findall(r"^ {4}(\w+):", block, re.MULTILINE) == list(inspect.signature(GuideHead).parameters)
