"""A classifier on a frozen backbone, or with one that learns too: what it is made of and one step of it.

Legend: N images on a rank, F dimensions of a feature, M classes.
"""

from __future__ import annotations

import torch
import xxhash
from accelerate import Accelerator
from torch import Tensor, nn

from linerate.train.encoder import Encoder
from linerate.train.shuffle_bn import bn_modules, set_bn_group

FC_STD = 0.01


def new_fc(num_features: int, num_classes: int, *, seed: int) -> nn.Linear:
    """The classifier, weights N(0, 0.01) and bias 0, as in the reference. Leaves torch's generator alone."""
    fc = nn.Linear(num_features, num_classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        fc.weight.normal_(0.0, FC_STD, generator=generator)
        fc.bias.zero_()
    return fc


class FrozenBackbone:
    """(N, 3, S, S) uint8 -> (N, F) float32 features of a backbone that is in eval mode and stays as it is."""

    def __init__(self, encoder: Encoder, *, device: str, precision: str) -> None:
        """encoder: as its checkpoint has it; moved to the device. precision: fp32 or bf16."""
        self._saved = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
        encoder.requires_grad_(False).eval()
        self._encoder = encoder.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device_type, self._bf16 = torch.device(device).type, precision == "bf16"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
            features: Tensor = self._encoder.features(images)
        return features.float()

    def require_unchanged(self) -> None:
        """Compare every tensor, BN's buffers too, with the checkpoint's. Raises RuntimeError: a defect."""
        for name, tensor in self._encoder.backbone.state_dict().items():
            if not torch.equal(tensor.cpu(), self._saved[name]):
                raise RuntimeError(f"{name} of the frozen backbone is not the checkpoint's: a defect of ours")


class FineTuned(nn.Module):
    """Images -> (N, M) logits, with a backbone that learns too; the projection head is left out."""

    def __init__(self, encoder: Encoder, fc: nn.Linear, *, bn_group: int | None) -> None:
        super().__init__()
        encoder.head = nn.Identity()
        set_bn_group(encoder, bn_group)
        self.encoder, self.fc = encoder, fc

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.encoder(images))
        return logits


@torch.no_grad()
def average_bn(module: nn.Module, accelerator: Accelerator) -> None:
    """Give every rank the mean of all ranks' running BN statistics; training itself never reads them."""
    buffers = [
        buffer
        for norm in bn_modules(module)
        for buffer in (norm.running_mean, norm.running_var)
        if buffer is not None
    ]
    if accelerator.num_processes == 1 or not buffers:
        return
    mean = accelerator.reduce(torch.cat([buffer.flatten() for buffer in buffers]), "mean")
    for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def hits(logits: Tensor, label: Tensor) -> Tensor:
    """(2,) float64: how many rows have their label first, and among the first five (or all classes)."""
    order = logits.topk(min(5, logits.shape[1]), dim=1).indices == label[:, None]
    return torch.stack([order[:, 0].sum(), order.sum()]).double()


def weights_xxh3(encoder: Encoder) -> str:
    """A hash of the backbone's tensors: which encoder this is."""
    digest = xxhash.xxh3_64()
    for tensor in encoder.backbone.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()
