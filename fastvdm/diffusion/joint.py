"""Joint image-video training: independent image frames appended to each video.

Ho et al. 2022, Video Diffusion Models, §3 and §4.3.1: K frames of random other videos of the data
set follow the F frames of a video. In temporal attention they attend to themselves only
(``num_images=K`` of ``UNet3D``). They are exactly isolated only if no other operation mixes frames,
so build the network with ``norm_per_frame=True``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from fastvdm.diffusion.denoiser import unwrap
from fastvdm.diffusion.loss import diffusion_loss
from fastvdm.diffusion.schedule import CosineSchedule


def append_images(video: Tensor, images: Tensor) -> Tensor:
    """Append images to videos: (B, C, F, H, W) and (B, C, K, H, W) → (B, C, F + K, H, W).

    Raises:
        ValueError: the shapes differ in more than the number of frames.
    """
    v, i = tuple(video.shape), tuple(images.shape)
    if video.ndim != 5 or images.ndim != 5 or v[:2] != i[:2] or v[3:] != i[3:]:
        raise ValueError(f"expected video (B, C, F, H, W) and images (B, C, K, H, W), got {v}, {i}")
    return torch.cat([video, images.to(video)], dim=2)


def images_from_batch(
    video: Tensor, num_images: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw K random frames for each video from the other videos of the batch.

    Args:
        video: (B, C, F, H, W), B >= 2.
        num_images: K.
        generator: a CPU generator; the global one by default.

    Returns:
        (B, C, K, H, W). The frames of one sample come from different videos if there are enough.

    Raises:
        ValueError: the batch has only one video.
    """
    _check_count(num_images)
    batch, _, frames = video.shape[:3]
    if num_images and batch < 2:
        raise ValueError("frames of other videos need a batch of at least 2, got 1: JointDataset")
    picked = []
    for b in range(batch):
        others = _others(b, batch, num_images, generator)
        places = torch.randint(frames, (num_images,), generator=generator)
        picked.append(video[others.to(video.device), :, places.to(video.device)])  # (K, C, H, W)
    return torch.stack(picked).transpose(1, 2)


def _check_count(num_images: int) -> None:
    if num_images < 0:
        raise ValueError(f"num_images must be at least 0, got {num_images}")


