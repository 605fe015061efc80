"""Feature maps of any classifier by module paths, of timm's by their own methods; grids that are not square."""

import copy

import pytest
import torch
from tail_teachers import CLASSES, MDistillerResNet
from torch import nn

from disk_plugin.taps import Layout, with_maps
from disk_plugin.taps.intermediate import Intermediate

PATHS = {"before_last": "layer2", "last": "layer3"}

# model: settings, size of the images, shapes of the two maps
TIMM = {
    "test_resnet": ({}, (64, 96), (192, 4, 6), (96, 2, 3)),
    "test_convnext": ({}, (64, 96), (48, 4, 6), (64, 2, 3)),
    "test_efficientnet": ({}, (64, 64), (48, 4, 4), (256, 2, 2)),
    "test_vit": ({"img_size": (32, 48)}, (32, 48), (64, 2, 3), (64, 2, 3)),
    "mixer_s32_224": ({"img_size": (64, 96)}, (64, 96), (512, 2, 3), (512, 2, 3)),
    "mobilenetv3_small_050": ({}, (64, 64), (24, 4, 4), (288, 2, 2)),
}


def test_modules_named_by_their_paths_show_their_outputs():
    model, x = MDistillerResNet().eval(), torch.randn(2, 3, 16, 16)
    logits, maps = with_maps(model, PATHS)(x)
    expected, features = model(x)
    assert torch.equal(logits, expected)
    assert torch.equal(maps["before_last"], features["feats"][-2])
    assert torch.equal(maps["last"], features["feats"][-1])


def test_a_tap_changes_nothing_of_the_model_and_copies_have_their_own():
    model, x = MDistillerResNet().eval(), torch.randn(2, 3, 16, 16)
    state = set(model.state_dict())
    tap = with_maps(model, PATHS)
    again = copy.deepcopy(tap)
    with torch.no_grad():
        again.model.conv1.weight.zero_()
    assert not torch.equal(tap(x)[1]["last"], again(x)[1]["last"])
    assert set(model.state_dict()) == state
    model(x)
    assert model.layer3._disk_maps is None


def test_tokens_become_a_map_and_a_tuple_its_first_element():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.pair = nn.Linear(3, 4), nn.RNN(4, 6, batch_first=True)

        def forward(self, x):
            return self.pair(self.embed(x.flatten(2).transpose(1, 2)))[0].mean(1)

    model, x = Tokens(), torch.randn(2, 3, 4, 4)
    _, maps = with_maps(model, {"before_last": "embed", "last": "pair"})(x)
    assert {name: tuple(each.shape) for name, each in maps.items()} == {
        "before_last": (2, 4, 4, 4),
        "last": (2, 6, 4, 4),
    }
    torch.testing.assert_close(maps["before_last"][:, :, 1, 2], model.embed(x[:, :, 1, 2]))
    with pytest.raises(
        ValueError, match=r"'last', the output of 'pair', must have shape \(N, C, H, W\), got \(2, 12, 6"
    ):
        with_maps(model, {"last": "pair"})(torch.randn(2, 3, 3, 4))


