"""Clips in, processor inputs out: decoding with PyAV, uniform sampling, and the prompt around the frames.

transformers decodes a path or a URL with torchcodec only, so the frames are read here and handed over as arrays with
their metadata. numpy, av, torch and transformers are imported when first needed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import numbers
import operator
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from .compat import ensure_torchvision, require

if TYPE_CHECKING:
    import numpy as np
    from transformers import BatchFeature
    from transformers.video_utils import VideoMetadata

_logger = logging.getLogger("vidcompress")

_ACCEPTED = (
    "a path, an http(s) URL, a binary file, bytes, a list of equally large RGB frames, "
    "or a uint8 array or tensor [T, H, W, 3] or [T, 3, H, W]"
)
_TIMEOUT = 60  # seconds without an answer before a URL is given up


@dataclass(frozen=True, eq=False)
class Video:
    """Frames picked from one clip, and where in the clip they lie.

    Attributes:
        frames: uint8 array [T, H, W, 3], RGB.
        fps: frames a second of the whole clip, None when the source has no rate (lists and arrays).
        total_frames: how many frames the whole clip has.
        duration: length of the whole clip in seconds, None when `fps` is.
        indices: for each of the T frames its place in the clip, from 0 to total_frames - 1.
        source: where the clip came from, for messages and reports.

    Raises:
        ValueError: `frames` is not uint8 [T, H, W, 3], or `indices` does not hold T places in the clip.
    """

    frames: np.ndarray = field(repr=False)
    fps: float | None
    total_frames: int
    duration: float | None
    indices: tuple[int, ...]
    source: str

    def __post_init__(self) -> None:
        frames = self.frames
        if str(frames.dtype) != "uint8" or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; accepted: uint8 [T, H, W, 3], none 0")
        if len(self.indices) != len(frames) or not all(0 <= i < self.total_frames for i in self.indices):
            raise ValueError(
                f"indices {list(self.indices)} do not fit {len(frames)} frames of a clip of {self.total_frames}; "
                "accepted: one place in the clip for each frame"
            )

    def metadata(self) -> VideoMetadata:
        """The facts of the clip as the `VideoMetadata` that transformers' processors take."""
        ensure_torchvision()
        from transformers.video_utils import VideoMetadata

        return VideoMetadata(
            total_num_frames=self.total_frames,
            fps=self.fps,
            width=self.frames.shape[2],
            height=self.frames.shape[1],
            duration=self.duration,
            video_backend="vidcompress",
            frames_indices=list(self.indices),
        )

    def to_dict(self) -> dict[str, Any]:
        """The facts without the pixels, ready for JSON; `frames`, `height` and `width` are counts."""
        return {
            "frames": self.frames.shape[0],
            "height": self.frames.shape[1],
            "width": self.frames.shape[2],
            "fps": self.fps,
            "duration": self.duration,
            "total_frames": self.total_frames,
            "indices": list(self.indices),
            "source": self.source,
        }


def load_video(source: Any, *, num_frames: int | None = None, fps: float | None = None, max_frames: int = 32) -> Video:
    """Read a clip and pick frames spread uniformly over it.

    The frames are those that transformers' own default sampling picks (`BaseVideoProcessor.sample_frames` as of 5.23):
    n of N frames are i * N // n for i = 0 .. n - 1, so the first frame always is among them and the last only when all
    are; and `fps` frames a second are n = int(N / rate * fps) frames, at least one.

    A file is decoded from the start, and no further than the last frame picked; only picked frames are held in memory.
    Frames are turned upright as the file's display rotation says, and where a clip changes its size half way, scaled to
    the first one picked. Headers are not trusted for the number of frames: the packets are counted. What is damaged is
    left out: the frames that still decode are the clip, sampling spreads over those, and a warning is logged (logger
    "vidcompress") with the numbers.

    Args:
        source: a path; an http(s) URL, downloaded first; a binary file (read from its beginning when it can be
            rewound, else from where it stands, and left open); bytes; a list or tuple of frames (PIL images, or uint8
            arrays or tensors [H, W, 3], all of one size); a uint8 array or tensor [T, H, W, 3], or [T, 3, H, W], the
            last two axes of a shape that could be both being taken for W and 3; or a `Video`.
            Pixels in any type but uint8 are refused, for their scale cannot be known.
        num_frames: exactly that many frames.
        fps: that many frames for every second of the clip; for sources that have a frame rate.
        max_frames: with neither of the two, at most this many frames, and all frames of a shorter clip.
            A `Video` was sampled before and is then returned as it is.

    Returns:
        The frames and their places in the clip. Sampling a `Video` anew picks among its frames and keeps their places.

    Raises:
        ValueError: the source is damaged, empty, has no video stream or no frame that decodes, is of a wrong rank,
            size or number type; more frames are asked for than there are; a number is not positive and finite;
            `num_frames` and `fps` are given together; or a server answers with an error.
        TypeError: the source or a number is of a type that is not accepted.
        FileNotFoundError: there is no such file.
        ConnectionError: the URL cannot be reached, or the download breaks off.
        ImportError: PyAV is needed and not installed.
    """
    sampling = _Sampling(num_frames, fps, max_frames)
    if isinstance(source, Video):
        return source if num_frames is None and fps is None else _resample(source, sampling)
    if isinstance(source, (list, tuple)):
        return _from_list(source, sampling)
    if (array := _as_array(source, "the array")) is not None:
        return _from_array(array, sampling)
    with _opened(source) as (file, name):
        if file.seek(0, os.SEEK_END) == 0:
            raise ValueError(f"{name} is empty (0 bytes); accepted: {_ACCEPTED}")
        return _from_file(file, name, sampling)


