"""Architectures from the packages that people use, with random weights, as blocks or as nodes with skips."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets import DenseNet121, UNet
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18, vgg11
from transformers import GPT2Config, GPT2LMHeadModel


class Case(NamedTuple):
    """A whole model, its parts, and a batch."""

    model: nn.Module
    parts: list[Any] | dict[str, tuple[Any, ...]]
    inputs: Tensor


class Words(nn.Module):
    """Embeddings of words and places, as GPT-2 adds them."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.words, self.places, self.drop = whole.wte, whole.wpe, whole.drop

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.drop(self.words(tokens) + self.places(torch.arange(tokens.shape[1])[None]))
        return found


class First(nn.Module):
    """The first of what a block returns."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        found = self.block(x)
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result


def gpt2(batch: int = 8) -> Case:
    """12 layers of width 192 with dropout; sequences of 128."""
    config = GPT2Config(
        n_layer=12,
        n_embd=192,
        n_head=6,
        n_positions=128,
        vocab_size=1024,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    whole = model.transformer
    parts = [Words(whole), *map(First, whole.h), whole.ln_f, model.lm_head]
    return Case(model, parts, torch.randint(1024, (batch, 128)))


def u_net() -> Case:
    """Four levels, with skips that are concatenated."""
    model = UNet(
        spatial_dims=2, in_channels=1, out_channels=2, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2
    )
    nodes: dict[str, tuple[Any, ...]] = {}

    def add(name: str, module: Any, *used: str) -> str:
        nodes[name] = (module, *used)
        return name

    def unrolled(block: nn.Module, below: str, level: int) -> str:
        if not isinstance(block, nn.Sequential) or not any(isinstance(part, SkipConnection) for part in block):
            return add(f"bottom {level}", block, below)
        down, skip, up = block
        entry = add(f"down {level}", down, below)
        inner = unrolled(skip.submodule, entry, level + 1)
        joined = add(f"join {level}", lambda x, y: torch.cat([x, y], dim=1), entry, inner)
        return add(f"up {level}", up, joined)

    unrolled(model.model, "x", 0)
    return Case(model, nodes, torch.randn(8, 1, 128, 128))


def dense_net() -> Case:
    """121 layers; each dense layer concatenates."""
    model = DenseNet121(spatial_dims=2, in_channels=1, out_channels=10)
    parts = [*_flat(model.features), *model.class_layers]
    return Case(model, parts, torch.randn(8, 1, 64, 64))


def vgg() -> Case:
    """11 layers, ReLU in place, dropout."""
    model = vgg11(num_classes=10)
    for k in (0, 3):  # the head of a large picture, made small
        model.classifier[k] = nn.Linear(512 * 49 if k == 0 else 512, 512)
    model.classifier[6] = nn.Linear(512, 10)
    parts = [*model.features, model.avgpool, nn.Flatten(), *model.classifier]
    return Case(model, parts, torch.randn(4, 3, 96, 96))


def resnet(batch: int = 8) -> Case:
    """18 layers with BatchNorm."""
    model = resnet18(num_classes=10)
    stages = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    parts = [model.conv1, model.bn1, model.relu, model.maxpool, *stages, model.avgpool, nn.Flatten(), model.fc]
    return Case(model, parts, torch.randn(batch, 3, 96, 96))


class Patches(nn.Module):
    """A picture as a series of patches, with a class token in front."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.projection, self.token = model.conv_proj, model.class_token
        self.places, self.dropout = model.encoder.pos_embedding, model.encoder.dropout

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.projection(pictures).flatten(2).transpose(1, 2)
        series = torch.cat([self.token.expand(len(patches), -1, -1), patches], dim=1)
        found: Tensor = self.dropout(series + self.places)
        return found


class Token(nn.Module):
    """The class token alone."""

    def forward(self, series: Tensor) -> Tensor:
        return series[:, 0]


def vision_transformer(layers: int = 8) -> Case:
    """Layers of width 192 on 64 patches, dropout."""
    model = VisionTransformer(
        image_size=64,
        patch_size=8,
        num_layers=layers,
        num_heads=6,
        hidden_dim=192,
        mlp_dim=768,
        dropout=0.1,
        num_classes=10,
    )
    for layer in model.heads:
        nn.init.normal_(layer.weight, std=0.1)  # the package starts from zeros, and all gradients were zero
    parts = [Patches(model), *model.encoder.layers, model.encoder.ln, Token(), *model.heads]
    return Case(model, parts, torch.randn(16, 3, 64, 64))


def _flat(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Blocks of sequences, whatever they call themselves."""
    found: list[nn.Module] = []
    for module in modules:
        found += list(module) if isinstance(module, nn.Sequential) and len(module) > 6 else [module]
    return found


MODELS: dict[str, Callable[[], Case]] = {
    "GPT-2": gpt2,
    "U-Net": u_net,
    "DenseNet-121": dense_net,
    "VGG-11": vgg,
    "ResNet-18": resnet,
    "ViT": vision_transformer,
}

SIZED: dict[str, Callable[[int], Case]] = {
    "GPT-2, batch": gpt2,
    "ResNet-18, batch": resnet,
    "ViT, layers": vision_transformer,
}
"""Models by what makes them larger."""