def _others(own: int, total: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` of the indices 0..total-1 except ``own``, uniform and in random order.

    They are distinct; if there are too few, all are repeated in whole rounds.
    """
    rest = total - 1
    if 2 * count > rest > 0:
        rounds = [torch.randperm(rest, generator=generator) for _ in range(-(-count // rest))]
        order = torch.cat(rounds)[:count]
    else:  # by rejection: a permutation of millions of videos takes seconds
        drawn: dict[int, None] = {}
        while len(drawn) < count:
            new = torch.randint(rest, (count - len(drawn),), generator=generator)
            drawn |= dict.fromkeys(new.tolist())
        order = torch.tensor(list(drawn), dtype=torch.long)
    return order + (order >= own)


class JointDataset(Dataset):
    """A data set of clips in which each item ends with K frames of random other items.

    Args:
        dataset: its items are clips (C, F, H, W) or pairs (clip, caption or other condition). If it
            has a method ``frame(index)`` that returns one random frame (C, H, W), as
            ``VideoFolder`` does, that is used, so that no whole clip is decoded for one frame.
        num_images: K. Items become (C, F + K, H, W), or (that, captions) with 1 + K captions, the
            video's first.

    Raises:
        ValueError: the data set has fewer than two items.
    """

    def __init__(self, dataset: Any, num_images: int) -> None:
        _check_count(num_images)
        if num_images and len(dataset) < 2:
            raise ValueError(f"image frames of other videos need at least 2, got {len(dataset)}")
        self.dataset, self.num_images = dataset, num_images
        self.identities = getattr(dataset, "identities", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        captioned = isinstance(item, (tuple, list))
        parts, captions = [item[0] if captioned else item], [item[1] if captioned else None]
        if self.num_images == 0:
            return (parts[0], captions) if captioned else parts[0]
        total = len(self.dataset)
        for other in _others(index % total, total, self.num_images).tolist():
            image, caption = self._frame(other, captioned)
            parts.append(image[:, None])
            captions.append(caption)
        joined = torch.cat(parts, dim=1)
        return (joined, captions) if captioned else joined

    def _frame(self, index: int, captioned: bool) -> tuple[Tensor, Any]:
        known = getattr(self.dataset, "conditions", None)
        if hasattr(self.dataset, "frame") and (not captioned or known is not None):
            return self.dataset.frame(index), known[index] if known is not None else None
        item = self.dataset[index]
        clip = item[0] if captioned else item
        return clip[:, int(torch.randint(clip.shape[1], ()))], item[1] if captioned else None


class JointCollate:
    """A ``collate_fn`` that appends K frames of the other videos of the batch to each video.

    It is cheaper than ``JointDataset``, because nothing more is decoded, but the frames come from
    clips that are in the batch as videos too. Items are (C, F, H, W) or (clip, caption); batches
    are (B, C, F + K, H, W) or (that, captions) with a list of 1 + K captions for each sample.
    """

    def __init__(self, num_images: int) -> None:
        _check_count(num_images)
        self.num_images = num_images

    def __call__(self, items: Sequence[Any]) -> Any:
        captioned = isinstance(items[0], (tuple, list))
        clips = [item[0] if captioned else item for item in items]
        batch = len(clips)
        if self.num_images and batch < 2:
            raise ValueError("frames of other videos need a batch of at least 2, got 1")
        joined, captions = [], []
        for b, clip in enumerate(clips):
            others = _others(b, batch, self.num_images).tolist() if self.num_images else []
            frames = [clips[o][:, int(torch.randint(clips[o].shape[1], ()))] for o in others]
            joined.append(torch.cat([clip, *(f[:, None] for f in frames)], dim=1))
            if captioned:
                captions.append([items[i][1] for i in (b, *others)])
        video = default_collate(joined)
        return (video, captions) if captioned else video


def _check_model(model: Any) -> None:
    """Check that the network masks image frames; otherwise they would leak into the videos."""
    inner = unwrap(model)
    call = inner.forward if isinstance(inner, nn.Module) else inner
    parameters = inspect.signature(call).parameters
    if "num_images" not in parameters and not any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    ):
        raise TypeError(
            f"{type(inner).__name__} takes no num_images, so image frames would leak into the "
            "videos; UNet3D does"
        )


def joint_loss(
    model: Callable[..., Tensor],
    x: Tensor,
    num_images: int,
    *,
    cond: Tensor | None = None,
    image_weight: float = 1.0,
    image_time: str = "shared",
    image_cond: str | Tensor = "shared",
    reduction: Literal["mean", "none"] = "mean",
    **options: Any,
) -> Tensor:
    """``diffusion_loss`` on videos whose last ``num_images`` frames are independent images.

    The paper does not say whether an image frame has its own noise level, condition or weight. The
    defaults read it literally, as one sequence with one embedding: all are shared, the weight is 1.

    Args:
        model: a network that takes ``num_images`` (``UNet3D``), or a wrapper of one.
        x: (B, C, F + K, H, W) in [-1, 1].
        num_images: K.
        cond: (B, cond_dim) conditions of the videos.
        image_weight: weight of an image frame's loss relative to a video frame's; 0 switches the
            image loss off.
        image_time: "shared": an image has the t of its video; "own": t is drawn for each image. A
            network has one time and one condition per sample, so "own" runs the images as videos of
            one frame in a second call. This is the same function if the network keeps frames apart.
        image_cond: "shared": an image has the condition of its video; "none": images are trained
            unconditionally; a tensor (B, K, cond_dim): their own conditions. The last two also take
            a second call.
        reduction: "mean", or "none" for (B,).
        options: options of ``diffusion_loss``. A given ``t`` (B,) and ``noise`` (B, C, F + K, H, W)
            apply to the videos and, if the time is shared, to the images.

    Returns:
        The loss: a scalar, or (B,).

    Raises:
        TypeError: the network does not take image frames.
        ValueError: an option or a shape does not fit.
    """
    _check_count(num_images)
    if x.ndim != 5 or num_images >= x.shape[2]:
        raise ValueError(
            f"expected (B, C, F + {num_images}, H, W) with F >= 1, got {tuple(x.shape)}"
        )
    if image_time not in ("shared", "own"):
        raise ValueError(f'image_time must be "shared" or "own", got {image_time!r}')
    if image_weight < 0:
        raise ValueError(f"image_weight must be at least 0, got {image_weight}")
    batch, frames = x.shape[0], x.shape[2] - num_images
    own_cond = image_cond if isinstance(image_cond, Tensor) else None
    if own_cond is None and image_cond not in ("shared", "none"):
        raise ValueError(f'image_cond must be "shared", "none" or a tensor, got {image_cond!r}')
    if own_cond is not None and (cond is None or own_cond.shape[:2] != (batch, num_images)):
        raise ValueError(
            f"image_cond must be ({batch}, {num_images}, cond_dim) beside cond, "
            f"got {tuple(own_cond.shape)}"
        )
    if "frame_weight" in options:
        raise ValueError("frame_weight is made from image_weight; got both")
    if num_images == 0:
        return diffusion_loss(model, x, cond=cond, reduction=reduction, **options)
    _check_model(model)
    packed = image_time == "shared" and (cond is None or image_cond == "shared")
    if packed:
        weight = x.new_ones(frames + num_images)
        weight[frames:] = image_weight
        return diffusion_loss(
            model,
            x,
            cond=cond,
            frame_weight=weight,
            reduction=reduction,
            num_images=num_images,
            **options,
        )
    # A video and its images share a noise level even if they go through the network separately.
    if image_time == "shared" and options.get("t") is None:
        options["t"] = _draw(options, batch, x)
    noise = options.pop("noise", None)
    video_noise = noise if noise is None else noise[:, :, :frames]
    video = diffusion_loss(
        model, x[:, :, :frames], cond=cond, noise=video_noise, reduction="none", **options
    )
    images = _images_loss(model, x, frames, cond, image_cond, image_time, noise, options)
    loss = (frames * video + image_weight * num_images * images) / (
        frames + image_weight * num_images
    )
    return loss.mean() if reduction == "mean" else loss


def _draw(options: dict[str, Any], batch: int, x: Tensor) -> Tensor:
    schedule = options.get("schedule") or CosineSchedule()
    return schedule.draw(batch, device=x.device, generator=options.get("generator"))


def _images_loss(
    model: Callable[..., Tensor],
    x: Tensor,
    frames: int,
    cond: Tensor | None,
    image_cond: str | Tensor,
    image_time: str,
    noise: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """The loss (B,) of the image frames, each run as a video of one frame."""
    count = x.shape[2] - frames

    def as_videos(t: Tensor) -> Tensor:  # (B, C, F + K, H, W) -> (B*K, C, 1, H, W)
        return t[:, :, frames:].transpose(1, 2).flatten(0, 1).unsqueeze(2)

    options = dict(options)
    t = options.pop("t", None)
    if image_time == "shared" and t is not None:
        options["t"] = t.repeat_interleave(count)
        if noise is not None:
            options["noise"] = as_videos(noise)
    if isinstance(image_cond, Tensor):
        cond = image_cond.flatten(0, 1)
    elif cond is not None:
        cond = cond.repeat_interleave(count, 0)
        if image_cond == "none" and hasattr(unwrap(model), "forward_with_cond_scale"):
            options["null_cond_prob"] = 1.0  # the network's own null vector may be learned
        elif image_cond == "none":
            cond = torch.zeros_like(cond)
    loss = diffusion_loss(model, as_videos(x), cond=cond, reduction="none", **options)
    return loss.unflatten(0, (-1, count)).mean(1)


class JointDiffusion(nn.Module):
    """Joint training inside an existing trainer: wraps the module that the trainer calls with data.

    ``JointDiffusion(GaussianDiffusion(UNet3D(..., norm_per_frame=True), ...), num_images=8)`` goes
    into the peer's ``Trainer`` unchanged. Each training call appends frames of the other videos of
    the batch (or takes a batch already extended by ``JointDataset`` or ``JointCollate``) and passes
    ``num_images`` down. Everything else, including ``sample``, ``num_frames`` and the state_dict,
    is that of the wrapped module.

    Args:
        diffusion: called as ``diffusion(x, *args, num_images=K, **kwargs)``. If it has
            ``num_frames`` (F), that is set to F + K during the call.
        num_images: K.
        appended: the data already have the K frames.

    Raises:
        TypeError: the network inside (``denoise_fn``) takes no ``num_images``.
    """

    def __init__(self, diffusion: nn.Module, num_images: int, *, appended: bool = False) -> None:
        super().__init__()
        _check_count(num_images)
        _check_model(getattr(diffusion, "denoise_fn", diffusion))
        self.diffusion, self.num_images, self.appended = diffusion, num_images, appended

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("diffusion"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state of the diffusion model, without names for this wrapper."""
        return self.diffusion.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load what ``state_dict`` gave."""
        return self.diffusion.load_state_dict(*args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The wrapped module's loss of x (B, C, F, H, W), or of F + K frames if ``appended``."""
        if self.num_images == 0:
            return self.diffusion(x, *args, **kwargs)
        if not self.appended:
            x = append_images(x, images_from_batch(x, self.num_images))
        frames = getattr(self.diffusion, "num_frames", None)
        if frames is None:
            return self.diffusion(x, *args, num_images=self.num_images, **kwargs)
        self.diffusion.num_frames = frames + self.num_images  # the peer checks its input against it
        try:
            return self.diffusion(x, *args, num_images=self.num_images, **kwargs)
        finally:
            self.diffusion.num_frames = frames
