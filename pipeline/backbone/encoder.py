"""The frozen encoder on its device: images in, features out."""

import torch

from pipeline.backbone.arithmetic import encoding_arithmetic
from pipeline.backbone.build import classifier, encode
from pipeline.backbone.checkpoint import Checkpoint


class Encoder:
    """The encoder of a backbone on its device, in the formats that suit it."""

    def __init__(self, backbone: Checkpoint, device: torch.device):
        self.device, self.arithmetic = device, encoding_arithmetic(device)
        self.width = classifier(backbone.model).in_features
        self._model = self.arithmetic.arrange_weights(backbone.model.to(device)).eval()

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (B, D) of normalised images (B, 3, H, W) on the device."""
        with self.arithmetic.autocast(self.device):
            return encode(self._model, self.arithmetic.arrange(images))
