"""The judge of samples: a classifier of renders, whose features also measure how far two sets differ."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.ground.publish import publish_file
from lorakit.ground.randomness import derive_seed, generator
from lorakit.weights.tensors import read_tensors, serialize
from miniature.autoencoder import to_tensor
from miniature.landscapes import BASE_STYLES, FOREGROUNDS, MOUNTAINS, TIMES, Scene
from miniature.pictures import Table, picture, rendered

HEADS: dict[str, tuple[str, ...]] = {
    "style": BASE_STYLES,
    "time": TIMES,
    "mountain": MOUNTAINS,
    "foreground": FOREGROUNDS,
}


class Classifier(nn.Module):
    """(B, 3, H, W) in [-1, 1] to logits by attribute; `features` are (B, 2 * 128)."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU(), nn.Conv2d(b, b, 3, 1, 1))
            for a, b in zip(widths, widths[1:], strict=False)
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(2 * widths[-1], len(known)) for name, known in HEADS.items()}
        )

    def features(self, image: Tensor) -> Tensor:
        """Means of the last level over the upper and the lower half of the picture."""
        x = F.avg_pool2d(image, 2)
        for block in self.blocks:
            x = F.silu(block(x))
        return F.adaptive_avg_pool2d(x, (2, 1)).flatten(1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.features(image)
        return {name: head(features) for name, head in self.heads.items()}


def labels_of(scene: Scene, style: str) -> list[int]:
    """The right answer of each head."""
    words = {"style": style, "time": scene.time, "mountain": scene.mountain, "foreground": scene.foreground}
    return [known.index(words[name]) for name, known in HEADS.items()]


def trained_classifier(cache: Path, pictures: int, steps: int, size: int, workers: int | None) -> Classifier:
    """From the cache, or trained on renders of every combination; flips, blur and noise hide details."""
    table = Table(1, pictures, BASE_STYLES, size, everything=True)
    torch.manual_seed(derive_seed(1, "classifier/weights"))
    model = Classifier().to(memory_format=torch.channels_last)
    path = cache / f"classifier-{steps}-{table.folder(cache).name}-{pictures}.safetensors"
    if not path.exists():
        parts = rendered(table, cache, workers)
        labels = torch.tensor([labels_of(*table.row(index)) for index in range(pictures)])
        _fit(model, parts, labels, steps)
        publish_file(path, serialize(model.state_dict(), {}))
    model.load_state_dict(read_tensors(path)[0])
    return model.eval().requires_grad_(False)


def _fit(model: Classifier, parts: list[np.ndarray], labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        rng = np.random.default_rng(derive_seed(1, "classifier", step))
        rows = rng.integers(len(labels), size=32)
        image = to_tensor([picture(parts, int(row)) for row in rows])
        if rng.uniform() < 0.5:
            image = image.flip(3)
        if rng.uniform() < 0.5:  # samples are softer than renders: that must not decide
            image = F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode="bilinear")
        noise = torch.randn(image.shape, generator=generator(1, "classifier/noise", step))
        logits = model(image + 0.05 * float(rng.uniform()) * noise)
        loss = sum(
            F.cross_entropy(logits[name], labels[rows, i], label_smoothing=0.02)
            for i, name in enumerate(HEADS)
        )
        optimizer.zero_grad()
        torch.as_tensor(loss).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of pictures that each head gets right; `labels` (B, heads)."""
    logits = [model(part) for part in images.split(64)]
    return {
        name: float((torch.cat([part[name] for part in logits]).argmax(1) == labels[:, i]).float().mean())
        for i, name in enumerate(HEADS)
    }


@torch.no_grad()
def obeyed(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of pictures whose attributes are all right; see `accuracy`."""
    logits = [model(part) for part in images.split(64)]
    right = [
        torch.cat([part[name] for part in logits]).argmax(1) == labels[:, i] for i, name in enumerate(HEADS)
    ]
    return float(torch.stack(right).all(0).float().mean())


@torch.no_grad()
def frechet_distance(model: Classifier, a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (Heusel et al. 2017), in float64."""
    (mu_a, c_a), (mu_b, c_b) = (_moments(model, images) for images in (a, b))
    values, vectors = torch.linalg.eigh(c_a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()  # same trace, and symmetric
    return float(((mu_a - mu_b) ** 2).sum() + c_a.trace() + c_b.trace() - 2 * cross)


def _moments(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    features: Any = torch.cat([model.features(part) for part in images.split(64)]).double()
    return features.mean(0), torch.cov(features.T)
