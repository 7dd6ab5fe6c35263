"""Where a recipe's images come from: its [[data]] sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from training.sections import Section


def _count_or_share(value: Any) -> Any:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    is_share = isinstance(value, float) and 0 <= value < 1
    if not (is_count or is_share):
        raise ValueError(f"takes a count of 0 or more, or a share with a decimal point in [0, 1); got {value!r}")
    return value


class DataPart(Section):
    """What every data source has."""

    name: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9_-]*)?$")] = ""
    """Comes before the names of its images, as NAME/path: tells parts apart, in [[evaluation.search]] for one."""
    role: Literal["split", "train", "calibration", "test"] = "split"
    """The side that all images of this part go to; "split" leaves it to [split]."""
    exclude: tuple[str, ...] = ()
    """Identities left out, as shell patterns such as "Latin/*"; each must match one."""
    max_bad_images: Annotated[int | float, BeforeValidator(_count_or_share)] = 0
    """Images that may be unreadable, listed and skipped: a count, or with a decimal point a share of the part."""


class FolderData(DataPart):
    """Images in folders; the identity is the path of an image's folder, relative to `path`."""

    source: Literal["folder"]
    path: str
    """The folder, relative to the data root, or absolute."""


class ManifestData(DataPart):
    """A CSV or Parquet table with columns path, identity and, optionally, split (train, calibration or test)."""

    source: Literal["manifest"]
    path: str
    """The table, relative to the data root, or absolute."""
    images: str | None = None
    """Folder that the table's paths are relative to, relative to the data root; by default the table's own."""


class ZipData(DataPart):
    """A zip of folders as in `folder`, or of images and a manifest; nothing is unpacked."""

    source: Literal["zip"]
    path: str
    """The zip, relative to the data root, or absolute."""
    prefix: str = ""
    """Only members under this folder are taken; identities and the manifest's paths are relative to it."""
    manifest: str | None = None
    """Member that holds the manifest, relative to `prefix`; without it, identities come from folders."""


class MnistData(DataPart):
    """The four official files of MNIST or Fashion-MNIST; the identity is the class, "0" to "9"."""

    source: Literal["mnist", "fashion_mnist"]
    path: str
    """Folder that holds the IDX files (.gz or unpacked), or a root in torchvision's layout above them."""
    files: Literal["all", "train", "test"] = "all"
    """Which official files: 60,000 training images, 10,000 test images, or both."""


class OmniglotData(DataPart):
    """Omniglot's ALPHABET/characterNN folders, zipped or not; the identity is ALPHABET/characterNN."""

    source: Literal["omniglot"]
    path: str
    """A zip or folder such as images_background.zip, relative to the data root, or absolute."""


class DigitsData(DataPart):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; the identity is "0" to "9". Needs no data root."""

    source: Literal["digits"]


DataConfig = Annotated[
    FolderData | ManifestData | ZipData | MnistData | OmniglotData | DigitsData, Field(discriminator="source")
]
