"""A small Swin Transformer (Liu et al., ICCV 2021) for 32x32 images, a teacher of another kind than its students."""

from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

WIDTH = 256  # of the final map, 2 x 2
_SHAPE = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 32,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 4, 8),
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
}


class Swin(nn.Module):
    """timm's Swin with four stages of two blocks, patches of 2 x 2 and windows of 4 x 4; 1.6 million parameters.

    Args:
        num_classes: C.

    Shape:
        images (N, 3, 32, 32); returns logits (N, C).
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.body = SwinTransformer(num_classes=num_classes, **_SHAPE)

    @property
    def classifier(self) -> nn.Module:
        """The last layer, which reads the final map's mean."""
        return self.body.head.fc

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.body(images)

    def outputs(self, images: Tensor, maps: bool = False) -> tuple[Tensor, ...]:
        """Return the logits and what the last layer reads, (N, D); with ``maps`` also the last map, (N, D, H, W)."""
        final = self.body.forward_features(images)
        features = self.body.forward_head(final, pre_logits=True)
        shown = (self.classifier(features), features)
        return (*shown, final.permute(0, 3, 1, 2)) if maps else shown

    def head(self, copy: int = 0, copies: int = 1) -> nn.Module:
        """Return the last layer."""
        return self.classifier
