"""The picture of a heatmap: source frame beside the same frame with the map over it, colour bar and what it is.

Two rules keep the picture honest. The scale is fixed by the package (`vmin` to `vmax`), never stretched to one image,
and nothing is painted below `vmin`; so an image without anything in it shows nothing. And it says on every frame what
it is: an influence on the score, not anatomy, by which model, and what it may not be used for. No patient's name, no
identifier and no probability stands on it: the number is in the SR, beside its conditions.

The colour map is *plasma* (N. Smith and S. van der Walt, CC0), even in perceived lightness and safe for the common
colour vision deficiencies; unlike viridis it has no tone near the black of an ultrasound image. The type is the one
built into Pillow, so that the same release draws the same pixels on every machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dicom_node.errors import ReportError, StoreError
from dicom_node.report.wording import DEMONSTRATION_MARK, NOT_ANATOMY, mark_of
from dicom_node.result import ArrayFile, Finding, FrameRef, Heatmap, Result

COLOUR_MAP: Final = "plasma"
ALPHA: Final = 0.5
PANEL: Final = 400
PANEL_MAX: Final = 512
"""Pixels of a panel's longer side, at least and at most: the full resolution is in the source itself."""

# Every fifth colour of the 256; between them linear, at most 2 of 255 off.
_PLASMA = (
    "0d0887 1b068d 260591 2f0596 38049a 41049d 4903a0 5102a3 5901a5 6100a7 6900a8 7100a8 7801a8 8004a8 8707a6 8e0ca4"
    " 9511a1 9c179e a21d9a a82296 ae2892 b42e8d ba3388 bf3984 c43e7f c9447a cd4a76 d24f71 d6556d da5b69 de6164 e26660"
    " e66c5c e97257 ed7953 f07f4f f3854b f58c46 f79342 f99a3e fba139 fca835 fdaf31 feb72d febe2a fdc627 fcce25 fbd724"
    " f8df25 f6e826 f3f027 f0f921"
)
INK, DIM, PAPER, WARNING = (238, 238, 238), (168, 172, 178), (18, 19, 22), (255, 196, 64)
_MARGIN, _GAP, _BAR, _TICKS = 16, 10, 16, 58
_TITLE, _BODY = 19, 14
_UNPAINTED: Final = 256
"""In place of the index of a colour."""


@dataclass(frozen=True, slots=True)
class Caption:
    """What is printed around the picture; nothing of it names the patient."""

    title: str
    model: str
    target: str
    mark: str
    across: str
    """Printed over the images themselves; "" unless the package is a demonstration."""


def caption_of(result: Result, finding: Finding) -> Caption:
    """What is printed around the picture of one finding."""
    provenance = result.provenance
    target = finding.heatmap.target.meaning.removeprefix("Probability of ") if finding.heatmap else ""
    mark = mark_of(provenance.intended_use)
    side = f", {finding.laterality.meaning.lower()}" if finding.laterality else ""
    return Caption(
        title=f"{result.title} - {finding.tracking_identifier}{side}",
        model=f"{provenance.algorithm_name}, version {provenance.package_version}",
        target=target,
        mark=mark,
        across=mark if mark == DEMONSTRATION_MARK else "",
    )


def load_array(file: ArrayFile, spool: Path) -> NDArray[Any]:
    """A spilled array, checked against its digest. Raises StoreError."""
    path = spool / file.name
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != file.digest:
            raise StoreError("a spooled array is not the one the result names (digest)")
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise StoreError(f"a spooled array cannot be read ({type(e).__name__})") from None
    if array.shape != file.shape or str(array.dtype) != file.dtype:
        raise StoreError("a spooled array is not the one the result names (shape)")
    return array


def saliency(heatmap: Heatmap, spool: Path) -> NDArray[np.float64]:
    """How much of the map lies above `vmin`, for each frame: what a capture's frames are chosen by."""
    array = load_array(heatmap.map, spool).astype(np.float64)
    return np.clip(array - heatmap.vmin, 0, None).mean(axis=(1, 2))


