"""Drawings of characters in the typefaces that matplotlib ships."""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from theria.data.cache import missing_extra
from theria.data.draws import Draws

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

SIZE = 28
_SUPERSAMPLING = 3
_BOX = 20.0  # the longer side of an untransformed drawing, of 28 pixels
_FRAME = 26.0  # what a transformed drawing may fill: one pixel stays free on each side
_POINTS = 96  # a capital is then about 70 pixels high: a little finer than the fine grid

_STYLES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
}
FACES = tuple(family + style for family, styles in _STYLES.items() for style in styles)
CANONICAL = "DejaVuSans"  # the face with the most characters: it decides which there are and which look alike

_BLOCKS = {
    "CURRENCY": (range(0x20A0, 0x20D0),),
    "ARROWS": (range(0x2190, 0x2200), range(0x27F0, 0x2800), range(0x2900, 0x2980), range(0x2B00, 0x2C00)),
    "MATHEMATICS": (range(0x2200, 0x2300), range(0x27C0, 0x27F0), range(0x2980, 0x2B00)),
    "TECHNICAL": (range(0x2300, 0x2400),),
    "SHAPES": (range(0x25A0, 0x2600),),
    "PICTOGRAMS": (range(0x2600, 0x27C0),),
}
_ALIASES = {"ARABIC-INDIC": "ARABIC", "EXTENDED": "ARABIC", "OLD": "OLD ITALIC", "TURNED": "LATIN", "ROMAN": "LATIN"}


def script_of(character: str) -> str | None:
    """The script of a letter or digit, the block of a symbol, or None for a character that is no class.

    The script is the first word of the Unicode name. Decomposable characters (letters with a diacritic, ligatures,
    circled, bold and other styled copies), punctuation, modifiers and symbols outside the blocks above are no classes.
    """
    if unicodedata.decomposition(character):
        return None
    category = unicodedata.category(character)
    if category in ("Lu", "Ll", "Lo", "Nd"):
        word = unicodedata.name(character).split()[0]
        return _ALIASES.get(word, word)
    if category in ("So", "Sm", "Sc"):
        return next((name for name, blocks in _BLOCKS.items() if any(ord(character) in b for b in blocks)), None)
    return None


class Typefaces:
    """The faces, opened; needs matplotlib and pillow (which matplotlib brings along)."""

    def __init__(self) -> None:
        try:
            import matplotlib
            from matplotlib.ft2font import FT2Font
            from PIL import ImageFont
        except ImportError as error:
            raise missing_extra("matplotlib", "The data set 'glyphs'", error) from error
        folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
        paths = {face: str(folder / f"{face}.ttf") for face in FACES}
        # The basic layout is in every build of pillow; the other one shapes text by a library that may be absent.
        layout = ImageFont.Layout.BASIC
        self._fonts = {face: ImageFont.truetype(path, _POINTS, layout_engine=layout) for face, path in paths.items()}
        self._covered = {face: frozenset(FT2Font(path).get_charmap()) for face, path in paths.items()}

    def characters(self) -> dict[str, str]:
        """The script of every character that is a class, in the order of their code points."""
        scripts = {chr(code): script_of(chr(code)) for code in sorted(self._covered[CANONICAL])}
        return {c: s for c, s in scripts.items() if s is not None and _drawn(c, self._fonts[CANONICAL]) is not None}

    def canonical(self, character: str) -> np.ndarray:
        """(28, 28) uint8: the upright drawing, its longer side 20 pixels, centred."""
        drawing = _drawn(character, self._fonts[CANONICAL])
        assert drawing is not None, "characters() lists drawable characters only"
        return _transformed(drawing, 0.0, 1.0, 0.0, (0.0, 0.0))

    def samples(self, character: str, samples: int, seed: int) -> np.ndarray:
        """(samples, 28, 28) uint8: the character's faces in turn, each under a random affine map that does not crop it.

        Rotation within 12 degrees, scale 0.8 to 1.1, shear within 0.15, shift within 2 pixels.
        """
        import numpy as np

        fonts = [self._fonts[face] for face in FACES if ord(character) in self._covered[face]]
        drawings = [drawing for font in fonts if (drawing := _drawn(character, font)) is not None]
        u = Draws(seed, ord(character)).uniform(samples, 5, low=-1.0, high=1.0).tolist()
        rows = [
            _transformed(drawings[i % len(drawings)], math.radians(12.0 * a), 0.95 + 0.15 * b, 0.15 * c, (2 * d, 2 * e))
            for i, (a, b, c, d, e) in enumerate(u)
        ]
        return np.stack(rows)


def _drawn(character: str, font: FreeTypeFont) -> Image | None:
    """The character, white on black, cropped to its ink; None if it has no ink."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = (round(edge) for edge in font.getbbox(character))
    margin = 4  # slanted faces overhang the box that they report
    canvas = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin))
    ImageDraw.Draw(canvas).text((margin - left, margin - top), character, fill=255, font=font)
    box = canvas.getbbox()
    return canvas.crop(box) if box else None


def _transformed(drawing: Image, angle: float, scale: float, shear: float, shift: tuple[float, float]) -> np.ndarray:
    """(28, 28) uint8: the drawing under rotation . shear . scale about its centre, then moved by `shift` pixels.

    The scale is reduced where the result would exceed the frame, the shift where it would leave it.
    """
    import numpy as np
    from PIL import Image

    width, height = drawing.size
    cos, sin = math.cos(angle), math.sin(angle)
    k = scale * _BOX / max(width, height)  # from pixels of the drawing to pixels of the result
    # [a b; c d] = k [cos -sin; sin cos] [1 shear; 0 1]
    a, b, c, d = k * cos, k * (shear * cos - sin), k * sin, k * (shear * sin + cos)
    extent = (abs(a) * width + abs(b) * height, abs(c) * width + abs(d) * height)
    fit = min(1.0, _FRAME / max(extent))
    room = [(_FRAME - e * fit) / 2 for e in extent]
    move = [max(-most, min(most, s)) for most, s in zip(room, shift, strict=True)]

    # PIL asks where each pixel comes from: drawing = inverse (result - centre) + (width, height) / 2, on the fine grid.
    n = SIZE * _SUPERSAMPLING
    x, y = (n / 2 + _SUPERSAMPLING * m for m in move)
    det = (a * d - b * c) * fit * _SUPERSAMPLING
    p, q, r, s = d / det, -b / det, -c / det, a / det
    inverse = (p, q, width / 2 - p * x - q * y, r, s, height / 2 - r * x - s * y)
    big = drawing.transform((n, n), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    return np.array(big.reduce(_SUPERSAMPLING))
