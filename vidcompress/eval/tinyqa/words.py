"""The language of the questions: every word, the tokenizer made of them, and the chat template."""

from __future__ import annotations

from typing import Any

from vidcompress.eval.tinyqa.questions import NUMBERS, PLACES
from vidcompress.eval.tinyqa.scenes import COLOURS, DIGITS, DIRECTIONS, SHAPES, TEXTURES

SPECIAL = (
    "<pad>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<video>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
)
PLAIN = (
    "user assistant system what which where how many color shape is the object shapes digit flashed briefly direction "
    "did move at start end in first last scene background smallest largest came or ?"
)
WORDS = tuple(
    dict.fromkeys([*SPECIAL, *PLAIN.split(), *COLOURS, *SHAPES, *DIGITS, *TEXTURES, *DIRECTIONS, *PLACES, *NUMBERS])
)
VOCABULARY = {word: i for i, word in enumerate(WORDS)}
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE {% elif part['type'] == 'video' %}VIDEO "
    "{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
"""Jinja; `IMAGE` and `VIDEO` stand for what a model's processor replaces."""


def encode(text: str) -> list[int]:
    """The ids of words that stand apart; KeyError for one that the language does not have."""
    return [VOCABULARY[word] for word in text.split()]


def tokenizer() -> Any:
    """transformers' fast tokenizer of these words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=[s for s in SPECIAL if s not in ("<unk>", "<pad>", "<|im_end|>")],
        padding_side="left",
    )