class ChannelsLast(nn.Module):
    """Two maps of which the channels are the last dimension, as torchvision's Swin has them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 10), nn.Linear(10, 20)

    def forward(self, x):
        out = self.second(self.first(x.permute(0, 2, 3, 1)))
        return out.mean((1, 2))


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (7, 13)])
def test_a_map_with_its_channels_last_is_told_by_the_images(size):
    model, x = ChannelsLast(), torch.randn(2, 3, *size)
    _, maps = with_maps(model, {"before_last": "first", "last": "second"})(x)
    expected = model.first(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(maps["before_last"], expected)
    assert maps["last"].shape == (2, 20, *size)


@pytest.mark.parametrize(
    ("channels", "size", "stride"),
    [(8, (8, 8), 1), (6, (12, 18), 2), (4, (13, 7), 2), (3, (32, 32), 8), (16, (33, 65), 4)],
)
def test_a_map_with_its_channels_first_stays_as_it_is(channels, size, stride):
    model = nn.Sequential(nn.Conv2d(3, channels, 3, stride=stride, padding=1), nn.Flatten(2))
    x = torch.randn(2, 3, *size)
    assert torch.equal(with_maps(model, {"last": "0"})(x)[1]["last"], model[0](x))


def test_torchvisions_swin_shows_maps():
    vision = pytest.importorskip("torchvision")
    model = vision.models.swin_t(num_classes=CLASSES).eval()
    _, maps = with_maps(model, {"before_last": "features.5", "last": "features.7"})(torch.randn(1, 3, 64, 96))
    assert {name: tuple(each.shape) for name, each in maps.items()} == {
        "before_last": (1, 384, 4, 6),
        "last": (1, 768, 2, 3),
    }


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_a_last_stage_that_keeps_the_size_is_still_the_last(stride):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=CLASSES, output_stride=stride).eval()
    with torch.no_grad():
        _, maps = with_maps(model)(torch.randn(1, 3, 64, 64))
        torch.testing.assert_close(model.layer4(maps["before_last"]), maps["last"])


def test_of_two_heads_in_training_the_first_counts():
    timm = pytest.importorskip("timm")
    settings = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 2}
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=CLASSES, **settings)
    model.set_distilled_training(True)
    tap = with_maps(model.train())
    logits, maps = tap(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, CLASSES)
    assert maps["last"].shape == (2, 48, 2, 2)


@pytest.mark.parametrize("name", TIMM)
def test_timms_models_show_the_map_before_their_last_stage(name):
    timm = pytest.importorskip("timm")
    settings, size, before, last = TIMM[name]
    model, x = timm.create_model(name, num_classes=CLASSES, **settings).eval(), torch.randn(2, 3, *size)
    tap = with_maps(model)
    with torch.no_grad():
        logits, maps = tap(x)
        torch.testing.assert_close(logits, model(x))
    assert (tuple(maps["before_last"].shape[1:]), tuple(maps["last"].shape[1:])) == (before, last)
    assert not model.training
    if name == "test_resnet":
        torch.testing.assert_close(model.layer4(maps["before_last"]), maps["last"])
    if name in ("test_vit", "mixer_s32_224"):  # row by row, without class tokens
        torch.testing.assert_close(maps["last"].flatten(2).transpose(1, 2), model.forward_features(x)[:, -6:])


def test_of_twelve_equal_blocks_the_ninth_is_read():
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES, img_size=32, embed_dim=12).train()
    assert Intermediate.of(model, torch.randn(1, 3, 32, 32)).position == 8
    assert model.training


def test_a_student_whose_maps_are_read_trains_as_without():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = timm.create_model("test_resnet", num_classes=CLASSES), torch.randn(4, 3, 64, 64)
    other = copy.deepcopy(model)
    with_maps(model)(x)[0].sum().backward()
    other(x).sum().backward()
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, another.grad)
    assert all(map(torch.equal, model.buffers(), other.buffers()))


def test_a_grid_that_is_known_need_not_be_square():
    tokens = torch.randn(2, 1 + 6, 4)
    with pytest.raises(ValueError, match="expected the tokens of a square image, got 6 of them"):
        Layout("NLC", 1).to_map(tokens)
    found = Layout("NLC", 1, (2, 3)).to_map(tokens)
    assert found.shape == (2, 4, 2, 3)
    assert torch.equal(found[:, :, 1, 0], tokens[:, 1 + 3])
    assert Layout("NLC", 1, (2, 3)).to_map(torch.randn(2, 1 + 16, 4)).shape == (2, 4, 4, 4)  # images of another size
    with pytest.raises(ValueError, match=r"of a square image or a grid of \(2, 3\), got 7 of them"):
        Layout("NLC", 0, (2, 3)).to_map(tokens)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: with_maps(3), TypeError, "model must be a Module, got int"),
        (lambda: with_maps(MDistillerResNet()), ValueError, "paths must name the modules whose outputs are the maps"),
        (
            lambda: with_maps(MDistillerResNet(), {"last": "layer9"}),
            ValueError,
            r"paths\['last'\] must name a module of the model, got 'layer9'; its last ones: .*fc",
        ),
        (
            lambda: with_maps(torch.compile(MDistillerResNet())),
            ValueError,
            r"expected a model that is not compiled, got .* call torch\.compile\(with_maps\(model\)\) instead",
        ),
        (
            lambda: Intermediate.of(nn.Linear(1, 1), torch.ones(1, 1)),
            ValueError,
            "forward_intermediates, Linear has no",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_module_that_is_not_called_is_named():
    model = MDistillerResNet()
    model.unused = nn.Identity()
    with pytest.raises(RuntimeError, match=r"the modules \['unused'\] were not called in the model's forward pass"):
        with_maps(model, {"last": "unused"})(torch.randn(2, 3, 16, 16))
