"""The tiny models before training: transformers' own classes, their processors, and what training needs.

A `Student` hides the two backbones' differences: what a clip becomes, where its tokens stand, what stands around them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidcompress.eval.tinyqa import SIDE
from vidcompress.eval.tinyqa.words import TEMPLATE, VOCABULARY, encode, tokenizer

PATCH = 6
CELL = 2 * PATCH  # pixels that become a side of a token
TOWER = {"width": 96, "depth": 4, "heads": 4, "inner": 256}
TEXT: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY["<|im_end|>"],
    "pad_token_id": VOCABULARY["<pad>"],
}
NORMALISED = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
THETA = 2000.0  # of the rotary embedding: its waves fit prompts of a thousand tokens


class Student(ABC):
    """A tiny model in training.

    Attributes:
        model: transformers' model for conditional generation.
        stride: frames that become one row of tokens.
        knows_place: whether the tower can tell where in the picture a patch is.
        has_head: whether the tower pools its patches by attention.
        sizes: heights and widths of the frames that it learns from.
        vision_steps: that the tower needs to tell shapes and digits apart.
        language_steps: of the language model's training, by part.
        before, after: ids that stand around the video's tokens in a prompt.
    """

    model: Any
    stride = 1
    knows_place = True
    has_head = False
    vision_steps = 1300
    language_steps: tuple[int, ...] = (3000, 1500, 700)
    sizes: tuple[tuple[int, int], ...] = ((SIDE, SIDE),)
    before: list[int]
    after: list[int]

    @abstractmethod
    def patches(self, frames: Tensor) -> dict[str, Tensor]:
        """uint8 [B, T, H, W, 3] clips -> `first` [B*T', P, C] after the tower's first layer, `last` [B*T', P, C] after
        its last, `tokens` [B*T', N, D] as the LLM sees them and, if the tower has a head, `pooled` [B*T', C]."""

    @abstractmethod
    def positions(self, frames: int, height: int, width: int) -> Tensor:
        """Rotary positions [A, L] of `before`, the video of `frames` rows of tokens and `after`, on the CPU; A is 1 or
        3."""

    def between(self, batch: int) -> Tensor:
        """Embeddings [B, n, D] that stand right after the video's tokens and are no words."""
        return self.decoder.embed_tokens.weight.new_empty(batch, 0, TEXT["hidden_size"])

    def decode(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [B, L, D] of embeddings [B, L, D] under a mask [1, 1, L, L], at positions [A, 1 or B, L]."""
        places = positions[0] if len(positions) == 1 else positions.expand(-1, len(embeds), -1)
        out = self.decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False)
        return out.last_hidden_state

    @property
    def device(self) -> torch.device:
        """Where the model is; its inputs are to be there too."""
        return self.model.device

    @property
    def extra(self) -> list[nn.Parameter]:
        """What is learnt with the decoder and belongs to no module of it."""
        return []

    @property
    def decoder(self) -> Any:
        """The text decoder."""
        return self.model.model.language_model

    @property
    @abstractmethod
    def eyes(self) -> list[nn.Module]:
        """Tower and projector: what is trained first and then kept."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes checkpoint and processor, bf16, of a model on the CPU."""

    def load(self, folder: Path) -> None:
        """Takes the weights of a checkpoint that `save` wrote, its pooling head beside it."""
        from safetensors.torch import load_file

        saved = type(self.model).from_pretrained(folder, dtype=torch.float32)
        kept = saved.state_dict()
        head = folder / "siglip" / "model.safetensors"
        if head.exists():
            rest = load_file(head)
            kept |= {k.replace("vision_model.", "model.vision_tower.", 1): v.float() for k, v in rest.items()}
        self.model.load_state_dict(kept)

    @torch.no_grad()
    def round(self) -> None:
        """Rounds all weights to bf16, which is what a checkpoint keeps of them."""
        for weight in self.model.parameters():
            weight.copy_(weight.bfloat16())

    def _save_model(self, folder: Path) -> None:
        self.model.generation_config.pad_token_id = VOCABULARY["<pad>"]
        self.model.to(torch.bfloat16).save_pretrained(folder)
        self.model.float()


class LlavaOnevision(Student):
    """SigLIP with its pooling head, 12 x 12 patches pooled to 6 x 6 tokens a frame, one newline after the video."""

    has_head = True
    before = encode("<|im_start|> user")
    after = encode("")

    def __init__(self) -> None:
        from transformers import (
            LlavaOnevisionConfig,
            LlavaOnevisionForConditionalGeneration,
            Qwen2Config,
            SiglipVisionConfig,
        )

        vision = SiglipVisionConfig(
            hidden_size=TOWER["width"],
            intermediate_size=TOWER["inner"],
            num_hidden_layers=TOWER["depth"],
            num_attention_heads=TOWER["heads"],
            image_size=SIDE,
            patch_size=PATCH,
            vision_use_head=True,
        )
        text = Qwen2Config(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": THETA})
        config = LlavaOnevisionConfig(
            vision_config=vision.to_dict(),
            text_config=text.to_dict(),
            image_token_index=VOCABULARY["<image>"],
            video_token_index=VOCABULARY["<video>"],
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            image_grid_pinpoints=[[SIDE, SIDE]],
            tie_word_embeddings=False,
        )
        self.model = LlavaOnevisionForConditionalGeneration(config)
        tower = self.model.model.vision_tower
        with torch.no_grad():
            tower.embeddings.position_embedding.weight.copy_(0.8 * _waves(SIDE // PATCH, TOWER["width"]))
            _start_local([(layer.self_attn.q_proj, layer.self_attn.k_proj) for layer in tower.encoder.layers])
        _start_strong(self.model, [*_linears(self.model.model.multi_modal_projector)])

    @property
    def eyes(self) -> list[nn.Module]:
        return [self.model.model.vision_tower, self.model.model.multi_modal_projector]

    def patches(self, frames: Tensor) -> dict[str, Tensor]:
        pixels = (frames.flatten(0, 1).movedim(-1, 1).float() / 255 - 0.5) / 0.5
        tower, inner = self.model.model.vision_tower, self.model.model
        out = tower(pixels, output_hidden_states=True)
        states = out.hidden_states
        tokens = inner.apply_pooling(inner.multi_modal_projector(states[-1]))
        return {"first": states[1], "last": states[-1], "tokens": tokens, "pooled": out.pooler_output}

    def between(self, batch: int) -> Tensor:
        return self.model.model.image_newline.expand(batch, 1, -1)

    @property
    def extra(self) -> list[nn.Parameter]:
        return [self.model.model.image_newline]

    def positions(self, frames: int, height: int, width: int) -> Tensor:
        return torch.arange(len(self.before) + frames * height * width + 1)[None]

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file
        from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

        tower = self.model.model.vision_tower
        wanted = ("head.", "post_layernorm.")
        head = {f"vision_model.{k}": v.bfloat16() for k, v in tower.state_dict().items() if k.startswith(wanted)}
        kept = tower.head
        del tower.head  # as in every published LLaVA checkpoint: the head lies beside it
        self.model.config.vision_config.vision_use_head = False
        self._save_model(folder)
        tower.head, self.model.config.vision_config.vision_use_head = kept, True
        (folder / "siglip").mkdir(exist_ok=True)
        save_file(head, folder / "siglip" / "model.safetensors", {"format": "pt"})
        pixels: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}, **NORMALISED}
        LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=[[SIDE, SIDE]]),
            video_processor=LlavaOnevisionVideoProcessor(**pixels),
            tokenizer=tokenizer(),
            num_image_tokens=(SIDE // PATCH) ** 2,
            vision_feature_select_strategy="full",
            chat_template=TEMPLATE.replace("IMAGE", "<image>").replace("VIDEO", "<video>"),
        ).save_pretrained(folder)


class Qwen2VL(Student):
    """Rotary patches of two frames each, 2 x 2 of them merged into a token; frames of several sizes."""

    stride = 2
    vision_steps = 2000
    language_steps = (3000, 2300, 700)
    knows_place = False  # a rotary tower tells distances only; the decoder's own positions say where a token is
    sizes = ((SIDE, SIDE), (SIDE, SIDE), (60, 84), (84, 60))
    before = encode("<|im_start|> user <|vision_start|>")
    after = encode("<|vision_end|>")

    def __init__(self) -> None:
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": [6, 5, 5]}
        config = Qwen2VLConfig(
            vision_config={
                "embed_dim": TOWER["width"],
                "hidden_size": TEXT["hidden_size"],
                "depth": TOWER["depth"],
                "num_heads": TOWER["heads"],
                "mlp_ratio": 3,
                "patch_size": PATCH,
                "spatial_merge_size": CELL // PATCH,
                "temporal_patch_size": self.stride,
            },
            text_config={**TEXT, "rope_parameters": rope},
            image_token_id=VOCABULARY["<|image_pad|>"],
            video_token_id=VOCABULARY["<|video_pad|>"],
            vision_start_token_id=VOCABULARY["<|vision_start|>"],
            vision_end_token_id=VOCABULARY["<|vision_end|>"],
            tie_word_embeddings=False,
        )
        self.model = Qwen2VLForConditionalGeneration(config)
        _start_strong(self.model, _linears(self.model.model.visual.merger))

    @property
    def eyes(self) -> list[nn.Module]:
        return [self.model.model.visual]

    def patches(self, frames: Tensor) -> dict[str, Tensor]:
        batch, time, height, width, _ = frames.shape
        rows, columns = height // CELL, width // CELL
        pixels = (frames.float() / 255 - 0.5) / 0.5
        pixels = pixels.view(batch * time // 2, 2, rows, 2, PATCH, columns, 2, PATCH, 3)
        pixels = pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * 2 * PATCH * PATCH)
        grid = torch.tensor([[time // 2, 2 * rows, 2 * columns]], device=frames.device).expand(batch, -1)
        out = self.model.model.visual(pixels, grid_thw=grid, output_hidden_states=True)

        def in_rows(states: Tensor) -> Tensor:
            states = states.view(-1, rows, columns, 2, 2, TOWER["width"]).transpose(2, 3)
            return states.reshape(len(states), 4 * rows * columns, -1)

        tokens = out.pooler_output.view(batch * time // 2, rows * columns, -1)
        return {"first": in_rows(out.hidden_states[1]), "last": in_rows(out.hidden_states[-1]), "tokens": tokens}

    def positions(self, frames: int, height: int, width: int) -> Tensor:
        start = len(self.before)
        words = torch.arange(start).expand(3, -1)
        video = start + torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width)).T
        return torch.cat([words, video, torch.full((3, 1), start + max(height, width))], 1)

    def save(self, folder: Path) -> None:
        from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

        self._save_model(folder)
        pixels: dict[str, Any] = {
            "patch_size": PATCH,
            "merge_size": CELL // PATCH,
            "temporal_patch_size": self.stride,
            "size": {"shortest_edge": 4 * CELL * CELL, "longest_edge": 400 * CELL * CELL},
            **NORMALISED,
        }
        vision = "<|vision_start|> <|{}_pad|> <|vision_end|>"
        Qwen2VLProcessor(
            image_processor=Qwen2VLImageProcessor(**pixels),
            video_processor=Qwen2VLVideoProcessor(**pixels, cap_pixels_per_frame=False),
            tokenizer=tokenizer(),
            chat_template=TEMPLATE.replace("IMAGE", vision.format("image")).replace("VIDEO", vision.format("video")),
        ).save_pretrained(folder)


STUDENTS: dict[str, type[Student]] = {"llava_onevision": LlavaOnevision, "qwen2_vl": Qwen2VL}


def _waves(side: int, width: int) -> Tensor:
    """[side * side, width]: sines and cosines of rows and columns, 3 to 40 patches long."""
    lengths = torch.logspace(math.log10(3.0), math.log10(40.0), width // 4)
    angles = torch.arange(side)[:, None] * (2 * math.pi / lengths)
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)


def _start_local(pairs: list[tuple[nn.Linear, nn.Linear]]) -> None:
    """Equal query and key weights: heads begin by looking at what is near and alike, and shapes are learnt sooner."""
    for query, key in pairs:
        weight = torch.randn_like(query.weight) * 1.4 / query.in_features**0.5
        query.weight.copy_(weight)
        key.weight.copy_(weight + 0.02 * torch.randn_like(weight))


@torch.no_grad()
def _start_strong(model: Any, projector: list[nn.Linear]) -> None:
    """At tiny widths transformers' own initial scale is too faint for words and projected tokens."""
    model.model.language_model.embed_tokens.weight.normal_(0, 0.5)
    for linear in projector:
        nn.init.xavier_uniform_(linear.weight)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]
