"""Whether the Hugging Face Hub can be reached."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.utils import get_session

HUB_SECONDS = 10.0  # for a connection; an answer may take longer
UNREACHED = ("ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError")


def hub_answers() -> bool:
    """Whether the Hub, or the mirror in its place, can be reached: asked once and not again.

    The Hub's client asks for each file six times, which takes half a minute where there is no
    network. It asks through the user's proxies, as this does; a slow answer is one.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # its client has had three libraries of one family underneath
        return type(error).__name__ not in UNREACHED
    return True  # whatever it says: of the file that is asked for, its client says what is wrong