def colours(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Plasma: 0..1 to RGB."""
    return _palette()[_index(values)]


def _index(values: NDArray[Any]) -> NDArray[np.intp]:
    """Of the colour of 0..1."""
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.intp)


def blend(frame: NDArray[np.uint8], values: NDArray[np.float32], vmin: float, vmax: float) -> NDArray[np.uint8]:
    """The map over a frame, grey or RGB, as RGB. A pixel below `vmin` is the frame's own."""
    index = _index((values - vmin) / (vmax - vmin))
    index[values < vmin] = _UNPAINTED
    index *= 256
    if frame.ndim == 2:
        at = index + frame
        return np.stack([mixed.take(at) for mixed in _mixed()]).transpose(1, 2, 0)
    return np.stack([mixed.take(index + frame[..., c]) for c, mixed in enumerate(_mixed())]).transpose(1, 2, 0)


def render_frames(
    heatmap: Heatmap, spool: Path, caption: Caption, indices: Sequence[int] | None = None
) -> NDArray[np.uint8]:
    """The picture of the chosen frames (0-based; None = all) as RGB (n, height, width, 3)."""
    chosen = range(len(heatmap.frame_refs)) if indices is None else indices
    return np.stack(list(each_frame(heatmap, spool, caption, chosen)))


def each_frame(heatmap: Heatmap, spool: Path, caption: Caption, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """The pictures of these frames one after the other, each drawn when it is asked for."""
    frames, maps = load_array(heatmap.frames, spool), load_array(heatmap.map, spool)
    if not math.isfinite(heatmap.vmin) or not heatmap.vmin < heatmap.vmax < math.inf:
        raise ReportError("a heatmap without a fixed scale: vmin < vmax is needed")
    if maps.shape != frames.shape[:3] or len(heatmap.frame_refs) != len(frames) or not np.isfinite(maps).all():
        raise ReportError("a heatmap whose frames, finite map and frame references do not belong together")
    layout = Layout.of(frames.shape[1], frames.shape[2], caption)
    background = _background(layout, heatmap, caption)
    empty = np.asarray(background).transpose(2, 0, 1).copy().transpose(1, 2, 0)  # in memory plane by plane, as RLE is
    mark = mark_of_area(layout.images, caption.across) if caption.across else None
    for i in indices:
        picture = empty.copy(order="K")
        _panels(picture, layout, frames[i], maps[i], heatmap)
        if mark is not None:
            mark.over(_area(picture, (layout.left, layout.top), layout.images))
        _frame_number(picture, background, layout, heatmap.frame_refs, i)
        yield picture


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything stands. `panel` is (width, height) of one panel; `stacked` puts the second under the first."""

    width: int
    height: int
    left: int
    top: int
    panel: tuple[int, int]
    stacked: bool

    @classmethod
    def of(cls, rows: int, columns: int, caption: Caption) -> Layout:
        longer = max(rows, columns)
        scale = PANEL / longer if longer < PANEL else min(1.0, PANEL_MAX / longer)
        panel = max(1, round(columns * scale)), max(1, round(rows * scale))
        stacked = columns > 1.9 * rows
        images = panel[0] if stacked else 2 * panel[0] + _GAP
        footer = _footer(caption, 0.0)
        text = max(font(_TITLE).getlength(caption.title) + 190, *map(font(_BODY).getlength, footer))
        inner = max(images + _GAP + _BAR + _TICKS, math.ceil(text))
        top = _MARGIN + _TITLE + 8 + _BODY + 10
        rows_of_images = 2 * panel[1] + _GAP if stacked else panel[1]
        height = top + rows_of_images + 12 + (_BODY + 6) * len(footer) + _MARGIN
        left = _MARGIN + (inner - images - _GAP - _BAR - _TICKS) // 2
        return cls(_even(inner + 2 * _MARGIN), _even(height), left, top, panel, stacked)

    @property
    def second(self) -> tuple[int, int]:
        """The upper left corner of the panel with the map."""
        w, h = self.panel
        return (self.left, self.top + h + _GAP) if self.stacked else (self.left + w + _GAP, self.top)

    @property
    def images(self) -> tuple[int, int]:
        """Width and height of both panels together."""
        w, h = self.panel
        return (w, 2 * h + _GAP) if self.stacked else (2 * w + _GAP, h)


def _even(value: int) -> int:
    return value + value % 2


@lru_cache(maxsize=8)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own type."""
    return ImageFont.load_default(size=size)  # type: ignore[return-value]


def _footer(caption: Caption, vmin: float) -> list[str]:
    scale = f"Fixed scale of the model, colour map {COLOUR_MAP}; nothing is painted below {vmin:.3g}."
    lines = [f"Model: {caption.model}", f"{NOT_ANATOMY} {scale}"]
    return [*lines, caption.mark] if caption.mark else lines


@lru_cache(maxsize=1)
def _palette() -> NDArray[np.uint8]:
    anchors = np.array([list(bytes.fromhex(c)) for c in _PLASMA.split()], np.float64)
    at, every = np.linspace(0, 255, len(anchors)), np.arange(256)
    return np.stack([np.rint(np.interp(every, at, anchors[:, c])) for c in range(3)], axis=1).astype(np.uint8)


@lru_cache(maxsize=1)
def _mixed() -> NDArray[np.uint8]:
    """Each colour half transparent over each level of a channel: (3, 256 * colour + level); `_UNPAINTED` leaves it."""
    levels, over = np.arange(256)[None, :], _palette().T[:, :, None]
    mixed = np.rint(levels * (1 - ALPHA) + over * ALPHA).astype(np.uint8)
    own = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    return np.concatenate([mixed, own], axis=1).reshape(3, -1)


def _background(layout: Layout, heatmap: Heatmap, caption: Caption) -> Image.Image:
    """Everything that is the same on all frames."""
    picture = Image.new("RGB", (layout.width, layout.height), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), caption.title, INK, font(_TITLE), anchor="lt")
    above = layout.top - 8
    method = heatmap.method[:1].upper() + heatmap.method[1:]
    towards = f"{method}, towards: {caption.target}" if caption.target else method
    if layout.stacked:
        draw.text((layout.left, above), f"Above: source frame. Below: {towards}", DIM, font(_BODY), anchor="ls")
    else:
        draw.text((layout.left, above), "Source frame", DIM, font(_BODY), anchor="ls")
        _fitted(draw, (layout.second[0], above), towards, layout.width - _MARGIN - layout.second[0])
    _colour_bar(picture, draw, layout, heatmap)
    y = layout.top + layout.images[1] + 12
    for line in _footer(caption, heatmap.vmin):
        draw.text((_MARGIN, y), line, WARNING if line == caption.mark else DIM, font(_BODY), anchor="lt")
        y += _BODY + 6
    return picture


def _fitted(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int) -> None:
    """A line of text that ends with an ellipsis where there is no more room."""
    while text and font(_BODY).getlength(text) > width:
        text = text[:-4].rstrip() + "..."
    draw.text(at, text, DIM, font(_BODY), anchor="ls")


def _colour_bar(picture: Image.Image, draw: ImageDraw.ImageDraw, layout: Layout, heatmap: Heatmap) -> None:
    """The fixed scale with its figures. The colours are those of the legend; on the image they are half transparent."""
    x, y = layout.second[0] + layout.panel[0] + _GAP, layout.top
    height = layout.images[1]
    ramp = colours(np.linspace(1, 0, height))[:, None, :].repeat(_BAR, axis=1)
    picture.paste(Image.fromarray(ramp), (x, y))
    draw.rectangle((x - 1, y - 1, x + _BAR, y + height), outline=DIM)
    for part, anchor in ((0.0, "ls"), (0.5, "lm"), (1.0, "lt")):
        value = heatmap.vmin + part * (heatmap.vmax - heatmap.vmin)
        draw.text((x + _BAR + 6, y + round((1 - part) * height)), f"{value:.3g}", INK, font(_BODY), anchor=anchor)


def _area(picture: NDArray[np.uint8], at: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A part of the picture, to be written to: upper left corner (x, y), size (width, height)."""
    (x, y), (width, height) = at, size
    return picture[y : y + height, x : x + width]


def _panels(
    picture: NDArray[np.uint8],
    layout: Layout,
    frame: NDArray[np.uint8],
    values: NDArray[np.float32],
    heatmap: Heatmap,
) -> None:
    source = Image.fromarray(np.ascontiguousarray(frame)).resize(layout.panel, Image.Resampling.BICUBIC)
    smooth = Image.fromarray(np.ascontiguousarray(values, np.float32)).resize(layout.panel, Image.Resampling.BILINEAR)
    left = np.asarray(source)
    _area(picture, (layout.left, layout.top), layout.panel)[:] = left if left.ndim == 3 else left[..., None]
    mixed = blend(left, np.asarray(smooth), heatmap.vmin, heatmap.vmax)
    _area(picture, layout.second, layout.panel)[:] = mixed


@dataclass(frozen=True, slots=True)
class Mark:
    """What `mark_across` changes of an area: a twentieth of its pixels, so each frame need not be gone over twice."""

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    layers: tuple[tuple[int, NDArray[np.uint16]], ...]
    """Grey level, and how much of it at each pixel (0..255)."""

    def over(self, area: NDArray[np.uint8]) -> None:
        """Draw it; with the rounding of Pillow's `paste`."""
        found: NDArray[Any] = area[self.rows, self.columns].astype(np.uint16)
        for grey, strength in self.layers:
            mixed = found * (255 - strength) + (grey * strength + 128)
            found = (mixed + (mixed >> 8)) >> 8
        area[self.rows, self.columns] = found


@lru_cache(maxsize=16)
def mark_of_area(area: tuple[int, int], text: str, *, faint: bool = False) -> Mark:
    """`faint`: half as strong. Kept from picture to picture: to size and turn it takes as long as several frames."""
    masks = [(grey, np.asarray(mask) // (2 if faint else 1)) for grey, mask in mark_across(area, text)]
    rows, columns = np.nonzero(np.any([mask for _, mask in masks], axis=0))
    layers = tuple((grey, mask[rows, columns, None].astype(np.uint16)) for grey, mask in masks)
    return Mark(rows, columns, layers)


def mark_across(area: tuple[int, int], text: str) -> tuple[tuple[int, Image.Image], ...]:
    """The mark from corner to corner of an area: grey level and mask of its dark outline, then of its letters.

    Half transparent, so that the image stays readable; outlined, so that the mark does on a bright image too.
    """
    width, height = area
    angle = math.atan2(height, width)
    cos, sin = math.cos(angle), math.sin(angle)
    size = 10
    while size < 60:  # the turned line has to lie inside the area
        w, h = font(size + 1).getlength(text), (size + 1) * 1.3
        if w * cos + h * sin > width or w * sin + h * cos > height:
            break
        size += 1
    masks = []
    for grey, strength, stroke in ((0, 120, 2), (255, 165, 0)):
        line = Image.new("L", (math.ceil(font(size).getlength(text)) + 8, round(size * 1.6)), 0)
        middle = line.width // 2, line.height // 2
        ImageDraw.Draw(line).text(middle, text, strength, font(size), anchor="mm", stroke_width=stroke)
        turned = line.rotate(math.degrees(angle), Image.Resampling.BICUBIC, expand=True)
        mask = Image.new("L", (width, height), 0)
        mask.paste(turned, ((width - turned.width) // 2, (height - turned.height) // 2))
        masks.append((grey, mask))
    return tuple(masks)


def _frame_number(
    picture: NDArray[np.uint8], background: Image.Image, layout: Layout, references: Sequence[FrameRef], i: int
) -> None:
    """The number in the source (from 1), so that a reader finds the frame again."""
    reference = references[i]
    if reference.number_of_frames > 1:
        text = f"frame {reference.frame_number} of {reference.number_of_frames}"
    else:
        text = f"image {i + 1} of {len(references)}"
    above = background.crop((0, 0, layout.width, layout.top))
    at = (layout.width - _MARGIN, _MARGIN)
    ImageDraw.Draw(above).text(at, text, INK, font(_TITLE - 2), anchor="rt")
    picture[: layout.top] = np.asarray(above)
