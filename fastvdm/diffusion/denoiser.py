"""How samplers and losses call a network: a ``UNet3D``, the peer's, or any callable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastvdm.diffusion.prediction import Prediction, check_prediction

Model = Callable[..., Tensor]  # model(z (B, C, F, H, W), time (B,), cond=...) -> (B, C, F, H, W)


def unwrap(model: Model) -> Model:
    """The network inside wrappers that hide its methods (DDP, an EMA ``AveragedModel``)."""
    inner = getattr(model, "module", None)
    return unwrap(inner) if isinstance(model, nn.Module) and isinstance(inner, nn.Module) else model


def module_of(model: Model) -> nn.Module | None:
    """The module behind a callable: the callable itself, the owner of a bound method, or None."""
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def time_input_of(model: Model, schedule_default: str, asked: str | None) -> str:
    """Which time the network takes: as asked, else its own ``time_input``, else the schedule's."""
    own = getattr(unwrap(model), "time_input", None)
    return asked or (own if isinstance(own, str) else schedule_default)


def told_by(model: Model) -> Mapping[str, Any]:
    """The fields of ``fastvdm.unet.Settings`` that the network has; empty for other callables."""
    settings = getattr(unwrap(model), "settings", None)
    return settings if isinstance(settings, Mapping) else {}


def prediction_of(model: Model, asked: Prediction | None) -> Prediction:
    """What the network returns: as asked, else as its ``settings`` say, else "eps". Raises
    ValueError if the name is unknown."""
    own: Any = told_by(model).get("prediction", "eps")
    check_prediction(own if asked is None else asked)
    return own if asked is None else asked


@contextmanager
def input_gradient(model: Model) -> Iterator[None]:
    """Let gradients flow to the input of ``model`` and to nothing else.

    Inside the context its parameters do not require a gradient: the backward pass computes only
    dgrad, no weight gradients, and activations needed only for weight gradients are not saved. The
    flags are restored on exit, also after an error; ``.grad`` is not touched.

    A module compiled before entering keeps the graph it has traced: the result is the same, but
    the work may not be saved. Compile inside the context, or freeze the network yourself.
    """
    module = module_of(model)
    frozen = [p for p in module.parameters() if p.requires_grad] if module is not None else []
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Switch dropout etc. off; the training flag of each submodule is restored on exit."""
    module = module_of(model)
    training = [m for m in module.modules() if m.training] if module is not None else []
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


class Denoiser:
    """A network with its conditioning and classifier-free guidance.

    Args:
        model: any callable ``model(z, time)`` or ``model(z, time, cond=cond)`` with z (B, C, F, H,
            W) and time (B,), returning the shape of z. A module with ``forward_with_cond_scale``
            (``UNet3D``, the peer's ``Unet3D``) computes the guidance itself.
        cond: (B, ...) conditioning, or None.
        guidance_scale: 1 + w of Eq. 6: eps = eps(z) + scale (eps(z, c) - eps(z)); 1 means no
            guidance. It is not called a weight, because published weights are w or 1 + w.
        null_cond: (1 or B, ...) the null condition for a callable without
            ``forward_with_cond_scale``; zeros by default, as in the paper. One batched pass
            computes both branches.

    Raises:
        TypeError: ``model`` is not callable.
        ValueError: the scale is below 0, guidance is asked for without a condition, or
            ``null_cond`` would be ignored.
    """

    def __init__(
        self,
        model: Model,
        *,
        cond: Tensor | None = None,
        guidance_scale: float = 1.0,
        null_cond: Tensor | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}")
        if not 0 <= guidance_scale < math.inf:
            raise ValueError(
                f"guidance_scale must be finite and at least 0 (1 = none), got {guidance_scale}"
            )
        if guidance_scale != 1 and cond is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs cond")
        self.model = unwrap(model)
        self.cond, self.scale = cond, float(guidance_scale)
        self._scaled = getattr(self.model, "forward_with_cond_scale", None)
        self._null: Tensor | None = None
        if null_cond is not None and guidance_scale != 1 and self._scaled is not None:
            raise ValueError(
                "null_cond is for models without a null condition of their own; this one has it"
            )
        if cond is not None and guidance_scale != 1 and self._scaled is None:
            null = torch.zeros_like(cond[:1]) if null_cond is None else null_cond
            if null.shape[1:] != cond.shape[1:] or len(null) not in (1, len(cond)):
                raise ValueError(
                    f"null_cond must be one row like cond or as many: cond is {tuple(cond.shape)}, "
                    f"got {tuple(null.shape)}"
                )
            self._null = null.to(cond).expand_as(cond)
        parameters = next(iter(module.parameters()), None) if (module := module_of(model)) else None
        self._dtype = parameters.dtype if parameters is not None else None

    def compute_dtype(self, device: str) -> torch.dtype | None:
        """The dtype in which the network computes: autocast's, else that of its parameters."""
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self._dtype

    def __call__(self, z: Tensor, time: Tensor) -> Tensor:
        """The network's output at z (B, C, F, H, W) and time (B,): same shape, its own dtype.

        Raises:
            ValueError: the network returns another shape.
            TypeError: the network does not return a tensor.
        """
        device = z.device.type
        if self._dtype is not None and self._dtype != z.dtype:
            # 16-bit weights without autocast need 16-bit input; the sampler's state stays wide.
            narrow = not torch.is_autocast_enabled(device) and self._dtype.is_floating_point
            x = z.to(self._dtype) if narrow else z
        else:
            x = z
        out = self._call(x, time)
        if not isinstance(out, Tensor):
            raise TypeError(f"the model must return a tensor, got {type(out).__name__}")
        if out.shape != z.shape:
            raise ValueError(f"the model returned {tuple(out.shape)} for an input {tuple(z.shape)}")
        return out

    def _call(self, z: Tensor, time: Tensor) -> Tensor:
        if self.cond is None:
            return self.model(z, time)
        if self.scale == 1:
            return self.model(z, time, cond=self.cond)
        if self._scaled is not None:
            return self._scaled(z, time, cond=self.cond, cond_scale=self.scale)
        assert self._null is not None
        both = self.model(
            torch.cat((z, z)), torch.cat((time, time)), cond=torch.cat((self._null, self.cond))
        )
        null, conditioned = both.chunk(2)
        return torch.lerp(null, conditioned, self.scale)
