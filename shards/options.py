"""What a user decides about shards; everything here changes their bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from linerate.shards.errors import UserError

Check = Literal["header", "decode", "dali"]
Icc = Literal["drop", "srgb"]
Dedup = Literal["key", "bytes"]


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """Which images are taken, and what is done to them. What nothing here asks for keeps its bytes."""

    check: Check = "header"
    """How an image is judged: markers, dimensions and end of its header; also a strict decode at 1/8 scale;
    also DALI's CPU decoder, the last word on what training can read."""
    max_pixels: int = 100_000_000
    """Images of more pixels are rejected: they would eat the memory of every decoder."""
    max_image_bytes: int = 100_000_000
    """Images of more bytes are rejected; fetching of one ends there, whatever its server says."""
    min_side: int = 1
    """Images whose shorter side has fewer pixels are rejected."""
    resize: int | None = None
    """Shrink images to this many pixels on the shorter side, antialiased; smaller ones stay as they are."""
    quality: int = 90
    """JPEG quality of images that are written anew, 1 to 100."""
    baseline: bool = False
    """Write anew as baseline JPEG what a GPU's hardware decoder refuses: progressive, CMYK, arithmetic and
    lossless JPEGs, PNG, WebP, GIF, BMP, TIFF, PNM and AVIF (first frame, on white); and what EXIF says is to
    be turned, upright."""
    icc: Icc = "drop"
    """What a colour profile means for an image that is written anew: nothing, as for every decoder that
    trains, or its colours are converted to sRGB."""
    strip_exif: bool = False
    """Take EXIF, XMP, IPTC, comments, thumbnails and what follows the image out of JPEGs that keep their
    pixels' bytes; only the orientation stays. What is written anew never has any of it."""

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_image_bytes", "min_side"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, at least 1 is needed")
        if self.resize is not None and self.resize < 8:
            raise UserError(
                f"--resize is {self.resize}, at least 8 pixels are needed; leave it out to keep sizes"
            )
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}; JPEG knows 1 to 100, 90 is usual")

    @property
    def policy(self) -> ImagePolicy:
        """These fields alone, where a subclass has more."""
        return ImagePolicy(**{field.name: getattr(self, field.name) for field in fields(ImagePolicy)})

    @property
    def rewrites(self) -> bool:
        """Are some images written anew?"""
        return self.resize is not None or self.baseline

    @property
    def may_crash(self) -> bool:
        """Does a decoder, which may die of a broken image, look at more than headers?"""
        return self.check != "header" or self.rewrites

    def expected_bytes(self, *, samples: int, total_bytes: int) -> int:
        """About what so many images take in the shards, without tar headers."""
        if self.resize is None:
            return total_bytes
        # 618 photos took 0.41 bytes per resize**2 at quality 90 and a side of 256.
        return min(total_bytes, int(samples * 0.42 * self.resize**2))


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """How large a shard is."""

    shard_bytes: int = 1_000_000_000
    """About this many bytes in a shard, or less."""
    shard_samples: int = 10_000
    """At most this many samples in a shard."""
    min_shards: int = 16
    """At least this many shards where there are 8 samples for each, so that lanes have work."""

    def __post_init__(self) -> None:
        for name in ("shard_bytes", "shard_samples", "min_shards"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, at least 1 is needed")

    def num_shards(self, *, samples: int, total_bytes: int) -> int:
        """Shards of equal sample counts that hold what there is within these limits."""
        wanted = max(-(-total_bytes // self.shard_bytes), -(-samples // self.shard_samples))
        return min(samples, max(wanted, min(self.min_shards, samples // 8), 1))


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which of the source's rows are packed. What is left out is counted by filter, not listed."""

    where: str | None = None
    """Keep rows for which this SQL condition holds: on a manifest's columns, else on key, size, label,
    label_name, container and extra (a tar's .json)."""
    hashtags: str | None = None
    """Keep rows that carry one of the tags in this file, one a line; `#`, case and blanks do not count."""
    dedup: Dedup | None = None
    """Keep one row of each key; or also one image of each content, for which every image is read once more
    before packing (the first by key stays, the others are listed as rejects)."""
    sample: float | None = None
    """Keep this share of the rows, drawn by a keyed hash: the same rows each time, and a larger share of the
    same seed holds all of a smaller one."""
    limit: int | None = None
    """Keep at most this many rows: the first in shuffled order. It counts before --dedup bytes, and before
    --append leaves out what is there."""

    def __post_init__(self) -> None:
        if self.where is not None and not self.where.strip():
            raise UserError('--where is empty; give an SQL condition, such as "size > 20000"')
        if self.sample is not None and not 0 < self.sample <= 1:
            raise UserError(f"--sample is {self.sample}; give a share above 0 and up to 1, such as 0.1")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is {self.limit}, at least 1 is needed")

    @property
    def selection(self) -> Selection:
        """These fields alone, where a subclass has more."""
        return Selection(**{field.name: getattr(self, field.name) for field in fields(Selection)})

    @property
    def filters(self) -> bool:
        """Are rows left out by what they say?"""
        return any(value is not None for value in (self.where, self.hashtags, self.sample))


@dataclass(frozen=True, kw_only=True)
class ManifestColumns:
    """What the columns of a manifest (Parquet, CSV, TSV, JSON lines) mean; the others are metadata.

    Of tars only the label: a field of the .json beside each image.
    """

    path_column: str | None = None
    """Of a manifest: its column of paths or URLs; by default the one named path, file, file_name, filename,
    image, image_path, url or uri."""
    key_column: str | None = None
    """Its column of unique names; by default the paths are."""
    label_column: str | None = None
    """Its column of class names or numbers; by default label, class, cls or target. Of tars: the field of the
    images' .json that holds them; an image without one has no class, whatever its folder or .cls says."""
    size_column: str | None = None
    """Its column of image bytes; by default size, bytes or file_size."""
    tag_column: str | None = None
    """Its column of hashtags for --hashtags, a list or text; by default hashtags or tags."""

    @property
    def manifest_columns(self) -> ManifestColumns:
        """These fields alone, where a subclass has more."""
        return ManifestColumns(**{field.name: getattr(self, field.name) for field in fields(ManifestColumns)})


@dataclass(frozen=True, kw_only=True)
class PackOptions(ImagePolicy, ManifestColumns, Selection):
    """Everything that decides the bytes of the shards, apart from the source."""

    name: str = "shard"
    """Shards are named NAME-000042.tar."""
    seed: int = 0
    """Of the global shuffle."""
    shard_bytes: int = 1_000_000_000
    """About this many bytes in a shard, or less."""
    shard_samples: int = 10_000
    """At most this many samples in a shard."""
    min_shards: int = 16
    """At least this many shards where there are 8 samples for each, so that parallel readers have work."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", self.name):
            raise UserError(f"--name {self.name!r} is not 1 to 64 letters, digits, - and _; such as `train`")
        ImagePolicy.__post_init__(self)
        Selection.__post_init__(self)
        _ = self.sizing

    @property
    def sizing(self) -> Sizing:
        return Sizing(
            shard_bytes=self.shard_bytes, shard_samples=self.shard_samples, min_shards=self.min_shards
        )
