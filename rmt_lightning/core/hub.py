"""Whether the Hugging Face Hub can be asked."""

from __future__ import annotations

import logging
from functools import cache

from huggingface_hub import constants
from huggingface_hub.utils import get_session

log = logging.getLogger(__name__)
# Its client tells of each retry; that it has failed is told once, by us. When it is imported, it sets a level itself.
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

_SECONDS = 8
# What servers say that are down, and those that stand before them; clients ask them again and again.
_DOWN = (500, 502, 503, 504)


def out_of_reach(setting: str) -> str:
    """Why the Hub cannot be asked for what `setting` names; nothing if it can. Takes some seconds at most, once.

    Its clients try for a minute before they say so, and say nothing until then.
    """
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _asked(setting, constants.ENDPOINT)


@cache
def _asked(setting: str, address: str) -> str:
    log.info("%s: asking the Hugging Face Hub", setting)
    return _silence(address)


@cache
def _silence(address: str) -> str:
    try:
        status = get_session().head(address, timeout=_SECONDS).status_code
    except Exception as error:  # its client raises a different class for each way of being out of reach
        return f"{address} does not answer: {str(error) or type(error).__name__}"
    return f"{address} answers with {status}" if status in _DOWN else ""
