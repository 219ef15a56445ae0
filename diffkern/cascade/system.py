"""A cascade as one object: a base model and upsamplers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import run_of, samples_of
from ..image_to_image import LEVEL, check_stage, enlarged, level_of, sample_and_enlarge
from ..model import Model, check_classes, check_models, unwrapped
from ..process import checked_count
from ..sampling import interpolate
from ..system import System, seeds_of
from . import files


@dataclass(repr=False)
class Cascade(System):
    """Draws small pictures, and enlarges them by one model after the other (Ho et al. 2022).

    base          a model of small pictures, with any conditions
    upsamplers    the models that enlarge them, each given "image", the picture before, at its own size; and
                  "augmentation", if it was trained with noise on that picture
    steps         of every model, unless told otherwise
    guidance      of the base
    augmentation  how many time steps of noise hide the details of a picture that is enlarged
    name          for file names and titles

    Raises TypeError or ValueError for models that do not follow each other.
    """

    base: Model
    upsamplers: tuple[Model, ...]
    steps: int = 25
    guidance: float = 1.0
    augmentation: int = LEVEL
    name: str = "cascade"

    def __post_init__(self):
        if not isinstance(self.upsamplers, Sequence) or isinstance(self.upsamplers, str):
            raise TypeError(f"upsamplers: expected a sequence of Models, got {type(self.upsamplers).__name__}")
        self.upsamplers = tuple(self.upsamplers)
        check_models(base=self.base)
        for model in self.upsamplers:
            check_models(upsamplers=model)
        if not 1 <= len(self.upsamplers) < files.MOST_PARTS:
            raise ValueError(f"upsamplers: expected 1 to {files.MOST_PARTS - 1} models, got {len(self.upsamplers)}")
        checked_count("augmentation", self.augmentation, 0)
        for before, model in zip((self.base, *self.upsamplers), self.upsamplers, strict=False):
            check_stage(model, before.shape)
            check_classes("model", model, self.base)

    def sample(
        self,
        n: int | None = None,
        *,
        seeds: Any = None,
        labels: Any = None,
        steps: Any = None,
        guidance: Any = None,
        augmentation: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Draw pictures [N, C, H, W] in [-1, 1] of the size of the last model.

        n, seeds, labels, guidance  as :func:`diffkern.sample` takes them, for the base
        steps         of every model
        augmentation  how many time steps of noise hide the details of a picture that is enlarged: 0 none
        options       as :func:`diffkern.sample` takes them: x_T, start, constraint and conditions for the base, the
                      others for every model; ``callback`` sees the last

        Raises TypeError or ValueError for an argument that does not fit.
        """
        _, seeds, labels = samples_of(n, seeds, labels, options.get("x_T"), self.base)
        given = dict(labels=labels, guidance=self.guidance if guidance is None else guidance, level=self.augmentation)
        given |= dict(steps=self.steps if steps is None else steps, augmentation=augmentation)
        return sample_and_enlarge(self.base, self.stages, seeds, **given, **options)

    def interpolate(
        self, a: Any, b: Any, n: int = 9, *, seed: int = 0, steps: Any = None, run: Any = None, **options: Any
    ) -> Tensor:
        """Draw n pictures that lead from ``a`` to ``b``, each a picture [C, H, W] or the seed of one.

        The base draws what lies between them, and all frames are enlarged with the noise of one ``seed``.
        """
        ends = (self._small(end) for end in (a, b))
        run = run_of(run, options)
        options |= dict(steps=self.steps if steps is None else steps, run=run)
        level = level_of(options.pop("augmentation", None), self.stages, self.augmentation)
        x = interpolate(self.base, *ends, n, seed=seed, **options)
        shared = {name: value for name, value in options.items() if name in ("steps", "sampler", "run", "labels")}
        return enlarged(self.stages, x, seeds_of(None, [seed] * n), level=level, **shared)

    def _small(self, end: Any) -> Any:
        """A picture at the size of the base, by averages; the seed of one as it is."""
        if not isinstance(end, Tensor) or end.ndim != 3 or tuple(end.shape) == self.base.shape:
            return end
        return F.adaptive_avg_pool2d(end, self.base.shape[1:])

    @property
    def drawn(self) -> Model:
        return self.upsamplers[-1]

    @property
    def stages(self) -> dict[int, Model]:
        return dict(enumerate(self.upsamplers, 1))

    def models(self) -> dict[str, Model]:
        """The parts by name."""
        return {files.part_name(part): model for part, model in enumerate((self.base, *self.upsamplers))}

    def networks(self) -> dict[str, nn.Module]:
        return {name: unwrapped(model.network) for name, model in self.models().items()}

    def description(self) -> dict[str, Any]:
        return files.describe(self)
