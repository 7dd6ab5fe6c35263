"""Random changes to a whole batch at once, on its own device.

Every geometric change is one part of a single map from output to input coordinates, so that an image is resampled once.
Shapes: B images, C channels, H height, W width, with H = W; 2 coordinates (x, y) in [-1, 1] from edge to edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import AugmentationConfig

ERASED_AREA = (0.02, 0.2)
"""Smallest and largest share of the area that an erased rectangle covers."""

_SHARED = ("shared_rotation", "shared_shear", "shared_stretch", "shared_elastic")
_GEOMETRIC = ("rotation", "translation", "scale", "shear", "stretch", "crop", "horizontal_flip", "elastic", *_SHARED)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's conversion to grey


class Augmenter:
    """Changes float32 images [B, C, H, W] with values in [0, 1]; what is off costs nothing and changes no bit.

    The changes follow from `generator` alone, which may live on another device than the images.
    """

    def __init__(self, config: AugmentationConfig, *, generator: torch.Generator) -> None:
        self.config = config
        self.generator = generator
        off = AugmentationConfig()
        self._is_geometric = any(getattr(config, name) != getattr(off, name) for name in _GEOMETRIC)
        self._is_shared = any(getattr(config, name) != getattr(off, name) for name in _SHARED)
        self._rows, self._of = slice(0), 0

    def __call__(self, images_BCHW: Tensor, *, rows: slice | None = None, of: int | None = None) -> Tensor:
        """Images of the same shape on the same device; the ones given are left as they are.

        Where they are `rows` of a batch `of` more, they change as they would in the whole of it.
        """
        self._rows, self._of = rows or slice(len(images_BCHW)), of or len(images_BCHW)
        if self._is_geometric:
            images_BCHW = self._resampled(images_BCHW)
        images_BCHW = self._recoloured(images_BCHW)
        if self.config.erase:
            images_BCHW = self._erased(images_BCHW)
        if self.config.noise:
            noise_BCHW = self._normal(images_BCHW.shape, images_BCHW)
            images_BCHW = (images_BCHW + self.config.noise * noise_BCHW).clamp(0, 1)
        return images_BCHW

    def _resampled(self, images_BCHW: Tensor) -> Tensor:
        theta_B23 = self._affine(images_BCHW)
        grid_BHW2 = F.affine_grid(theta_B23, list(images_BCHW.shape), align_corners=False)
        if self.config.elastic:
            grid_BHW2 = grid_BHW2 + self._displacement(images_BCHW)
        if self._is_shared:
            grid_BHW2 = self._shared(grid_BHW2)
        if self.config.fill == "edge":
            return F.grid_sample(images_BCHW, grid_BHW2, padding_mode="border", align_corners=False)
        # grid_sample pads with zeros: shift the values so that zero is the fill.
        fill = self.config.fill
        return (
            F.grid_sample(images_BCHW - fill, grid_BHW2, padding_mode="zeros", align_corners=False)
            .add_(fill)
            .clamp_(0, 1)
        )

    def _affine(self, like: Tensor) -> Tensor:
        """Maps [B, 2, 3] from output to input: crop ∘ translate ∘ rotate ∘ shear ∘ scale ∘ stretch ∘ flip."""
        config, size = self.config, len(like)
        angle_B = self._between(-math.radians(config.rotation), math.radians(config.rotation), size, like)
        tilt = math.tan(math.radians(config.shear))
        shear_x_B, shear_y_B = (self._between(-tilt, tilt, size, like) for _ in range(2))
        smallest, largest = config.scale
        zoom_B = self._between(math.log(smallest), math.log(largest), size, like).exp()
        narrowest, widest = config.stretch
        wide_B = self._between(math.log(narrowest) / 2, math.log(widest) / 2, size, like).exp()
        mirror_B = torch.where(self._chosen(config.horizontal_flip, size, like), -1.0, 1.0)
        side_B = self._between(*config.crop, size, like).sqrt()
        crop_B2 = self._uniform((size, 2), like).mul(2).sub(1) * (1 - side_B)[:, None]
        shift_B2 = self._uniform((size, 2), like).mul(2).sub(1) * (2 * config.translation)

        cos_B, sin_B = angle_B.cos(), angle_B.sin()
        rotate_B22 = torch.stack([cos_B, -sin_B, sin_B, cos_B], 1).view(-1, 2, 2)
        one_B = torch.ones_like(cos_B)
        shear_B22 = torch.stack([one_B, shear_x_B, shear_y_B, one_B], 1).view(-1, 2, 2)
        stretch_B2 = torch.stack([mirror_B / (zoom_B * wide_B), wide_B / zoom_B], 1)
        linear_B22 = rotate_B22 @ shear_B22 * stretch_B2[:, None, :]
        offset_B2 = crop_B2 + side_B[:, None] * shift_B2
        return torch.cat([side_B[:, None, None] * linear_B22, offset_B2[:, :, None]], 2)

    def _displacement(self, like: Tensor) -> Tensor:
        """A smooth random field [B, H, W, 2] in grid units, of which the whole side is 2."""
        cells = self.config.elastic_cells
        coarse_B2cc = self._normal((len(like), 2, cells, cells), like) * (2 * self.config.elastic)
        return _smooth(coarse_B2cc, like.shape[-2:]).permute(0, 2, 3, 1)

    def _shared(self, grid_BHW2: Tensor) -> Tensor:
        """One further map for the whole batch, from where an image's own map leads to the input.

        It comes last on the way to the input, so that each image is changed as if the changed one had been drawn.
        """
        config = self.config
        turn, tilt_x, tilt_y, widen = self._drawn(torch.rand, (4,), grid_BHW2).mul(2).sub(1).tolist()
        angle = math.radians(config.shared_rotation) * turn
        tilt = math.tan(math.radians(config.shared_shear))
        narrowest, widest = (math.log(end) / 2 for end in config.shared_stretch)
        wide = math.exp((narrowest + widest) / 2 + (widest - narrowest) / 2 * widen)
        rotate_22 = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        shear_22 = torch.tensor([[1, tilt * tilt_x], [tilt * tilt_y, 1]])
        stretch_22 = torch.tensor([[1 / wide, 0], [0, wide]])
        grid_BHW2 = grid_BHW2 @ (rotate_22 @ shear_22 @ stretch_22).to(grid_BHW2).T
        if not config.shared_elastic:
            return grid_BHW2
        coarse_12cc = self._drawn(torch.randn, (1, 2, config.elastic_cells, config.elastic_cells), grid_BHW2)
        field_12HW = _smooth(coarse_12cc * (2 * config.shared_elastic), grid_BHW2.shape[1:3])
        field_B2HW = field_12HW.expand(len(grid_BHW2), -1, -1, -1)
        moved_B2HW = F.grid_sample(field_B2HW, grid_BHW2, padding_mode="border", align_corners=True)
        return grid_BHW2 + moved_B2HW.permute(0, 2, 3, 1)

    def _recoloured(self, images_BCHW: Tensor) -> Tensor:
        config, size = self.config, len(images_BCHW)
        before = images_BCHW
        if config.brightness:
            images_BCHW = images_BCHW * self._factor(config.brightness, size, images_BCHW)
        if config.contrast:
            mean_B111 = _grey(images_BCHW).mean(dim=(1, 2, 3), keepdim=True)
            images_BCHW = torch.lerp(mean_B111, images_BCHW, self._factor(config.contrast, size, images_BCHW))
        if config.saturation:
            factor_B111 = self._factor(config.saturation, size, images_BCHW)
            images_BCHW = torch.lerp(_grey(images_BCHW), images_BCHW, factor_B111)
        if config.grey:
            chosen_B111 = self._chosen(config.grey, size, images_BCHW).view(-1, 1, 1, 1)
            images_BCHW = torch.where(chosen_B111, _grey(images_BCHW), images_BCHW)
        return images_BCHW if images_BCHW is before else images_BCHW.clamp(0, 1)

    def _erased(self, images_BCHW: Tensor) -> Tensor:
        size, (height, width) = len(images_BCHW), images_BCHW.shape[-2:]
        area_B = self._between(*ERASED_AREA, size, images_BCHW)
        aspect_B = self._between(-math.log(2), math.log(2), size, images_BCHW).exp()
        tall_B, wide_B = (area_B * aspect_B).sqrt(), (area_B / aspect_B).sqrt()
        top_B = self._uniform((size,), images_BCHW) * (1 - tall_B)
        left_B = self._uniform((size,), images_BCHW) * (1 - wide_B)
        in_rows_BH = _within(top_B, tall_B, height)
        in_columns_BW = _within(left_B, wide_B, width)
        chosen_B = self._chosen(self.config.erase, size, images_BCHW)
        mask_B1HW = (chosen_B[:, None, None] & in_rows_BH[:, :, None] & in_columns_BW[:, None, :])[:, None]
        grey_B111 = self._uniform((size, 1, 1, 1), images_BCHW)
        return torch.where(mask_B1HW, grey_B111, images_BCHW)

    def _factor(self, jitter: float, size: int, like: Tensor) -> Tensor:
        return self._between(1 - jitter, 1 + jitter, size, like).view(-1, 1, 1, 1)

    def _chosen(self, probability: float, size: int, like: Tensor) -> Tensor:
        return self._uniform((size,), like) < probability

    def _between(self, low: float, high: float, size: int, like: Tensor) -> Tensor:
        return low + (high - low) * self._uniform((size,), like)

    def _uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self._drawn(torch.rand, (self._of, *shape[1:]), like)[self._rows]

    def _normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self._drawn(torch.randn, (self._of, *shape[1:]), like)[self._rows]

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Random numbers of exactly this shape, whatever the part of the batch."""
        return draw(shape, generator=self.generator, device=self.generator.device).to(like.device)


def _smooth(coarse_B2cc: Tensor, size: Sequence[int]) -> Tensor:
    """A field [B, 2, H, W] through the values of a coarse grid, whose outermost lie on the edges."""
    return F.interpolate(coarse_B2cc, size=tuple(size), mode="bicubic", align_corners=True)


def _grey(images_BCHW: Tensor) -> Tensor:
    """Luma [B, 1, H, W]; grey images are their own."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    red_B1HW, green_B1HW, blue_B1HW = (images_BCHW[:, at : at + 1] for at in range(3))
    return _LUMA[0] * red_B1HW + _LUMA[1] * green_B1HW + _LUMA[2] * blue_B1HW


def _within(start_B: Tensor, extent_B: Tensor, pixels: int) -> Tensor:
    """Which of `pixels` pixel centres [B, pixels], on a line of length 1, lie in [start, start + extent)."""
    centre = (torch.arange(pixels, device=start_B.device, dtype=start_B.dtype) + 0.5) / pixels
    return (centre >= start_B[:, None]) & (centre < (start_B + extent_B)[:, None])
