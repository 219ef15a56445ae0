"""Models that are given a picture beside x_t: super-resolution, colorization, inpainting, restoration.

Such a model has the condition :data:`IMAGE`, of the shape of its samples. One with the condition :data:`AUGMENTATION`
too is given the picture noised, and the noise's level (noise-conditioning augmentation, Ho et al. 2022): it does not
rely on details of its input, and so bears those that another model has drawn.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .arguments import OTHERS, loaded, run_of, sampler_of
from .constraints import Inpaint, rows_of
from .images import FAR, from_pixels
from .model import Model
from .process import checked_count
from .samplers import SAMPLERS
from .sampling import sample
from .schedule import Schedule
from .system import System, part_seeds, seeds_of

IMAGE, AUGMENTATION = "image", "augmentation"
"""The conditions of these models: [C, H, W], in [-1, 1], and a number of time steps."""

LEVEL = 50
"""The augmentation of samples, unless told otherwise, in time steps of a schedule of 1000."""


# --- pictures, as the networks are given them ---


def picture_of(item: Any) -> tuple[Tensor, Tensor]:
    """(x, x as floats in [-1, 1]) of an item of a dataset: x, (x, label) or a dict with "x".

    Raises TypeError where x is no tensor.
    """
    x = item.get("x") if isinstance(item, Mapping) else item[0] if isinstance(item, tuple | list) else item
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a picture [C, H, W] as a tensor in an item, got {type(x).__name__}")
    return x, from_pixels(x) if x.dtype == torch.uint8 else x.float()


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pictures [N, C, h, w] in [-1, 1] at another size (H, W), by bicubic interpolation, clamped to [-1, 1]."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    shrinks = size[0] < x.shape[2] or size[1] < x.shape[3]
    return F.interpolate(x, tuple(size), mode="bicubic", align_corners=False, antialias=shrinks).clamp(-1, 1)


def augmented(x: Tensor, level: int | Tensor, seeds: Tensor, schedule: Schedule) -> Tensor:
    """Noise pictures [N, ...] by the first ``level`` time steps of a schedule: 0 (none) to T, an int or int64 [N].

    sqrt(alpha_bar) x + sqrt(1 - alpha_bar) z, where alpha_bar is that of the last of these steps, and z is
    ``noise(seeds, shape, step=level, stream=2)``.
    """
    none = torch.tensor([[1.0, 0.0]], dtype=torch.float32, device=x.device)
    return ops.q_sample(x, level, seeds, torch.cat((none, schedule.q_table(x.device))))


def holed(x: Tensor, mask: Tensor, seeds: Tensor) -> Tensor:
    """Pictures [N, C, H, W] with noise where ``mask``, [N or 1, C or 1, H, W], is 1 (Saharia et al. 2022)."""
    return mask * ops.noise(seeds, x.shape[1:], step=0, stream=2, device=x.device) + (1 - mask) * x


def gray(x: Tensor) -> Tensor:
    """The luma (ITU-R BT.601) of pictures [..., 3, H, W], as three equal channels."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device).view(3, 1, 1)
    return (x * weights).sum(-3, keepdim=True).expand_as(x).contiguous()


# --- sampling ---


def check_given_image(model: Model) -> None:
    """Raises ValueError for a model that is not given a picture of the shape of its samples."""
    shapes = {condition.name: condition.shape for condition in model.conditions}
    if shapes.get(IMAGE) != model.shape or len(model.shape) != 3:
        expected = f"one with the condition {IMAGE} of the shape of its samples, {model.shape}"
        remedy = "" if shapes else f'; a network of your own: Model(..., conditions={{"{IMAGE}": {model.shape}}})'
        raise ValueError(f"model: expected {expected}, got {model.name} with {shapes or 'none'}{remedy}")
    if AUGMENTATION in shapes and not (shapes[AUGMENTATION] == () and isinstance(model.schedule, Schedule)):
        got = f"{shapes[AUGMENTATION]} with a {type(model.schedule).__name__}"
        raise ValueError(f"{AUGMENTATION}: expected a number, and a schedule of time steps, got {got}")


