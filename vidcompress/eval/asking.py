"""The questions of a suite, put to a model: prepared once, then asked for every method and retention ratio."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vidcompress import patches
from vidcompress.engine.handle import handle_of
from vidcompress.eval.suites import Clip
from vidcompress.trace import Prompt
from vidcompress.video import Video, prepare_inputs


@dataclass(frozen=True)
class Sheet:
    """One clip's questions as a model reads them.

    Attributes:
        media: pixels and grids of the clip, as its processor makes them.
        prefix: [1, n] ids that all questions have in common: the video, and what the chat template puts around it.
        kinds: [1, n] what they stand for, where a processor says so (Qwen's `mm_token_type_ids`); 0 is text.
        suffixes: of every question, the ids [1, m] that follow.
        options: of every question, the id with which each option begins.
        answers: of every question, which option is right.
    """

    clip: Clip
    media: Mapping[str, Tensor]
    prefix: Tensor
    kinds: Tensor | None
    suffixes: tuple[Tensor, ...]
    options: tuple[list[int], ...]
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Reply:
    """What a model chose for every question of a clip, and what its prompts took.

    Attributes:
        choices: indices of options.
        before: video tokens of the clip.
        kept: those that the decoder's last layer ran over, the mean over the questions.
        mean_kept: those that a decoder layer ran over, the mean over layers and questions.
        compression_ms: what compression took for one prompt.
    """

    choices: list[int]
    before: int
    kept: float
    mean_kept: float
    compression_ms: float


def prepare(model: Any, processor: Any, clips: Iterable[Clip]) -> list[Sheet]:
    """Processes every clip and tokenises every question, once for all methods.

    Raises:
        ValueError: a processor without a chat template, one that puts the question before the video, or two options of
            a question that begin with the same id.
    """
    return [_sheet(model, processor, clip) for clip in clips]


def _sheet(model: Any, processor: Any, clip: Clip) -> Sheet:
    count = len(clip.frames)
    video = Video(clip.frames, 8.0, count, count / 8.0, tuple(range(count)), clip.name)
    inputs = prepare_inputs(processor, video, clip.questions[0].text)
    ids, kinds = inputs.pop("input_ids"), inputs.pop("mm_token_type_ids", None)
    del inputs["attention_mask"]
    end = int((ids[0] == patches.find(model.config).video_token(model)).nonzero().max()) + 1
    suffixes = [_suffix(processor, question.text) for question in clip.questions]
    if not torch.equal(suffixes[0], ids[:, end:]):
        raise ValueError(
            f"{type(processor).__name__} makes {ids[0, end:].tolist()} of what follows the video, its tokenizer alone "
            f"{suffixes[0][0].tolist()}; expected the same"
        )
    common = _common(suffixes)
    end, suffixes = end + common, [suffix[:, common:] for suffix in suffixes]
    return Sheet(
        clip=clip,
        media={k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in inputs.items()},
        prefix=ids[:, :end].to(model.device),
        kinds=None if kinds is None else kinds[:, :end].to(model.device),
        suffixes=tuple(s.to(model.device) for s in suffixes),
        options=tuple(_first_ids(processor.tokenizer, q.options) for q in clip.questions),
        answers=tuple(q.options.index(q.answer) for q in clip.questions),
    )


def _suffix(processor: Any, question: str) -> Tensor:
    """[1, m]: the ids after the video, of the text that the chat template writes there."""
    content = [{"type": "video"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    after = text.rpartition(processor.video_token)[2]
    if question not in after:
        raise ValueError(
            f"the chat template of {type(processor).__name__} does not put the question after the video: {text!r}; "
            "the evaluation asks many questions of one prefilled clip, and methods inside the LLM need it there too"
        )
    return processor.tokenizer(after, add_special_tokens=False, return_tensors="pt")["input_ids"]


def _common(suffixes: list[Tensor]) -> int:
    """With how many equal ids they all begin; one is left to each."""
    most = min(suffix.shape[1] for suffix in suffixes) - 1
    equal = [all(int(suffix[0, i]) == int(suffixes[0][0, i]) for suffix in suffixes) for i in range(most)]
    return (equal + [False]).index(False)


def _first_ids(tokenizer: Any, options: tuple[str, ...]) -> list[int]:
    ids = [tokenizer(option, add_special_tokens=False)["input_ids"][0] for option in options]
    if len(set(ids)) < len(ids):
        raise ValueError(f"the options {', '.join(options)} do not differ in their first ids {ids}; expected all to")
    return ids


@torch.inference_mode()
def ask(model: Any, sheet: Sheet) -> Reply:
    """Asks all questions of a clip: of each, the option whose first id the model finds likeliest.

    A pipeline that does not read the question is prefilled once a clip, and every question continues from there; one
    that does, acting inside the LLM or looking into it first, is prefilled for every question, from one pass of the
    tower.
    """
    handle = handle_of(model)
    depth = model.config.get_text_config().num_hidden_layers
    pipeline = () if handle is None else handle.compression
    reads = any("first_look" in m.needs or any(site.is_inner for site in m.sites(depth)) for m in pipeline)
    # Qwen's text behind a video stands elsewhere in a later turn than in the same prompt.
    apart = reads or hasattr(model.model, "rope_deltas")
    logits, records = _ask_apart(model, sheet) if apart else _ask_in_turn(model, sheet)
    choices = [int(row[torch.tensor(ids, device=row.device)].argmax()) for row, ids in zip(logits, sheet.options)]
    patch = patches.find(model.config)
    before = sum(video.tokens for video in patch.encoded(model, dict(sheet.media), {}))
    if not records:
        return Reply(choices, before, before, before, 0.0)
    gone = [before * len(r.layer_lengths) - sum(r.length_before - n for n in r.layer_lengths) for r in records]
    return Reply(
        choices=choices,
        before=before,
        kept=statistics.fmean(r.after if r.steps else before for r in records),
        mean_kept=statistics.fmean(g / len(r.layer_lengths) for g, r in zip(gone, records)),
        compression_ms=1e3 * statistics.fmean(r.seconds + r.signal_seconds for r in records),
    )


def _ask_in_turn(model: Any, sheet: Sheet) -> tuple[list[Tensor], list[Prompt]]:
    """Logits [V] after every question, and the record of the one prefill."""
    cache = DynamicCache(config=model.config.get_text_config())
    model(**sheet.media, **_prompt(sheet.prefix, sheet.kinds), past_key_values=cache, logits_to_keep=1)
    records, logits = _records(model), []
    for suffix in sheet.suffixes:
        new = {"input_ids": suffix, "attention_mask": torch.ones_like(torch.cat([sheet.prefix, suffix], 1))}
        logits.append(model(**new, past_key_values=cache, logits_to_keep=1).logits[0, -1])
        cache.crop(-suffix.shape[1])
    return logits, records


def _ask_apart(model: Any, sheet: Sheet) -> tuple[list[Tensor], list[Prompt]]:
    """Logits [V] after every question, and the record of each prefill."""
    media: Mapping[str, Any] = sheet.media
    if "mm_encoder_outputs" in inspect.signature(type(model.model).forward).parameters:
        output = model.model.get_video_features(**sheet.media, return_dict=True)
        media = {k: v for k, v in sheet.media.items() if not k.startswith("pixel_values")}
        media = {**media, "mm_encoder_outputs": {"video": output}}
    logits, records = [], []
    for suffix in sheet.suffixes:
        ids = torch.cat([sheet.prefix, suffix], 1)
        logits.append(model(**media, **_prompt(ids, sheet.kinds), use_cache=False, logits_to_keep=1).logits[0, -1])
        records += _records(model)
    return logits, records


def _prompt(ids: Tensor, kinds: Tensor | None) -> dict[str, Tensor]:
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kinds is None:
        return prompt
    text = kinds.new_zeros(1, ids.shape[1] - kinds.shape[1])
    return prompt | {"mm_token_type_ids": torch.cat([kinds, text], 1)}


def _records(model: Any) -> list[Prompt]:
    """What the engine did with the last prompt; nothing without compression."""
    handle = handle_of(model)
    return [] if handle is None or handle.trace.last is None else [handle.trace.last]
