"""The other forms in which facts are asked: without or with a system prompt, and as plain text."""

from __future__ import annotations

from dataclasses import replace

from nulledit.config import ChatSettings
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import RowEncoder

SYSTEM = "You are a helpful assistant."
"""Asked with where an edit was made without a system prompt and the template has none."""
PLAIN = "as plain text"


def form_name(encoder: RowEncoder) -> str:
    """How the encoder puts a prompt, in a few words."""
    if encoder.chat is None:
        return PLAIN
    system = encoder.chat.settings.system
    if system == "none":
        return "in chat without a system prompt"
    if system != "default":
        return f"in chat with the system prompt {system!r}"
    return (
        "in chat with the template's own system prompt"
        if encoder.chat.default_system
        else ("in chat without a system prompt")
    )


def other_system(encoder: RowEncoder) -> RowEncoder | None:
    """The chat form with a system prompt where the encoder's has none, and the other way round.

    With: the template's own, or else `SYSTEM`. None where the encoder puts plain text, or where the
    template can't do without a system prompt.
    """
    if encoder.chat is None:
        return None
    settings, own = encoder.chat.settings, encoder.chat.default_system
    bare = settings.system == "none" or (settings.system == "default" and own is None)
    if bare:
        return encoder.in_chat(replace(settings, system="default" if own else SYSTEM))
    if not encoder.chat.can_be_bare:
        return None
    return encoder.in_chat(replace(settings, system="none"))


def forms(
    model: EditableModel, *, also: ChatSettings | None = None, plain: bool = True
) -> dict[str, EditableModel]:
    """`model` asked in other forms than its own, by name.

    In chat: the other system prompt, and plain text; where facts are written in both forms, the
    other system prompt, as the template itself is asked anyway. `also`: a chat form, and the same
    with the other system prompt.
    """
    encoder = model.encoder
    found = [other_system(encoder.forms[-1])]
    if encoder.chat and plain:
        found.append(encoder.in_chat(None))
    if also:
        more = encoder.in_chat(also)
        found += [more, other_system(more)]
    named = {form_name(one): model.asked(one) for one in found if one}
    for own in encoder.forms:
        named.pop(form_name(own), None)
    return named
