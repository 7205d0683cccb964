"""`Patch`, the base class of the backbones: it locates (tower, decoder, grid, newlines), no more."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from vidcompress.tokens import Grid

if TYPE_CHECKING:
    from vidcompress.engine.hooks import Engine
    from vidcompress.engine.overrides import Override
    from vidcompress.engine.saliency import TowerSignals


@dataclass(frozen=True)
class EncodedVideo:
    """One video as it came out of the encoder.

    Attributes:
        grid: (t, h, w) of its tokens for the decoder.
        line: how many of its tokens a newline token follows, each time; 0 if none does. A newline stays as long as a
            token of its line does (docs/decisions.md, D5).
        signals: by name, what the tower was asked for: `frame_features` [t, F], saliency [t, h * w], `tower_keys`
            [t, h * w, D].
    """

    grid: Grid
    line: int = 0
    signals: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """The video's own tokens, newlines not counted."""
        t, h, w = self.grid
        return t * h * w

    @property
    def newlines(self) -> int:
        """Newline tokens between and behind the video's own."""
        return self.tokens // self.line if self.line else 0

    @property
    def placeholders(self) -> int:
        """Places this video takes in the prompt."""
        return self.tokens + self.newlines


class Patch:
    """One backbone, a page of facts. A subclass sets the class attributes and answers `encoded`."""

    model_types: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[frozenset[str]] = frozenset()
    anchors: ClassVar[tuple[str, ...]] = ("language_model.layers", "language_model.rotary_emb", "get_video_features")
    """Attributes of the base model without which the engine cannot work."""
    rotary_axes: ClassVar[int] = 1
    has_siglip: ClassVar[bool] = True
    """Whether the tower is a SigLIP, whose pooling head can be loaded beside it."""

    def check(self, model: nn.Module) -> None:
        """ValueError if this transformers version keeps things elsewhere than the patch knows."""
        import transformers

        for anchor in self.anchors:
            try:
                operator.attrgetter(anchor)(self.base(model))
            except AttributeError:
                raise ValueError(
                    f"{type(model).__name__} has no `{anchor}` in transformers {transformers.__version__}; "
                    "vidcompress is tested with transformers 5.17 to 5.23"
                ) from None

    def base(self, model: nn.Module) -> Any:
        """The multimodal model without its language-modelling head."""
        return model.base_model

    def decoder(self, model: nn.Module) -> Any:
        """The text decoder."""
        return self.base(model).language_model

    def video_token(self, model: nn.Module) -> int:
        """Id of the placeholder token."""
        return self.base(model).config.video_token_id

    def image_token(self, model: nn.Module) -> int | None:
        """Id of the placeholder token of images; None if the model knows none."""
        return getattr(self.base(model).config, "image_token_id", None)

    def deepstack_layers(self, model: nn.Module) -> int:
        """How many of the decoder's first layers add vision features to the video tokens."""
        return 0

    def frame_grid(self, config: Any) -> tuple[int, int] | None:
        """(rows, columns) of a frame's tokens by the model's config; None where they depend on the video."""
        return None

    def check_call(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        """ValueError if a call of `get_video_features` with these arguments cannot be served; none is refused here."""

    def encoded(
        self, model: nn.Module, arguments: Mapping[str, Any], signals: Mapping[str, Tensor]
    ) -> list[EncodedVideo]:
        """The videos of one call of `get_video_features`, in order, from the call's arguments.

        Args:
            arguments: of the call, by name.
            signals: by name, [F, ...] for all frames of all videos together.
        """
        raise NotImplementedError

    def overrides(self, model: nn.Module, engine: Engine) -> list[Override]:
        """Stand-ins for methods of the model by which the engine learns of videos and of generate()."""
        from vidcompress.engine.overrides import Generate, GetVideoFeatures, NoAutoCompile, PlainMasks

        found: list[Override] = [GetVideoFeatures(self.base(model), engine)]
        if hasattr(type(model), "generate"):
            found += [cls(model, engine) for cls in (Generate, PlainMasks, NoAutoCompile)]
        return found

    def new_cache(self, decoder: Any) -> Any:
        """The KV cache that the decoder makes when it is given none."""
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=decoder.config)

    def causal_mask(self, decoder: Any, hidden: Tensor, mask: Tensor | None, cache: Any, layer: int) -> Any:
        """The mask that a decoder layer takes.

        Args:
            hidden: [B, L, C] the layer's input.
            mask: [B, stored + L] bool of real tokens; None if all are.
            cache: the KV cache, or None.
            layer: index of the layer.
        """
        from transformers.masking_utils import create_causal_mask

        return create_causal_mask(
            config=decoder.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=cache,
            position_ids=None,
            layer_idx=layer,
        )

    def tower_signals(self, model: nn.Module) -> TowerSignals:
        """What takes signals out of the vision tower while it runs, with its hooks on."""
        raise NotImplementedError

    def signal_layer(self, model: nn.Module, arguments: Mapping[str, Any]) -> int:
        """Index of the tower layer whose output a call of `get_video_features` with these arguments uses (the last)."""
        raise NotImplementedError

    def default_head(self, model: nn.Module) -> str | None:
        """Hub id of the SigLIP checkpoint whose pooling head fits this model's tower, if one is known."""
        return None

    def vision_config(self, model: nn.Module) -> Any:
        """Config of the vision tower."""
        return self.base(model).config.vision_config
