"""DyToK: frames keep as many tokens as the LLM, in a first look at all of them, pays attention to (Li et al., 2025).

VisionZip in every frame, with a budget of its own: what the prompt's last token pays to the video is averaged over
heads, layers and the frame's tokens. The look costs a prefill of the whole prompt up to the last layer that is looked
at; it pays where the KV cache and what is decoded count for more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vidcompress.first_look import FirstLook
from vidcompress.method import setting
from vidcompress.methods.visionzip import VisionZip


@dataclass(kw_only=True)
class DyToK(FirstLook, VisionZip):
    needs = VisionZip.needs | {"first_look"}

    dominant_share: float = setting(
        6 / 7, "share of a frame's budget that is dominant tokens, the rest is contextual", low=0, high=1
    )
    scope: Literal["frame"] = setting("frame", "tokens compete within their frame")