def prepare_inputs(
    processor: Any,
    videos: Video | list[Video] | list[list[Video]],
    prompt: str | list[str],
    *,
    system: str | None = None,
    images: Any = None,
    return_tensors: str | None = "pt",
) -> BatchFeature:
    """Turn clips and prompts into the inputs of a model, through the chat template of its processor.

    The frames go in as they are: sampling is `load_video`'s, and the processor only resizes and normalises. In each
    user turn the videos come first, then the images, then the text. Several prompts are padded on the left, as
    generation needs, whatever side the tokenizer is set to.

    Args:
        processor: the processor of a video model with a chat template (LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, ...).
        videos: for one prompt a `Video` or a list of them; for a list of prompts one entry for each, in that order,
            every entry a `Video` or a (possibly empty) list of them.
        prompt: what to ask, or a list of prompts for a batch.
        system: the system message, the same for all prompts; None leaves it to the chat template.
        images: images in the same arrangement as `videos`.
        return_tensors: type of the tensors, as for any processor.

    Returns:
        What the processor returns: `input_ids` [B, L], `attention_mask` [B, L], `pixel_values_videos`, ...

    Raises:
        ValueError: the processor has no chat template, the entries do not match the prompts, or the placeholders that
            the template and the prompt write are not one for each video and image.
        TypeError: an entry of `videos` is not a `Video`, or the processor is a tokenizer only.
    """
    clips = _rows(videos, prompt, "videos")
    pictures = _rows(images, prompt, "images")
    for clip in (clip for row in clips for clip in row):
        if not isinstance(clip, Video):
            raise TypeError(f"videos holds a {type(clip).__name__} where a Video is expected; see load_video")

    conversations = _conversations([prompt] if isinstance(prompt, str) else prompt, clips, pictures, system)
    return prepare_conversations(processor, conversations, clips, pictures, return_tensors=return_tensors)


def prepare_conversations(
    processor: Any,
    conversations: list[list[dict[str, Any]]],
    clips: list[list[Video]],
    pictures: list[list[Any]],
    *,
    return_tensors: str | None = "pt",
) -> BatchFeature:
    """As `prepare_inputs`, of whole conversations: any turns, in any order of text, videos and images.

    Args:
        conversations: for each row its messages, as chat templates take them; what is shown stands in `content` as
            `{"type": "video"}` and `{"type": "image"}` without data.
        clips, pictures: for each row the videos and images, in the order in which its messages show them.

    Raises:
        ValueError: the processor has no chat template, or a row's messages do not show its videos and images.
        TypeError: the processor is a tokenizer only.
    """
    from transformers import PreTrainedTokenizerBase

    if isinstance(processor, PreTrainedTokenizerBase):
        raise TypeError(
            f"{type(processor).__name__} is a tokenizer, which cannot read videos; AutoProcessor gives one for a "
            "checkpoint whose processor it does not know. vidcompress.AutoProcessor knows that of LLaVA-Video, too"
        )
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{type(processor).__name__} has no chat template, which says how videos and text become a prompt; "
            "set processor.chat_template, or take a processor that brings one"
        )
    texts = processor.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    _check_placeholders(texts, clips, getattr(processor, "video_token", None), "videos")
    _check_placeholders(texts, pictures, getattr(processor, "image_token", None), "images")

    media_inputs: dict[str, Any] = {}
    if any(clips):
        media_inputs["videos"] = [clip.frames for row in clips for clip in row]
        media_inputs["video_metadata"] = [clip.metadata() for row in clips for clip in row]
        media_inputs["do_sample_frames"] = False
    if any(pictures):
        media_inputs["images"] = pictures
    return _processed(processor, texts, return_tensors, media_inputs)


