"""Batch normalisation over the images of all processes, so that their number changes no network.

Shapes: B images of this process, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.distributed import Ranks, SumOverRanks


def normalise_over_ranks(network: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Make every BatchNorm2d of the network use the statistics of all processes; its tensors and their names stay.

    On CUDA by PyTorch's SyncBatchNorm, which has no kernel for the CPU; there by `BatchNormOverRanks`.
    """
    if ranks.size == 1:
        return
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, _replaced(child, nn.SyncBatchNorm if device.type == "cuda" else None))


def _replaced(norm: nn.BatchNorm2d, kind: type[nn.SyncBatchNorm] | None) -> nn.Module:
    made = (kind or BatchNormOverRanks)(norm.num_features, norm.eps, norm.momentum)
    made.weight, made.bias = norm.weight, norm.bias
    made.running_mean, made.running_var = norm.running_mean, norm.running_var
    made.num_batches_tracked = norm.num_batches_tracked
    return made.train(norm.training)


class BatchNormOverRanks(nn.BatchNorm2d):
    """BatchNorm2d of the images [B, C, H, W] of all processes together; in evaluation mode as ever.

    A process may have any number of images, none included; all must call it equally often.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_BCHW)
        # Sums in float64, as the kernel of one process has them.
        values_BCHW, axes = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32)), (0, 2, 3)
        total_C = _sum_over_ranks(values_BCHW.sum(axes, dtype=torch.float64))
        count = _sum_over_ranks(total_C.new_tensor([values_BCHW.numel() // values_BCHW.shape[1]]))
        mean_C = total_C / count
        centred_BCHW = values_BCHW - mean_C.to(values_BCHW.dtype)[:, None, None]
        variance_C = _sum_over_ranks(centred_BCHW.square().sum(axes, dtype=torch.float64)) / count
        if self.track_running_stats:
            self._track(mean_C.detach(), (variance_C * count / (count - 1)).detach())
        scale_C = self.weight * (variance_C + self.eps).rsqrt().to(values_BCHW.dtype)
        return torch.addcmul(self.bias[:, None, None], centred_BCHW, scale_C[:, None, None]).to(x_BCHW.dtype)

    @torch.no_grad()
    def _track(self, mean_C: Tensor, variance_C: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), share)


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    total: Tensor = SumOverRanks.apply(tensor)
    return total
