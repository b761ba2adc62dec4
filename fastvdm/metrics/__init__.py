"""FVD, FID and Inception Score with a feature network that the user provides.

No weights are shipped or downloaded: the network is an ``nn.Module`` or a TorchScript file (I3D for
FVD, C3D for the UCF101 numbers, Inception for frames). torchmetrics accumulates the features.
docs/training.md says which network, layer and resize make a number comparable with published ones.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvdm.runtime.optional import require

FRAMES = ("video", "average", "first")


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """The Fréchet distance |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), computed in fp64.

    The trace of the square root is the sum of the singular values of C1^(1/2) C2^(1/2). This avoids
    the square root of a non-symmetric product, so the covariances may be rank-deficient.

    Args:
        mean1: (D,).
        cov1: (D, D), symmetric and positive semidefinite.
        mean2: (D,).
        cov2: (D, D), symmetric and positive semidefinite.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes do not fit, or values are not finite.
    """
    dim = mean1.shape[-1]
    for name, t, shape in (
        ("mean1", mean1, (dim,)),
        ("mean2", mean2, (dim,)),
        ("cov1", cov1, (dim, dim)),
        ("cov2", cov2, (dim, dim)),
    ):
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
        if not torch.isfinite(t).all():
            raise ValueError(f"{name} has NaN or infinite values")
    mean1, cov1, mean2, cov2 = (t.double() for t in (mean1, cov1, mean2, cov2))
    cross = torch.linalg.svdvals(_sqrt(cov1) @ _sqrt(cov2)).sum()
    return (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross


def _sqrt(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_feature_distance(real: Tensor, fake: Tensor) -> Tensor:
    """Fréchet distance of two sets of features (N, D) and (M, D): unbiased covariances, fp64."""
    for name, t in (("real", real), ("fake", fake)):
        if t.ndim != 2 or t.shape[0] < 2:
            raise ValueError(f"{name} must be (N, D) with N >= 2, got {tuple(t.shape)}")
    real, fake = real.double(), fake.double()
    return frechet_distance(real.mean(0), torch.cov(real.T), fake.mean(0), torch.cov(fake.T))


def load_network(path: str | os.PathLike[str]) -> nn.Module:
    """Load a TorchScript feature network from a local file, frozen and in eval mode."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no TorchScript file at {path}")
    network = torch.jit.load(str(path), map_location="cpu").eval()
    for p in network.parameters():
        p.requires_grad_(False)
    return network


class VideoFeatures(nn.Module):
    """Prepares a video and calls the user's network: (B, C, F, H, W) in [0, 1] → (B, D).

    Args:
        network: a module, or the path of a TorchScript file. With ``frames="video"`` it takes
            (B, C, F, H, W), otherwise images (N, C, H, W). It returns (N, D), or that with trailing
            axes of size 1.
        size: resize each frame to this height and width first (bilinear); None does not resize. The
            usual I3D of FVD takes 224, C3D 112, Inception 299.
        value_range: the range to which [0, 1] is mapped, e.g. (-1, 1) for I3D.
        frames: "video" for a video network. For an image network "average" takes the mean of the
            frames' features and "first" those of the first frame (the paper's FID-avg and
            FID-first).
        num_features: D; if not given, it is found by a call on zeros of shape ``example``.
        example: (C, F, H, W) of that call.
    """

    def __init__(
        self,
        network: nn.Module | str | os.PathLike[str],
        *,
        size: int | tuple[int, int] | None = None,
        value_range: tuple[float, float] = (-1.0, 1.0),
        frames: str = "video",
        num_features: int | None = None,
        example: tuple[int, int, int, int] = (3, 16, 64, 64),
    ) -> None:
        super().__init__()
        if frames not in FRAMES:
            raise ValueError(f"frames must be one of {', '.join(FRAMES)}, got {frames!r}")
        if not isinstance(network, nn.Module):
            network = load_network(network)
        self.network = network.eval()
        self.size = (size, size) if isinstance(size, int) else size
        self.value_range, self.frames = value_range, frames
        # torchmetrics reads D under this name.
        self.num_features = num_features or self(torch.zeros(1, *example)).shape[1]

    def train(self, mode: bool = True) -> VideoFeatures:
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """Features (B, D) in fp32.

        Raises:
            ValueError: the video is not (B, C, F, H, W), has NaN or values outside [0, 1]; or the
                network does not return one vector per input.
        """
        if video.ndim != 5 or not video.is_floating_point():
            raise ValueError(
                f"expected a float video (B, C, F, H, W), got {tuple(video.shape)} {video.dtype}"
            )
        if not torch.isfinite(video).all():
            raise ValueError("the video has NaN or infinite values")
        if video.min() < -1e-3 or video.max() > 1 + 1e-3:
            raise ValueError(
                f"expected values in [0, 1], got [{video.min():.3g}, {video.max():.3g}]"
            )
        batch = video.shape[0]
        low, high = self.value_range
        if self.frames == "first":
            video = video[:, :, :1]
        count = video.shape[2]
        images = video.transpose(1, 2).flatten(0, 1)  # (B*F, C, H, W)
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False)
        images = images * (high - low) + low
        if self.frames == "video":
            out = self.network(images.unflatten(0, (batch, count)).transpose(1, 2))
        else:
            out = self.network(images)
        expected = batch if self.frames == "video" else batch * count
        if not isinstance(out, Tensor) or out.shape[0] != expected or out[0].numel() == 0:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"the network must return ({expected}, D), got {shape}")
        out = out.float().flatten(1)
        return out if self.frames == "video" else out.unflatten(0, (batch, count)).mean(1)


def FVD(features: nn.Module, **kwargs: Any) -> Any:
    """Fréchet video distance: call ``update(video, real=True | False)``, then ``compute()``.

    It is a ``torchmetrics.image.fid.FrechetInceptionDistance``, so it accumulates over batches and
    processes. With ``VideoFeatures(frames="average")`` or ``"first"`` and an image network it is
    the FID of a video model.

    Args:
        features: a ``VideoFeatures``, or a module from (B, C, F, H, W) to (B, D) that has
            ``num_features``.
        kwargs: options of ``FrechetInceptionDistance``.
    """
    fid = require("torchmetrics.image.fid", "metrics")
    return fid.FrechetInceptionDistance(feature=features, **kwargs)


def InceptionScore(features: nn.Module, splits: int = 10, **kwargs: Any) -> Any:
    """Inception Score exp E KL(p(y|x) || p(y)): call ``update(video)``, then ``compute()``.

    ``compute`` returns (mean, standard deviation over splits). The samples are shuffled with
    torch's global generator before they are split. With one split, as in the paper, the deviation
    is 0.

    Args:
        features: a module that returns class logits.
        splits: number of splits.
        kwargs: options of ``torchmetrics.image.inception.InceptionScore``.

    Raises:
        ValueError: ``splits`` is below 1.
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    require("torchmetrics.image.inception", "metrics")
    from fastvdm.metrics.inception import SplitScore

    return SplitScore(feature=features, splits=splits, **kwargs)
