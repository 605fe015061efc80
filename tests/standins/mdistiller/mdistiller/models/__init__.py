"""Tiny classifiers with the host's output: logits and a dictionary of features."""

from torch import nn


class Tiny(nn.Module):
    """One convolution, pooling, one Linear; `norm_before_pooling` as in a wide ResNet, `hidden` as in ShuffleNetV2."""

    def __init__(self, num_classes, width=4, stride=4, norm_before_pooling=False, hidden=None):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride, 1)
        self.bn = nn.BatchNorm2d(width)
        self.last_bn = nn.BatchNorm2d(width) if norm_before_pooling else nn.Identity()
        self.hidden = nn.Linear(width, hidden) if hidden else nn.Identity()
        self.fc = nn.Linear(hidden or width, num_classes)

    def forward(self, x):
        out = self.bn(self.conv(x))
        feature = out
        preact = self.last_bn(out)
        pooled = self.hidden(preact.relu().mean((2, 3)))
        feats = {"feats": [feature], "preact_feats": [preact], "pooled_feat": pooled}
        return self.fc(pooled), feats


class Staged(nn.Module):
    """Two stages before the pooling, named and shown as in the host's ResNets."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.layer2 = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, num_classes)

    def forward(self, x):
        before = self.layer2(x)
        last = self.layer3(before)
        pooled = self.avgpool(last).flatten(1)
        return self.fc(pooled), {"feats": [before, last], "pooled_feat": pooled}


def maker(kind=Tiny, **settings):
    def make(num_classes=100):
        return kind(num_classes, **settings)

    return make


def imagenet_maker(pretrained=False, **settings):
    if pretrained:
        raise RuntimeError("no network")
    return Tiny(1000, **settings)


cifar_model_dict = {
    "teacher": (maker(width=8), "/nowhere/teacher.pth"),
    "normed": (maker(width=8, norm_before_pooling=True), None),
    "unusable": (maker(width=8, hidden=6), None),
    "student": (maker(width=4), None),
    "large_map_student": (maker(width=4, stride=2), None),
    "staged_teacher": (maker(Staged, width=8), None),
    "staged_student": (maker(Staged, width=4), None),
}
tiny_imagenet_model_dict = {"teacher": (maker(), None)}
imagenet_model_dict = {"teacher": imagenet_maker}