def _processed(processor: Any, texts: list[str], return_tensors: str | None, media: dict[str, Any]) -> BatchFeature:
    """What the processor makes of it, padded on the left."""
    try:
        return processor(text=texts, padding=True, padding_side="left", return_tensors=return_tensors, **media)
    except ValueError as error:
        lengths = sorted({len(frames) for frames in media.get("videos", [])})
        if len(lengths) < 2:
            raise
        raise ValueError(
            f"{type(processor).__name__} refuses videos of {lengths} frames together; LLaVA-OneVision, for one, stacks "
            f"them, so load all with the same num_frames. Its own words: {error}"
        ) from error


def _conversations(
    prompts: list[str], clips: list[list[Video]], pictures: list[list[Any]], system: str | None
) -> list[list[dict[str, Any]]]:
    """The chat of each prompt: in the user's turn videos, then images, then the text."""
    opening = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    conversations = []
    for text, row, shown in zip(prompts, clips, pictures):
        media = [{"type": "video"} for _ in row] + [{"type": "image"} for _ in shown]
        conversations.append([*opening, {"role": "user", "content": [*media, {"type": "text", "text": text}]}])
    return conversations


def _rows(items: Any, prompt: str | list[str], name: str) -> list[list[Any]]:
    """The videos or images of each prompt."""
    if isinstance(prompt, str):
        return [[] if items is None else list(items) if isinstance(items, (list, tuple)) else [items]]
    if not isinstance(prompt, (list, tuple)):
        raise TypeError(f"prompt is a {type(prompt).__name__}; accepted: a string, or a list of strings")
    if not prompt:
        raise ValueError("prompt is an empty list; accepted: a string, or a list of at least one")
    if items is None:
        return [[] for _ in prompt]
    if not isinstance(items, (list, tuple)) or len(items) != len(prompt):
        given = f"{len(items)} entries" if isinstance(items, (list, tuple)) else f"one {type(items).__name__}"
        raise ValueError(f"{name} holds {given} for {len(prompt)} prompts; a list of prompts takes one entry for each")
    return [list(item) if isinstance(item, (list, tuple)) else [item] for item in items]


def _check_placeholders(texts: list[str], rows: list[list[Any]], token: str | None, name: str) -> None:
    if token is None:
        return
    for text, row in zip(texts, rows):
        if text.count(token) != len(row):
            raise ValueError(
                f"the rendered prompt holds {text.count(token)} placeholders {token!r} for {len(row)} {name}: the chat "
                f"template must write one for each, and the prompt none; it reads {text!r}"
            )


