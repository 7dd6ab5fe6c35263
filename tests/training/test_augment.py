"""Augmentation: off means untouched; on, each change does what its name says and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.augment import Augmenter
from training.config import AugmentationConfig

SHARED: dict[str, Any] = {
    "shared_rotation": 90.0, "shared_shear": 20.0, "shared_stretch": (0.5, 2.0), "shared_elastic": 0.05
}  # fmt: skip

EVERYTHING: dict[str, Any] = {
    "rotation": 20.0, "translation": 0.1, "scale": (0.8, 1.2), "shear": 10.0, "stretch": (0.8, 1.25),
    "crop": (0.5, 1.0), "horizontal_flip": 0.5, "elastic": 0.02, "brightness": 0.3, "contrast": 0.3,
    "saturation": 0.3, "grey": 0.3, "erase": 0.5, "noise": 0.05, **SHARED,
}  # fmt: skip


def augment(images_BCHW: Tensor, *, seed: int = 0, **changes: Any) -> Tensor:
    return Augmenter(AugmentationConfig(**changes), generator=torch.Generator().manual_seed(seed))(images_BCHW)


def random_images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def spot(*, size: int = 33, row: int, column: int, copies: int = 64) -> Tensor:
    """White images [B, 1, H, W] with one soft black spot."""
    y_H1, x_1W = torch.arange(size)[:, None], torch.arange(size)[None, :]
    image_HW = 1 - torch.exp(-((y_H1 - row) ** 2 + (x_1W - column) ** 2) / 8)
    return image_HW.expand(copies, 1, size, size).clone()


def centres(images_B1HW: Tensor) -> tuple[Tensor, Tensor]:
    """The darkness-weighted mean position (row [B], column [B]), from the middle, as a share of the side."""
    dark_BHW = 1 - images_B1HW[:, 0]
    place = (torch.arange(dark_BHW.shape[-1]) + 0.5) / dark_BHW.shape[-1] - 0.5
    total_B = dark_BHW.sum((1, 2))
    return (dark_BHW.sum(2) * place).sum(1) / total_B, (dark_BHW.sum(1) * place).sum(1) / total_B


def test_off_changes_no_bit() -> None:
    images_BCHW = random_images(4, 3, 16, 16)
    assert augment(images_BCHW) is images_BCHW
    assert augment(images_BCHW, fill=1.0, elastic_cells=8) is images_BCHW


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    names=st.sets(st.sampled_from(sorted(EVERYTHING))),
    channels=st.sampled_from([1, 3]),
    fill=st.sampled_from(["edge", 0.0, 0.5, 1.0]),
)
def test_shape_range_and_input_are_kept(seed: int, names: set[str], channels: int, fill: str | float) -> None:
    images_BCHW = random_images(3, channels, 17, 17)
    before_BCHW = images_BCHW.clone()
    after_BCHW = augment(images_BCHW, seed=seed, fill=fill, **{name: EVERYTHING[name] for name in names})
    assert after_BCHW.shape == images_BCHW.shape
    assert after_BCHW.dtype == torch.float32
    assert after_BCHW.min() >= 0
    assert after_BCHW.max() <= 1 + 1e-6
    assert torch.equal(images_BCHW, before_BCHW)


def test_the_same_generator_gives_the_same_images() -> None:
    images_BCHW = random_images(8, 3, 16, 16)
    assert torch.equal(augment(images_BCHW, seed=3, **EVERYTHING), augment(images_BCHW, seed=3, **EVERYTHING))
    assert not torch.equal(augment(images_BCHW, seed=3, **EVERYTHING), augment(images_BCHW, seed=4, **EVERYTHING))


def test_calls_go_on_from_one_another_and_resume_from_the_generators_state() -> None:
    images_BCHW = random_images(4, 1, 16, 16)
    generator = torch.Generator().manual_seed(5)
    augmenter = Augmenter(AugmentationConfig(rotation=30.0), generator=generator)
    first = augmenter(images_BCHW)
    state = generator.get_state()
    second = augmenter(images_BCHW)
    assert not torch.equal(first, second)
    generator.set_state(state)
    assert torch.equal(augmenter(images_BCHW), second)


@pytest.mark.parametrize("name", sorted(set(EVERYTHING) - set(SHARED)))
def test_each_image_is_changed_by_itself(name: str) -> None:
    images_BCHW = random_images(1, 3, 16, 16).expand(32, 3, 16, 16)
    after_BCHW = augment(images_BCHW, **{name: EVERYTHING[name]})
    assert len({image.numpy().tobytes() for image in after_BCHW}) > 1


class TestGeometry:
    """Where a spot goes."""

    def test_a_certain_flip_mirrors_left_and_right(self) -> None:
        images_BCHW = random_images(4, 3, 16, 16)
        torch.testing.assert_close(augment(images_BCHW, horizontal_flip=1.0), images_BCHW.flip(-1), atol=1e-5, rtol=0)

    def test_a_likely_flip_mirrors_some(self) -> None:
        _, column_B = centres(augment(spot(row=16, column=6, copies=400), horizontal_flip=0.25))
        assert 0.15 < (column_B > 0).float().mean() < 0.35

    def test_rotation_keeps_the_distance_from_the_middle_and_spans_the_angle(self) -> None:
        row_B, column_B = centres(augment(spot(row=16, column=26, copies=400), rotation=30.0, fill=1.0))
        torch.testing.assert_close(torch.hypot(row_B, column_B), torch.full((400,), 10 / 33), atol=3e-3, rtol=0)
        angle_B = torch.atan2(row_B, column_B).rad2deg()
        assert angle_B.abs().max() <= 30.5
        assert angle_B.max() > 27
        assert angle_B.min() < -27

    def test_translation_is_a_share_of_the_side(self) -> None:
        row_B, column_B = centres(augment(spot(row=16, column=16, copies=400), translation=0.2, fill=1.0))
        for shift_B in (row_B, column_B):
            assert 0.18 < shift_B.max() < 0.205
            assert -0.205 < shift_B.min() < -0.18
        assert abs(torch.corrcoef(torch.stack([row_B, column_B]))[0, 1]) < 0.2

    def test_scale_magnifies_about_the_middle(self) -> None:
        row_B, column_B = centres(augment(spot(row=20, column=20, copies=400), scale=(0.5, 2.0), fill=1.0))
        factor_B = column_B / (4 / 33)
        torch.testing.assert_close(row_B, column_B, atol=1e-4, rtol=0)
        assert 1.9 < factor_B.max() < 2.02
        assert 0.49 < factor_B.min() < 0.52
        assert abs(factor_B.log().mean()) < 0.1  # as often half as double

    def test_shear_slants_by_up_to_its_angle(self) -> None:
        row_B, column_B = centres(augment(spot(row=26, column=16, copies=400), shear=20.0, fill=1.0))
        slant_B = torch.atan2(column_B, row_B).rad2deg().abs()
        assert 15 < slant_B.max() <= 20.5

    def test_stretch_keeps_the_area_and_spans_width_over_height(self) -> None:
        row_B, column_B = centres(augment(spot(row=20, column=20, copies=400), stretch=(0.5, 2.0), fill=1.0))
        torch.testing.assert_close(row_B * column_B, torch.full((400,), (4 / 33) ** 2), atol=1e-3, rtol=0)
        ratio_B = column_B / row_B
        assert 1.85 < ratio_B.max() < 2.05
        assert 0.48 < ratio_B.min() < 0.55
        assert abs(ratio_B.log().mean()) < 0.1  # as often half as double

    def test_a_crop_fills_the_frame_and_stays_inside(self) -> None:
        # Coordinates as values: a crop of area 1/4 spans half of them, whichever way it lies.
        ramp_BCHW = ((torch.arange(64) + 0.5) / 64).expand(200, 1, 64, 64).clone()
        cropped_BCHW = augment(ramp_BCHW, crop=(0.25, 0.25))
        low_B, high_B = cropped_BCHW.amin((1, 2, 3)), cropped_BCHW.amax((1, 2, 3))
        torch.testing.assert_close(high_B - low_B, torch.full((200,), 0.5), atol=0.02, rtol=0)
        assert low_B.min() < 0.02
        assert high_B.max() > 0.98

    def test_translation_is_a_share_of_what_a_crop_kept(self) -> None:
        _, column_B = centres(
            augment(spot(row=16, column=16, copies=2000), crop=(0.49, 0.49), translation=0.1, fill=1.0)
        )
        farthest = 0.5 * (1 - 0.7) / 0.7 + 0.1
        assert farthest - 0.03 < column_B.abs().max() < farthest + 0.005

    def test_elastic_moves_parts_by_about_its_size(self) -> None:
        row_B, column_B = centres(augment(spot(row=16, column=16, copies=600), elastic=0.03, elastic_cells=2, fill=1.0))
        for shift_B in (row_B, column_B):
            assert abs(shift_B.mean()) < 0.005
            assert 0.01 < shift_B.std() < 0.03  # the middle of two cells a side averages four draws

    @pytest.mark.parametrize("fill", [0.0, 0.25, 1.0])
    def test_the_outside_has_the_fill(self, fill: float) -> None:
        after_BCHW = augment(torch.full((16, 1, 33, 33), 0.6), scale=(0.5, 0.5), fill=fill)
        torch.testing.assert_close(after_BCHW[:, :, 0, 0], torch.full((16, 1), fill))
        torch.testing.assert_close(after_BCHW[:, :, 16, 16], torch.full((16, 1), 0.6))

    def test_the_outside_repeats_the_edge(self) -> None:
        images_BCHW = torch.full((4, 1, 33, 33), 0.5)
        images_BCHW[..., 0] = 0.9
        after_BCHW = augment(images_BCHW, scale=(0.5, 0.5), fill="edge")
        torch.testing.assert_close(after_BCHW[..., 0], torch.full((4, 1, 33), 0.9))


class TestShared:
    """Changes that a whole batch has in common."""

    @pytest.mark.parametrize("name", sorted(SHARED))
    def test_all_images_of_a_batch_change_alike_and_batches_do_not(self, name: str) -> None:
        images_BCHW = spot(row=24, column=20, copies=6)
        first_BCHW, second_BCHW = (augment(images_BCHW, seed=seed, fill=1.0, **{name: SHARED[name]}) for seed in (1, 2))
        torch.testing.assert_close(first_BCHW, first_BCHW[:1].expand_as(first_BCHW))
        assert (first_BCHW - second_BCHW).abs().max() > 0.1
        assert (first_BCHW - images_BCHW).abs().max() > 0.05

    def test_a_rotation_stays_within_its_angle_and_uses_it(self) -> None:
        angle_S = torch.cat(
            [
                torch.atan2(
                    *centres(augment(spot(row=16, column=28, copies=1), seed=seed, shared_rotation=90.0, fill=1.0))
                )
                for seed in range(200)
            ]
        ).rad2deg()
        assert 80 < angle_S.max() <= 90.5
        assert -90.5 <= angle_S.min() < -80
        assert abs(angle_S.mean()) < 15

    def test_a_stretch_keeps_the_area_and_spans_width_over_height(self) -> None:
        places = [
            centres(augment(spot(row=20, column=20, copies=1), seed=seed, shared_stretch=(0.5, 2.0), fill=1.0))
            for seed in range(200)
        ]
        row_S, column_S = (torch.cat(places_S) for places_S in zip(*places, strict=True))
        torch.testing.assert_close(row_S * column_S, torch.full((200,), (4 / 33) ** 2), atol=1e-3, rtol=0)
        assert 1.85 < (column_S / row_S).max() < 2.05
        assert 0.48 < (column_S / row_S).min() < 0.55

    def test_an_image_is_changed_by_itself_as_if_the_changed_one_had_been_drawn(self) -> None:
        # Turned by a shared quarter, an image that is then shifted moves along its own new axes: the spots of a batch
        # lie apart by as much as without the turn.
        options: dict[str, Any] = {"translation": 0.2, "fill": 1.0}
        row_B, column_B = centres(augment(spot(row=16, column=16), **options))
        turned_row_B, turned_column_B = centres(augment(spot(row=16, column=16), shared_rotation=180.0, **options))
        torch.testing.assert_close(turned_row_B, row_B, atol=0.01, rtol=0)
        torch.testing.assert_close(turned_column_B, column_B, atol=0.01, rtol=0)

    def test_parts_of_a_batch_share_its_draw(self) -> None:
        images_BCHW = random_images(6, 1, 17, 17)
        whole_BCHW = augment(images_BCHW, **SHARED)
        part_BCHW = Augmenter(AugmentationConfig(**SHARED), generator=torch.Generator().manual_seed(0))(
            images_BCHW[4:], rows=slice(4, 6), of=6
        )
        torch.testing.assert_close(part_BCHW, whole_BCHW[4:])


class TestColour:
    """How values change."""

    def test_brightness_is_one_factor_an_image(self) -> None:
        images_BCHW = random_images(200, 3, 4, 4) * 0.5 + 0.1
        factor_BCHW = augment(images_BCHW, brightness=0.4) / images_BCHW
        torch.testing.assert_close(factor_BCHW.amin((1, 2, 3)), factor_BCHW.amax((1, 2, 3)))
        assert 0.6 - 1e-6 <= factor_BCHW.min() < 0.63
        assert 1.37 < factor_BCHW.max() <= 1.4 + 1e-6

    def test_contrast_keeps_the_mean_grey(self) -> None:
        images_BCHW = random_images(50, 1, 8, 8) * 0.3 + 0.35
        after_BCHW = augment(images_BCHW, contrast=0.5)
        torch.testing.assert_close(after_BCHW.mean((1, 2, 3)), images_BCHW.mean((1, 2, 3)))
        ratio_B = after_BCHW.std((1, 2, 3)) / images_BCHW.std((1, 2, 3))
        assert 0.5 <= ratio_B.min() < 0.6
        assert 1.4 < ratio_B.max() <= 1.5

    def test_saturation_keeps_greys_and_luma(self) -> None:
        images_BCHW = random_images(50, 3, 4, 4) * 0.2 + 0.4
        grey_BCHW = images_BCHW[:, :1].expand(-1, 3, -1, -1).clone()
        luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        torch.testing.assert_close(augment(grey_BCHW, saturation=0.9), grey_BCHW)
        after_BCHW = augment(images_BCHW, saturation=0.9)
        torch.testing.assert_close((after_BCHW * luma).sum(1), (images_BCHW * luma).sum(1))
        assert (after_BCHW - images_BCHW).abs().max() > 0.02

    def test_grey_loses_colour_as_often_as_asked(self) -> None:
        after_BCHW = augment(random_images(400, 3, 4, 4), grey=0.3)
        is_grey_B = (after_BCHW.amax(1) - after_BCHW.amin(1)).amax((1, 2)) < 1e-6
        assert 0.22 < is_grey_B.float().mean() < 0.38

    def test_noise_has_its_deviation(self) -> None:
        noise_BCHW = augment(torch.full((64, 1, 16, 16), 0.5), noise=0.05) - 0.5
        assert noise_BCHW.std() == pytest.approx(0.05, rel=0.05)
        assert abs(noise_BCHW.mean()) < 0.002


def test_erased_rectangles_are_of_the_stated_size_and_as_frequent_as_asked() -> None:
    images_BCHW = torch.full((500, 1, 64, 64), 0.123)
    changed_BHW = (augment(images_BCHW, erase=0.4) != images_BCHW)[:, 0]
    share_B = changed_BHW.float().mean((1, 2))
    assert 0.33 < (share_B > 0).float().mean() < 0.47
    erased_BHW = changed_BHW[share_B > 0]
    area_B = erased_BHW.any(1).sum(1) * erased_BHW.any(2).sum(1)
    torch.testing.assert_close(area_B, erased_BHW.sum((1, 2)))  # full rectangles
    assert 0.015 < share_B[share_B > 0].min() < 0.04
    assert 0.17 < share_B.max() < 0.22


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_generator_on_the_cpu_gives_the_same_changes_on_the_gpu() -> None:
    images_BCHW = random_images(8, 3, 32, 32)
    on_gpu_BCHW = augment(images_BCHW.cuda(), **EVERYTHING)
    torch.testing.assert_close(on_gpu_BCHW.cpu(), augment(images_BCHW, **EVERYTHING), atol=1e-4, rtol=0)
