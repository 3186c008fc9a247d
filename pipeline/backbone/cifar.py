"""CIFAR residual networks, which timm lacks; registered there, so that they are built and exported like any timm model."""

from typing import Any

from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3×3 convolutions with batch normalisation and a parameter-free shortcut: subsample, zero-pad the channels."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.grown = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.grown:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.grown // 2, self.grown - self.grown // 2)
            )
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for 32×32 images (He et al., CVPR 2016, §4.2): stem 16, three stages of n blocks, average pool, linear."""

    def __init__(self, blocks: int, num_classes: int, width: float = 1.0):
        super().__init__()
        channels = [max(1, round(c * width)) for c in (16, 32, 64)]
        self.conv1 = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        stages, inputs = [], channels[0]
        for stage, outputs in enumerate(channels):
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            stages.append(
                nn.Sequential(*(Block(inputs if i == 0 else outputs, outputs, s) for i, s in enumerate(strides)))
            )
            inputs = outputs
        self.layers = nn.Sequential(*stages)
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, channels[-1], channels[-1]
        self.fc = nn.Linear(channels[-1], num_classes)
        self.pretrained_cfg = self.default_cfg = {"input_size": (3, 32, 32), "classifier": "fc", "first_conv": "conv1"}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layers(F.relu(self.bn1(self.conv1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _refuse_pretrained(pretrained: bool) -> None:
    if pretrained:
        raise RuntimeError("no pretrained weights exist for the CIFAR networks")


@register_model
def cifar_resnet8(pretrained: bool = False, num_classes: int = 10, width: float = 1.0, **_: Any) -> CifarResNet:
    """ResNet-8 for small images."""
    _refuse_pretrained(pretrained)
    return CifarResNet(1, num_classes, width)


@register_model
def cifar_resnet20(pretrained: bool = False, num_classes: int = 10, width: float = 1.0, **_: Any) -> CifarResNet:
    """ResNet-20 for CIFAR."""
    _refuse_pretrained(pretrained)
    return CifarResNet(3, num_classes, width)


@register_model
def cifar_resnet32(pretrained: bool = False, num_classes: int = 100, width: float = 1.0, **_: Any) -> CifarResNet:
    """ResNet-32 for CIFAR: 470,004 parameters and 64-d features at 100 classes and width 1."""
    _refuse_pretrained(pretrained)
    return CifarResNet(5, num_classes, width)


@register_model
def cifar_resnet34(pretrained: bool = False, num_classes: int = 100, **_: Any) -> ResNet:
    """ResNet-34 with a 3×3 stem of stride 1 and no max-pool: 21.3 M parameters, 512-d features."""
    _refuse_pretrained(pretrained)
    model = ResNet(BasicBlock, (3, 4, 6, 3), num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    model.pretrained_cfg = model.default_cfg = {"input_size": (3, 32, 32), "classifier": "fc", "first_conv": "conv1"}
    return model


def is_cifar(name: str) -> bool:
    """Return whether a model name is one of this module."""
    return name.startswith("cifar_resnet")


def takes_width(name: str) -> bool:
    """Return whether the network has a width multiplier."""
    return is_cifar(name) and name != "cifar_resnet34"
