"""What a server takes on."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """
    What a server takes on; a request beyond that is refused with a message that says so.

    Args:
        max_upload_bytes: Largest request, and largest file that is downloaded for one.
        max_clip_seconds: Longest video or sound, or part of it where `start` and `end` are given.
        max_frames: Most frames that a request may ask for of one video.
        max_queue: How many requests may wait while one is answered.
        max_request_seconds: Longest time for the upload, and then for waiting and answering together.
        max_new_tokens: Longest answer, and the length at which one is cut off where the request does not say.
    """

    max_upload_bytes: int = 64 * 2**20
    max_clip_seconds: float = 600.0
    max_frames: int = 128
    max_queue: int = 16
    max_request_seconds: float = 300.0
    max_new_tokens: int = 1024

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "max_queue" else 1e-3
            if not math.isfinite(value) or value < least:
                raise ValueError(f"{field.name} must be a number above 0 (max_queue: 0 or more), got {value}.")


__all__ = ["Limits"]