@dataclass(frozen=True)
class _Sampling:
    """What was asked for: an exact number of frames, a rate, or neither and a limit."""

    num_frames: int | None
    fps: float | None
    max_frames: int

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.fps is not None:
            raise ValueError(f"num_frames={self.num_frames} and fps={self.fps} exclude each other; give one of them")
        for name in ("num_frames", "max_frames"):
            value = getattr(self, name)
            if value is None and name == "num_frames":
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; accepted: a positive whole number")
            if value <= 0:
                raise ValueError(f"{name}={value} is not positive; accepted: a positive whole number")
        if self.fps is not None:
            if isinstance(self.fps, bool) or not isinstance(self.fps, numbers.Real):
                raise TypeError(f"fps={self.fps!r} is a {type(self.fps).__name__}; accepted: a positive number")
            if not (math.isfinite(self.fps) and self.fps > 0):
                raise ValueError(f"fps={self.fps} is not positive and finite; accepted: frames a second, such as 0.5")

    def indices(self, total: int, rate: float | None, name: str) -> list[int]:
        """Which of `total` frames, shown at `rate` a second, to take: ascending, from 0."""
        if self.fps is not None:
            if rate is None:
                raise ValueError(f"fps={self.fps} needs a frame rate, and {name} has none; give num_frames instead")
            count = max(1, int(total / rate * float(self.fps)))
            if count > total:
                raise ValueError(f"fps={self.fps} is more than the {rate:g} frames a second of {name}")
        elif self.num_frames is not None:
            count = operator.index(self.num_frames)
            if count > total:
                raise ValueError(f"num_frames={count} is more than the {total} frames of {name}")
        else:
            count = min(operator.index(self.max_frames), total)
        return [i * total // count for i in range(count)]


def _resample(video: Video, sampling: _Sampling) -> Video:
    held = len(video.indices)
    rate = None if video.fps is None else video.fps * held / video.total_frames
    picked = sampling.indices(held, rate, f"the Video of {video.source}")
    return Video(
        video.frames[picked],
        video.fps,
        video.total_frames,
        video.duration,
        tuple(video.indices[i] for i in picked),
        video.source,
    )


def _is(value: Any, module: str, name: str) -> bool:
    """isinstance without an import: whoever holds a tensor or a PIL image has imported its module."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _as_array(value: Any, name: str) -> np.ndarray | None:
    """Pixels in an array or a tensor as a numpy array; None when the value is neither."""
    tensor = _is(value, "torch", "Tensor")
    if not tensor and not _is(value, "numpy", "ndarray"):
        return None
    if str(value.dtype).removeprefix("torch.") != "uint8":
        raise ValueError(
            f"{name} holds {value.dtype}, a type whose scale cannot be known; accepted: uint8, 0 to 255 (multiply "
            "values in [0, 1] by 255, round and convert)"
        )
    return value.detach().cpu().numpy() if tensor else value


def _from_array(array: np.ndarray, sampling: _Sampling) -> Video:
    name = f"<array {list(array.shape)}>"
    if array.ndim != 4 or 0 in array.shape or 3 not in (array.shape[1], array.shape[3]):
        raise ValueError(f"{name} is not a clip of RGB frames; accepted: uint8 [T, H, W, 3] or [T, 3, H, W], none 0")
    picked = sampling.indices(len(array), None, name)
    return Video(_channels_last(array[picked]), None, len(array), None, tuple(picked), name)


def _from_list(pictures: list[Any] | tuple[Any, ...], sampling: _Sampling) -> Video:
    import numpy as np

    name = f"<list of {len(pictures)} frames>"
    if not pictures:
        raise ValueError(f"an empty list holds no frames; accepted: {_ACCEPTED}")
    arrays = [_as_picture(picture, f"{name}: frame {i}") for i, picture in enumerate(pictures)]
    for i, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"{name}: frame {i} has the shape {list(array.shape)}, frame 0 {list(arrays[0].shape)}; "
                "accepted: frames of one size"
            )
    picked = sampling.indices(len(arrays), None, name)
    frames = _channels_last(np.stack([arrays[i] for i in picked]))
    return Video(frames, None, len(arrays), None, tuple(picked), name)


def _as_picture(value: Any, name: str) -> np.ndarray:
    import numpy as np

    array = np.asarray(value.convert("RGB")) if _is(value, "PIL.Image", "Image") else _as_array(value, name)
    if array is None:
        raise TypeError(
            f"{name} is a {type(value).__name__}; accepted: PIL images, or uint8 arrays or tensors [H, W, 3]"
        )
    if array.ndim != 3 or 0 in array.shape or 3 not in (array.shape[0], array.shape[2]):
        raise ValueError(f"{name} has the shape {list(array.shape)}; accepted: RGB [H, W, 3] or [3, H, W]")
    return array


def _channels_last(frames: np.ndarray) -> np.ndarray:
    import numpy as np

    return frames if frames.shape[3] == 3 else np.ascontiguousarray(frames.transpose(0, 2, 3, 1))


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[tuple[BinaryIO, str]]:
    """The source as a file that can be rewound, and its name; closes only what it opened itself."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield io.BytesIO(source), f"<{memoryview(source).nbytes} bytes>"
    elif isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        with tempfile.TemporaryFile() as file:
            _download(source, file)
            yield file, source
    elif isinstance(source, (str, os.PathLike)):
        name = os.path.expanduser(os.fsdecode(source))
        if os.path.isdir(name):
            raise ValueError(f"{name} is a folder; accepted: {_ACCEPTED}")
        with open(name, "rb") as file:
            yield file, name
    elif hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        name = source.name if isinstance(getattr(source, "name", None), str) else f"<{type(source).__name__}>"
        if hasattr(source, "seekable") and source.seekable():
            yield source, name
        else:
            with tempfile.TemporaryFile() as file:
                shutil.copyfileobj(source, file)
                yield file, name
    else:
        raise TypeError(f"a {type(source).__name__} is no source of video; accepted: {_ACCEPTED}")


def _download(url: str, file: BinaryIO) -> None:
    import http.client
    import urllib.error
    import urllib.request

    try:
        request = urllib.request.Request(url, headers={"User-Agent": "vidcompress"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            shutil.copyfileobj(response, file)
            promised = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} cannot be fetched: the server answers {error.code} {error.reason}") from error
    except (http.client.InvalidURL, UnicodeError) as error:
        raise ValueError(f"{url} is not a URL that can be fetched: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url} cannot be fetched: {error}") from error
    if promised is not None and file.tell() != int(promised):
        raise ConnectionError(f"{url} broke off after {file.tell()} of {promised} bytes")


def _from_file(file: BinaryIO, name: str, sampling: _Sampling) -> Video:
    require("video", "av")
    import numpy as np

    total, rate = _count(file, name)
    wanted = sampling.indices(total, rate, name)
    frames, decoded = _decode(file, name, wanted)
    if decoded is not None and decoded != total:
        if not decoded:
            raise ValueError(f"{name}: none of the {total} frames of its video stream decodes")
        _logger.warning("%s: %d frames decode where %d were counted; sampling over those", name, decoded, total)
        total = decoded
        wanted = sampling.indices(total, rate, name)
        frames, _ = _decode(file, name, wanted)
    return Video(np.stack(frames), rate, total, None if rate is None else total / rate, tuple(wanted), name)


@contextlib.contextmanager
def _container(file: BinaryIO, name: str) -> Iterator[tuple[Any, Any]]:
    """The file opened anew, and its first video stream."""
    import av
    from av.stream import Disposition

    file.seek(0)
    try:
        container = av.open(file, metadata_errors="ignore")
    except av.FFmpegError as error:
        raise ValueError(f"{name} is damaged or not a video file ({error.strerror}); accepted: {_ACCEPTED}") from error
    with container:
        if container.format.name == "tty":  # FFmpeg takes a .txt file for the recording of a terminal
            raise ValueError(f"{name} is a text file; accepted: {_ACCEPTED}")
        # The cover of a song is a video stream as well.
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            held = {"cover picture" if stream.type == "video" else stream.type for stream in container.streams}
            raise ValueError(f"{name} has no video stream, only {sorted(held)}; accepted: {_ACCEPTED}")
        if streams[0].codec_context is None:
            raise ValueError(f"{name}: this build of PyAV has no decoder for its video stream")
        yield container, streams[0]


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The sound packets of the stream, as far as the file can be read, then None, which flushes the decoder."""
    import av

    with contextlib.suppress(av.FFmpegError):
        for packet in container.demux(stream):
            if packet.size and not packet.is_corrupt:
                yield packet
    yield None


def _count(file: BinaryIO, name: str) -> tuple[int, float | None]:
    """Number of frames to be shown, from the packets without decoding them, and frames a second."""
    with _container(file, name) as (container, stream):
        read = shown = 0
        vp8 = stream.codec_context.name in ("vp8", "libvpx")
        for packet in _packets(container, stream):
            if packet is not None:
                read += 1
                # VP8 has packets that are only referred to; bit 4 of the first byte is set in those that are shown.
                shown += not packet.is_discard and (not vp8 or bool(memoryview(packet)[0] & 16))
        rate = stream.average_rate or stream.guessed_rate
        if not shown:
            raise ValueError(f"{name}: its video stream has no frames that can be read")
        if read < stream.frames:
            _logger.warning("%s: its header promises %d frames, %d can be read", name, stream.frames, read)
        return shown, float(rate) if rate else None


def _decode(file: BinaryIO, name: str, wanted: list[int]) -> tuple[list[np.ndarray], int | None]:
    """Decode up to the last wanted frame.

    Returns:
        The wanted frames that were found, uint8 [H, W, 3] each; and how many frames decode in all, when that has come
        to light: at the end of the file, which is read to the end when a packet did not decode, else None.
    """
    import av
    import numpy as np

    kept: list[np.ndarray] = []
    size: dict[str, int] = {}
    places = set(wanted)
    decoded = 0
    damaged = False
    with _container(file, name) as (container, stream):
        stream.codec_context.thread_type = "AUTO"
        for packet in _packets(container, stream):
            try:
                frames = stream.decode(packet)
            except av.FFmpegError:
                damaged = True
                continue
            for frame in frames:
                if decoded in places:
                    size = size or {"width": frame.width, "height": frame.height}
                    picture = frame.to_ndarray(format="rgb24", **size)
                    kept.append(np.rot90(picture, round(frame.rotation / 90)))
                decoded += 1
            if decoded > wanted[-1] and not damaged:
                return kept, None
    return kept, decoded