def check_stage(model: Model, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a model that cannot enlarge samples of that shape."""
    check_given_image(model)
    fits = len(shape) == 3 and shape[0] == model.shape[0] and shape[1] < model.shape[1] and shape[2] < model.shape[2]
    if not fits:
        raise ValueError(f"model: expected one of pictures larger than {shape}, got {model.name} of {model.shape}")
    if not _proportional(model.shape, shape):
        expected = f"one of pictures with the proportions of {shape}"
        raise ValueError(f"model: expected {expected}, got {model.name} of {model.shape}")


def _proportional(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether pictures of the shapes [..., H, W] have the same proportions."""
    return a[-2] * b[-1] == a[-1] * b[-2]


def is_augmented(model: Model) -> bool:
    """Whether the model is given noised pictures, and the level of their noise."""
    return any(condition.name == AUGMENTATION for condition in model.conditions)


def sample_given(model: Model, image: Tensor, seeds: Tensor, *, level: int = LEVEL, **options: Any) -> Tensor:
    """Draw a sample for each picture [N, C, h, w] and seed [N]: [N, C, H, W].

    The picture is enlarged to the model's size. For a model with the condition :data:`AUGMENTATION` it is noised by
    ``level`` time steps, at most all, by a seed that is made of the sample's.
    """
    image, given = resized(image.to("cpu", torch.float32), model.shape[1:]), {}
    if is_augmented(model):
        level = min(level, model.schedule.T)
        image, given = augmented(image, level, part_seeds(seeds, 1), model.schedule), {AUGMENTATION: level}
    return sample(model, seeds=seeds, **{IMAGE: image}, **given, **options)


def enlarged(
    stages: Mapping[int, Model],
    x: Tensor,
    seeds: Tensor,
    *,
    level: int = LEVEL,
    labels: Any = None,
    conditions: Mapping[str, Tensor] | None = None,
    callback: Any = None,
    **options: Any,
) -> Tensor:
    """Draw larger and larger pictures of ``x`` [N, C, h, w], by the models in their order.

    stages      by the numbers of the parts that they are: each draws by the part's seeds
    labels, conditions  go to the models that have them; ``callback`` is of the last
    """
    for last, (part, model) in zip(range(len(stages))[::-1], stages.items(), strict=True):
        names = {condition.name for condition in model.conditions} - {IMAGE, AUGMENTATION}
        x = sample_given(
            model,
            x,
            part_seeds(seeds, part),
            level=level,
            labels=labels if model.num_classes else None,
            callback=None if last else callback,
            **{name: value for name, value in (conditions or {}).items() if name in names},
            **options,
        )
    return x


def sample_and_enlarge(
    base: Model,
    stages: Mapping[int, Model],
    seeds: Tensor,
    *,
    level: int = LEVEL,
    augmentation: int | None = None,
    labels: Any = None,
    guidance: Any = None,
    callback: Any = None,
    **options: Any,
) -> Tensor:
    """Draw by ``base``, as :func:`diffkern.sample` does, and enlarge what it draws.

    What is of the base's samples alone goes to it alone: x_T, start, constraint, guidance. Labels and its conditions
    go to those of the stages that have them, too, and all other options to all. ``augmentation`` is in the place
    of ``level`` where it is given.
    """
    _check_options(options, base)
    level = level_of(augmentation, stages, level)
    conditions = {c.name: options.pop(c.name) for c in base.conditions if c.name in options}
    own = {name: options.pop(name) for name in ("x_T", "start", "constraint") if name in options}
    own |= dict(guidance=guidance, callback=None if stages else callback)
    x = sample(base, seeds=seeds, labels=labels, **own, **conditions, **options)
    given = dict(level=level, labels=labels, conditions=conditions, callback=callback)
    return enlarged(stages, x, seeds, **given, **options)


def _check_options(options: Mapping[str, Any], base: Model) -> None:
    """TypeError for an option that neither the system nor ``base`` can take, whatever the sampler."""
    sampler = options.get("sampler")
    samplers = (*SAMPLERS.values(), *([] if sampler is None else [sampler_of(sampler)]))
    own, others = [condition.name for condition in base.conditions], ("spacing", "x_T", *OTHERS)
    known = {*own, *others, *inspect.signature(sample).parameters}.union(*(made.options for made in samplers))
    for name, value in options.items():
        if name not in known:
            conditions = f"a condition of {base.name} ({', '.join(own) or 'none'})"
            expected = f"{AUGMENTATION}, an option of the sampler, {conditions}, or one of {', '.join(others)}"
            raise TypeError(f"{name}: expected {expected}, got {value!r}")


def level_of(augmentation: Any, stages: Mapping[int, Model], level: int) -> int:
    """``level``, unless ``augmentation`` is given. Raises ValueError where that fits no model."""
    if augmentation is None:
        return level
    least = min((m.schedule.T for m in stages.values() if is_augmented(m)), default=None)
    if least is None:
        raise ValueError(f"{AUGMENTATION}: expected None, as no model is given noised pictures, got {augmentation!r}")
    level = checked_count(AUGMENTATION, augmentation, 0)
    if level > least:
        raise ValueError(f"{AUGMENTATION}: expected a number of time steps in 0..{least}, got {level}")
    return level


def upscale(
    model: str | os.PathLike | Model | System,
    small: Tensor,
    *,
    seeds: Any = None,
    augmentation: int | None = None,
    **options: Any,
) -> Tensor:
    """Draw a large picture for each small one (Saharia et al. 2021; Ho et al. 2022): [N, C, H, W] in [-1, 1].

    model         a model that is given a picture, or a system with such models, as a :class:`Cascade`: those that
                  enlarge, one after the other; or its name or file
    small         [N, C, h, w], in [-1, 1]
    seeds         the seed of each, the seeds 0..N-1 unless given
    augmentation  by how many time steps of noise to hide the details of ``small``: 0 takes it as it is
    options       as :func:`diffkern.sample` takes them: steps, sampler, run

    ``upscale(cascade, sample(cascade.base, n))`` is ``sample(cascade, n)``. Raises TypeError or ValueError for an
    argument that does not fit.
    """
    run = run_of(options.pop("run", None), options)
    model = loaded(model, run)
    if isinstance(model, System):
        stages, level, options = model.stages, model.augmentation, {"steps": model.steps} | options
    else:
        stages, level = {1: _checked_model(model)}, LEVEL
    _check_pictures("small", small, 4)
    larger = {part: m for part, m in stages.items() if m.shape[1] > small.shape[2] and m.shape[2] > small.shape[3]}
    if not larger:
        sizes = ", ".join(f"{m.shape[1]} x {m.shape[2]}" for m in stages.values()) or "none"
        height, width = small.shape[2:]
        raise ValueError(f"small: expected pictures smaller than the model's ({sizes}), got {height} x {width}")
    first = next(iter(larger.values()))
    if not _proportional(first.shape, small.shape):
        sizes = " to ".join(f"{height} x {width}" for *_, height, width in (small.shape, first.shape))
        raise ValueError(f"small: expected pictures with the proportions of the model's, got {sizes}")
    small, level = _in_channels("small", small, first), level_of(augmentation, larger, level)
    return enlarged(larger, small, seeds_of(len(small), seeds), level=level, run=run, **options)


def restore(
    model: str | os.PathLike | Model,
    image: Tensor,
    n: int | None = None,
    *,
    seeds: Any = None,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Draw n pictures of which ``image`` may be what is left (Palette, Saharia et al. 2022): [n, C, H, W] in [-1, 1].

    model    a model that is given a picture; or its name or file
    image    [C, H, W] in [-1, 1], of the model's size; of one channel, if it is gray
    n        4, of the seeds 0 to 3, unless ``n`` or ``seeds`` say otherwise
    mask     [C or 1, H, W], 1 or True where to make something new; where it is 0, the picture stays as it is, exactly
    options  as :func:`diffkern.sample` takes them: steps, sampler, run

    Raises TypeError or ValueError for an argument that does not fit.
    """
    run = run_of(options.pop("run", None), options)
    model = _checked_model(loaded(model, run))
    _check_pictures("image", image, 3)
    image = _in_channels("image", image[None], model).to("cpu", torch.float32)
    if tuple(image.shape[1:]) != model.shape:
        raise ValueError(f"image: expected the model's shape {model.shape}, got {tuple(image.shape[1:])}")
    seeds = seeds_of(4 if n is None and seeds is None else n, seeds)
    images = image.expand(len(seeds), -1, -1, -1)
    if mask is None:
        return sample_given(model, images, seeds, run=run, **options)
    _check_pictures("mask", mask.float() if isinstance(mask, Tensor) and mask.dtype == torch.bool else mask, 3)
    mask = Inpaint(image, mask[None]).mask.to("cpu", torch.float32)  # which checks its values
    mask = rows_of("mask", mask, len(seeds), model.shape)
    x = sample_given(model, holed(images, mask, part_seeds(seeds, 1)), seeds, run=run, **options)
    mask, image = mask.to(x.device), image.to(x.device)
    return torch.where(mask == 0, image, mask * x + (1 - mask) * image)


def _checked_model(model: Any) -> Model:
    if not isinstance(model, Model):
        raise TypeError(f"model: expected a Model, or the name or file of one, got {type(model).__name__}")
    check_given_image(model)
    return model


def _check_pictures(name: str, x: Any, ndim: int) -> None:
    if not isinstance(x, Tensor) or x.ndim != ndim or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected floats [{'N, ' * (ndim == 4)}C, H, W], got {got}")


def _in_channels(name: str, x: Tensor, model: Model) -> Tensor:
    """Pictures [N, C, h, w], gray ones with the channels of the model. Raises ValueError for those of another range."""
    channels = model.shape[0]
    if x.shape[1] not in (1, channels):
        raise ValueError(f"{name}: expected 1 or {channels} channels, got {x.shape[1]}")
    if x.numel() and x.abs().max() > FAR:
        raise ValueError(f"{name}: expected values in [-1, 1], got {x.min():.4g} to {x.max():.4g}")
    return x.expand(-1, channels, -1, -1)
