"""A tour: a clip made on the spot, and a tiny trained video-LLM that answers questions about it in several ways."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

SEED = (1 << 42) + 11  # neither the training nor the evaluation set has it
METHODS = ("infomerge", "fastvid", "unified", "random")
FPS = 8
UNKNOWN = ("direction", "place")
"""Types of questions that the model did not learn to answer (docs/evaluation.md)."""


def make_clip(path: Path, seed: int = SEED) -> Path:
    """Renders a clip of vidcompress.eval.tinyqa into an mp4 without loss."""
    import av

    from vidcompress.eval.tinyqa import invent, render

    with av.open(str(path), "w") as container:
        frames = render(invent(seed))
        stream = container.add_stream("libx264rgb", rate=FPS, options={"qp": "0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which are longer than what they stand for."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def run_demo(console: Console, folder: Path | None, retention_ratio: float) -> None:
    """Makes a clip, asks the tiny model about it with and without compression, and prints answers and costs."""
    with quiet():
        if folder is None:
            with tempfile.TemporaryDirectory() as temporary:
                _tour(console, Path(temporary), retention_ratio)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _tour(console, folder, retention_ratio)


def _tour(console: Console, folder: Path, retention_ratio: float) -> None:
    from transformers import AutoProcessor

    import vidcompress
    from vidcompress.eval import checkpoints
    from vidcompress.eval.tinyqa import invent, questions_about
    from vidcompress.measure import Result, ask
    from vidcompress.tables import result_rows, rich_table
    from vidcompress.video import load_video

    checkpoint = checkpoints.path()
    clip = make_clip(folder / "clip.mp4")
    questions = {q.type: q for q in questions_about(invent(SEED)) if q.type not in UNKNOWN}.values()
    console.print(
        "A tiny LLaVA-OneVision, trained on rendered clips, and a clip that it has never seen. What holds for real "
        "models and videos, only those can tell."
    )
    start = time.perf_counter()
    video = load_video(clip)
    seconds = time.perf_counter() - start
    model = vidcompress.from_pretrained(checkpoint, compression=METHODS[0], dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    handle = vidcompress.handle_of(model)
    assert handle is not None

    def answers() -> list[Result]:
        ask(model, processor, video, "what ?", max_new_tokens=1)  # warm-up
        return [ask(model, processor, video, q.text, max_new_tokens=4, decode_seconds=seconds) for q in questions]

    columns: dict[str, list[Result]] = {}
    for name in METHODS:
        handle.switch(name, retention_ratio=retention_ratio)
        columns[name] = answers()
        if name == METHODS[0]:
            step = handle.trace[-1].steps[0]
    handle.remove()
    columns = {"without": answers()} | columns
    table = Table("question", "right", *columns, box=SIMPLE_HEAD, pad_edge=False)
    table.title = f"keeping {retention_ratio:.0%} of the video's tokens; a tick is the right answer"
    for i, question in enumerate(questions):
        given = ("✓" if own[i].answer == question.answer else own[i].answer for own in columns.values())
        table.add_row(question.text.replace(" ?", "?"), question.answer, *given)
    console.print(table)
    console.print(rich_table(result_rows([own[0] for own in columns.values()]), "what the first question cost"))
    shots = ", ".join(f"{start}-{end - 1}" for start, end in step.reduction.notes["segments"])
    truth = ", ".join(f"{scene.start}-{scene.start + scene.length - 1}" for scene in invent(SEED).scenes)
    console.print(f"{METHODS[0]} saw these segments of frames: {shots}; the clip was cut from scenes of {truth}")
    _tour_of_the_pipeline(console, checkpoint, retention_ratio, video, next(iter(questions)).text)


def _tour_of_the_pipeline(
    console: Console, checkpoint: Path, retention_ratio: float, video: Any, question: str
) -> None:
    from transformers import pipeline

    import vidcompress

    vidcompress.enable()
    compression = {"method": METHODS[0], "retention_ratio": retention_ratio}
    try:
        pipe = pipeline("image-text-to-text", model=str(checkpoint), model_kwargs={"compression": compression})
    finally:
        vidcompress.disable()
    message = {
        "role": "user",
        "content": [{"type": "video", "video": video.frames}, {"type": "text", "text": question}],
    }
    options = {"do_sample_frames": False, "video_metadata": [video.metadata()]}
    reply = pipe(
        text=[message],
        generate_kwargs={"max_new_tokens": 4, "do_sample": False},
        return_full_text=False,
        processor_kwargs=options,
    )
    inside = vidcompress.handle_of(pipe.model)
    assert inside is not None and inside.trace.last is not None
    console.print(
        f"transformers.pipeline(..., model_kwargs={{'compression': ...}}) kept {inside.trace.last.after} of "
        f"{inside.trace.last.before} video tokens and answered {reply[0]['generated_text'].strip()!r}",
        markup=False,
    )
