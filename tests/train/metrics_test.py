"""Fréchet distance against closed forms and scipy; FVD, FID and IS through torchmetrics."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

from fastvdm import metrics


def _covariance(dim: int, rank: int, seed: int) -> torch.Tensor:
    a = torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / rank


def test_frechet_distance_of_commuting_covariances():
    """Σ's with the same eigenvectors: |Δμ|² + Σ (sqrt a_i - sqrt b_i)²."""
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    a, b = torch.rand(2, 6, dtype=torch.float64)
    b[2] = 0  # rank deficient
    m1, m2 = torch.randn(2, 6, dtype=torch.float64)
    expected = (m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    got = metrics.frechet_distance(m1, q * a @ q.T, m2, q * b @ q.T)
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-9)


@pytest.mark.parametrize("rank", [9, 4])
def test_frechet_distance_is_that_of_the_matrix_square_root(rank):
    linalg = pytest.importorskip("scipy.linalg")
    c1, c2 = _covariance(9, rank, 0), _covariance(9, 12, 1)
    mean = torch.randn(2, 9, dtype=torch.float64)
    root = torch.from_numpy(linalg.sqrtm((c1 @ c2).numpy()).real)
    expected = (mean[0] - mean[1]).square().sum() + (c1 + c2 - 2 * root).trace()
    got = metrics.frechet_distance(mean[0], c1, mean[1], c2)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert metrics.frechet_distance(mean[0], c1, mean[0], c1).abs() < 1e-10


class MeanColour(nn.Module):
    """A feature network whose features are known: mean and mean square of each channel."""

    def forward(self, x):
        axes = tuple(range(2, x.ndim))
        return torch.cat([x.mean(axes), x.square().mean(axes)], 1)


def test_fvd_through_torchmetrics_is_the_distance_of_the_features():
    pytest.importorskip("torchmetrics")
    features = metrics.VideoFeatures(MeanColour(), example=(3, 2, 4, 4))
    assert features.num_features == 6
    fvd = metrics.FVD(features).set_dtype(torch.float64)
    real, fake = torch.rand(40, 3, 2, 5, 6), torch.rand(30, 3, 2, 5, 6) * 0.8
    for batch in real.split(16):
        fvd.update(batch, real=True)
    for batch in fake.split(16):
        fvd.update(batch, real=False)
    expected = metrics.frechet_feature_distance(features(real), features(fake))
    torch.testing.assert_close(fvd.compute().double(), expected, atol=1e-6, rtol=1e-4)
    assert expected > 0.05


@pytest.mark.parametrize("frames", ["average", "first"])
def test_features_of_frames(frames):
    video = torch.rand(2, 3, 4, 5, 6)
    features = metrics.VideoFeatures(MeanColour(), frames=frames, example=(3, 2, 4, 4))
    scaled = (2 * video - 1)[:, :, : 1 if frames == "first" else 4]
    expected = torch.stack([MeanColour()(scaled[:, :, i]) for i in range(scaled.shape[2])]).mean(0)
    torch.testing.assert_close(features(video), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_file_and_resize(tmp_path):
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.trace(MeanColour(), torch.rand(1, 3, 2, 8, 8)), str(path))
    features = metrics.VideoFeatures(path, size=8, example=(3, 2, 4, 4))
    video = torch.rand(1, 3, 2, 1, 1).expand(2, 3, 2, 5, 6)
    torch.testing.assert_close(features(video)[:, :3], 2 * video.mean((2, 3, 4)) - 1)
    with pytest.raises(FileNotFoundError, match="no TorchScript file"):
        metrics.load_network(tmp_path / "none.pt")


class Table(nn.Module):
    """Sample n has the logits of row n."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits[x.flatten().long()]


saves_all = pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save")


@saves_all
@pytest.mark.parametrize("certainty", [100, 1000])  # exp(-100) is in fp32, exp(-1000) is 0
def test_inception_score_closed_form(certainty):
    """n of 6 classes, each predicted with certainty and equally often: the score is n, and one
    score has no spread."""
    pytest.importorskip("torchmetrics")
    score = metrics.InceptionScore(
        Table(torch.eye(4, 6)[torch.arange(80) % 4] * certainty), splits=1
    )
    score.update(torch.arange(80))
    mean, deviation = score.compute()
    assert math.isclose(mean.item(), 4.0, rel_tol=1e-4) and deviation == 0


@saves_all
@pytest.mark.filterwarnings("ignore:std\\(\\)")
@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score_is_that_of_torchmetrics(splits):
    inception = pytest.importorskip("torchmetrics.image.inception")
    features = Table(torch.randn(50, 7))
    ours = metrics.InceptionScore(features, splits=splits)
    theirs = inception.InceptionScore(features, splits=splits)
    values = []
    for score in (ours, theirs):
        for batch in torch.arange(50).split(16):
            score.update(batch)
        torch.manual_seed(3)
        values.append(score.compute())
    torch.testing.assert_close(values[0][0], values[1][0])
    if splits > 1:
        torch.testing.assert_close(values[0][1], values[1][1], atol=1e-6, rtol=1e-4)
    copy = pickle.loads(pickle.dumps(ours))
    torch.manual_seed(3)
    assert copy.compute() == values[0]


@saves_all
def test_inception_score_of_one_sample():
    pytest.importorskip("torchmetrics")
    score = metrics.InceptionScore(Table(torch.randn(1, 5)))
    score.update(torch.zeros(1))
    torch.testing.assert_close(score.compute(), (torch.tensor(1.0), torch.tensor(0.0)))


def test_bad_input():
    features = metrics.VideoFeatures(MeanColour(), example=(3, 2, 4, 4))
    with pytest.raises(ValueError, match="NaN"):
        features(torch.full((1, 3, 2, 4, 4), float("nan")))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        features(torch.randn(1, 3, 2, 4, 4))
    with pytest.raises(ValueError, match=r"\(B, C, F, H, W\)"):
        features(torch.rand(3, 2, 4, 4))
    with pytest.raises(ValueError, match=r"must return \(1, D\)"):
        metrics.VideoFeatures(nn.Flatten(0), example=(3, 2, 4, 4))
    with pytest.raises(ValueError, match=r"cov1 must have shape"):
        metrics.frechet_distance(torch.zeros(3), torch.eye(2), torch.zeros(3), torch.eye(3))
