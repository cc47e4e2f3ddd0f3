"""Figures as bytes: SVG where it is small, else PNG. The same figure gives the same bytes."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_SVG = 300_000  # bytes; beyond, a cloud of points is smaller as pixels


def as_svg(figure: Figure) -> bytes:
    """SVG with its text as text: small, searchable, and in any script the reader's fonts have."""
    return _saved(figure, "svg", metadata={"Date": None, "Creator": None})


def as_png(figure: Figure, dpi: int = 200) -> bytes:
    """PNG."""
    return _saved(figure, "png", dpi=dpi, metadata={"Software": None})


def as_image(figure: Figure) -> tuple[str, bytes]:
    """Media type and content: SVG, or PNG if that is larger than 300 kB."""
    vector = as_svg(figure)
    if len(vector) <= LARGEST_SVG:
        return "image/svg+xml", vector
    return "image/png", as_png(figure)


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nulledit"}):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader may have it
            figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()
