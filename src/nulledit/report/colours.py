"""One colour and marker per method name, the same in every figure."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

GREY = "#8c8c8c"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
# Okabe and Ito (2008) without black and yellow, too weak on white, and darker or lighter shades
# of them for methods of the same kin: told apart by eyes with any of the common colour deficiencies
# together with their markers.
BLUE, SKY, GREEN, ORANGE = "#0072b2", "#56b4e9", "#009e73", "#e69f00"
VERMILLION, PURPLE, BROWN, INK = "#d55e00", "#cc79a7", "#7a4a12", "#1b2a41"
OLIVE, PLUM, TEAL, ROSE = "#999933", "#882255", "#44aa99", "#ee6677"
PALETTE = (
    *(BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY),
    *(BROWN, INK, OLIVE, PLUM, TEAL, ROSE),
)


@dataclass(frozen=True)
class Style:
    """How one series is drawn."""

    colour: str
    """Hex."""
    marker: str
    """Matplotlib's name of it."""


FIXED = {
    name: Style(colour, marker)
    for colour, marker, *names in (
        ("#0b5fa5", "o", "after", "edited"),
        ("#b4b4b4", "s", "before"),
        (BLUE, "o", "alphaedit"),
        (ORANGE, "s", "memit"),
        (VERMILLION, "D", "memithistory", "memitseq"),
        (GREEN, "^", "softnullspace", "soft"),
        (BROWN, "v", "rome"),
        (OLIVE, "P", "emmet"),
        (SKY, "X", "betaedit"),
        (TEAL, "<", "encore"),
        (INK, ">", "evoedit"),
        (ROSE, "p", "rlsedit"),
        (PURPLE, "D", "rect"),
        (PLUM, "s", "prune"),
        ("#5f4bb6", "v", "ft", "finetune"),
        ("#a6611a", "^", "lora"),
        ("#4d6b2f", "P", "incontext"),
    )
    for name in names
}
"""By plain name."""
_UNEDITED = {"unedited", "uneditedmodel", "base", "basemodel", "noedit", "before"}


def plain_name(name: str) -> str:
    """`MEMIT (history)` and `memit-history` are one."""
    return "".join(c for c in name.lower() if c.isalnum())


def is_unedited(name: str) -> bool:
    """Whether a series or row is the model before any edit: grey, and out of every contest."""
    return plain_name(name) in _UNEDITED


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each name: fixed where it is known, else by a hash of the name.

    Two unknown names that fall on one colour are told apart within `names`: the later in the
    alphabet takes the next free colour.
    """
    names = list(dict.fromkeys(names))
    found = {name: style for name in names if (style := _known(name))}
    taken = {style.colour for style in found.values()}
    for name in sorted(set(names) - set(found)):
        start = zlib.crc32(plain_name(name).encode())
        order = [PALETTE[(start + i) % len(PALETTE)] for i in range(len(PALETTE))]
        colour = next((c for c in order if c not in taken), order[0])
        taken.add(colour)
        found[name] = Style(colour, MARKERS[start // len(PALETTE) % len(MARKERS)])
    return found


def _known(name: str) -> Style | None:
    if plain_name(name) in FIXED:
        return FIXED[plain_name(name)]
    return Style(GREY, "s") if is_unedited(name) else None
