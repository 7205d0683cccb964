"""What becomes of the videos of one prompt: at every site a method is asked about each, and the sequence shortened."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidcompress.engine.decoder_signals import DECODER_SIGNALS, LayerView
from vidcompress.engine.saliency import mean_tokens, synchronise
from vidcompress.engine.sequence import Sequence
from vidcompress.method import Method, Pipeline
from vidcompress.tokens import Reduction, Site, VideoTokens
from vidcompress.trace import Prompt, Step, Trace

if TYPE_CHECKING:
    from vidcompress.engine.assistant import Assistant
    from vidcompress.patches.base import EncodedVideo


@dataclass
class Encoding:
    """One call of `get_video_features`.

    Attributes:
        videos: what was encoded, in order.
        pipeline: what is to become of them, whatever is switched to meanwhile.
        head: where the SigLIP pooling head came from, or None.
        seconds: what taking the signals cost.
        assistant: who takes first looks, if not the model itself.
        given: with which arguments the encoder was called, if there is an assistant to hand them on to.
    """

    videos: list[EncodedVideo]
    pipeline: Pipeline
    head: str | None
    seconds: float
    assistant: Assistant | None = None
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Pending:
    """A forward of the base model that holds video.

    Attributes:
        where: [B, L] bool, the video placeholders, newlines included.
        images: [B, L] bool, the placeholders of images, or None.
        encoding: the videos, once they are encoded.
        limit: how many columns belong to the prompt; what follows was decoded and must not sway a method.
        given: with which arguments the base model was called.
    """

    where: Tensor
    images: Tensor | None
    encoding: Encoding | None
    limit: int
    given: Mapping[str, Any] = field(default_factory=dict)

    def for_rows(self, batch: int) -> Pending:
        """The same after generate() repeated every row for beams and return sequences."""
        times = batch // len(self.where)
        if times == 1:
            return self
        images = None if self.images is None else self.images.repeat_interleave(times, 0)
        return replace(self, where=self.where.repeat_interleave(times, 0), images=images)


@dataclass
class Followed:
    """One video of one row, on its way through the decoder.

    Attributes:
        row, number: batch row, and index of the video within the prompt.
        video: what was encoded.
        places: [M] its columns in the sequence as it stands.
        index: [M] their places in the grid.
        newlines: [K] columns of its newlines.
        lines: [K] the line of tokens that each of them ends.
        entered: how many tokens of it entered the LLM.
        notes: what each method of the pipeline noted about it, by the method's `id`.
    """

    row: int
    number: int
    video: EncodedVideo
    places: Tensor
    index: Tensor
    newlines: Tensor
    lines: Tensor
    entered: int
    notes: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    def ends(self, keep: Tensor) -> Tensor:
        """[K] bool: which newlines stay beside the tokens `keep`, those whose line keeps one (D5)."""
        if len(self.newlines) < 2:
            return torch.ones_like(self.newlines, dtype=torch.bool)
        alive = torch.zeros(self.video.newlines, dtype=torch.bool, device=self.lines.device)
        alive[self.index[keep] // self.video.line] = True
        return alive[self.lines]

    def may_lose(self, column: Tensor) -> bool:
        """Whether `column` [1] is its end, which may be removed; the newline of a whole video always stays."""
        ends = torch.cat([self.places[-1:], self.newlines[-1:] if self.video.newlines > 1 else column[:0]])
        return bool((ends == column).any())

    def reduce(self, keep: Tensor) -> None:
        """Goes on with the tokens `keep`, and their lines' newlines."""
        if len(self.newlines) > 1:
            stay = self.ends(keep)
            self.newlines, self.lines = self.newlines[stay], self.lines[stay]
        self.places, self.index = self.places[keep], self.index[keep]

    def to(self, device: torch.device) -> None:
        """Moves along to another device."""
        for name in ("places", "index", "newlines", "lines"):
            setattr(self, name, getattr(self, name).to(device))


@dataclass
class Plan:
    """The videos of a prompt and what is to become of them.

    Attributes:
        stages: the method at every site.
        followed: every video of every row.
        text: for every row the columns of the prompt's text after its last video; the last token where there is none.
        last: for every row the column of the prompt's last token.
        textless: rows that have no text after their last video.
        evictions: the method at every site between decoding steps, if something is to go there.
        looks: decoder layers that are looked at before the whole prompt is reduced.
        assistant: who looks at the whole prompt instead.
        prompt: the trace's record, or None if the trace is off.
        taken: (row, columns [N], reduction) of every video at the last site.
    """

    stages: dict[Site, Method]
    followed: list[Followed]
    text: list[Tensor]
    last: list[Tensor]
    textless: list[int]
    evictions: Mapping[Site, Method] = field(default_factory=dict)
    looks: tuple[int, ...] = ()
    assistant: Assistant | None = None
    prompt: Prompt | None = None
    taken: list[tuple[int, Tensor, Reduction]] = field(default_factory=list)

    @classmethod
    def make(cls, tokens: Sequence, pending: Pending, depth: int, traced: bool) -> Plan:
        """Finds every video and the text that follows.

        Args:
            tokens: the sequence with all features in place.
            depth: decoder layers.

        Raises ValueError if placeholders and videos do not match, or a prompt ends inside a video.
        """
        assert pending.encoding is not None
        encoding, device = pending.encoding, tokens.mask.device
        where = pending.where.to(device)
        copies = _copies(int(where.sum()), encoding.videos)
        plan = cls(encoding.pipeline.stages(depth), [], [], [], [])
        if traced:
            compression = [{"method": m.name, **m.settings()} for m in encoding.pipeline]
            length = tokens.length
            plan.prompt = Prompt([], length, length, 0.0, encoding.seconds, compression, encoding.head)
            plan.prompt.video_tokens = copies * sum(video.tokens for video in encoding.videos)
        first = following = 0
        for row in range(where.shape[0]):
            if row % copies:
                following = first  # beams and return sequences of one sample share its videos
            else:
                first = following
            following = plan._find_videos(row, where[row].nonzero().squeeze(1), encoding.videos, following)
            plan._find_text(row, tokens.mask[row], where[row], pending)
        if any(video.may_lose(plan.last[video.row]) for video in plan.followed):
            raise ValueError(
                "the prompt ends inside a video: its last token, from which the answer begins, may be removed; put at "
                "least one token behind the video (a chat template does)"
            )
        if "frame_features" in encoding.pipeline.needs:
            plan._add_frame_features(tokens)
        if "first_look" in encoding.pipeline.needs and any(map(plan._is_reduced, plan.followed)):
            plan.looks, plan.assistant = encoding.pipeline.looks(depth), encoding.assistant
        if any(
            encoding.pipeline.stored(v.grid, depth) != encoding.pipeline.lengths(v.grid, depth) for v in encoding.videos
        ):
            plan.evictions = encoding.pipeline.evictions(depth)
        return plan

    def carry_out(self, site: Site, tokens: Sequence, view: LayerView | None = None) -> tuple[Sequence, Tensor] | None:
        """Asks the method at `site`, if there is one, about every video and shortens the sequence.

        Args:
            view: the layer's own modules and input, where the site is a decoder layer.

        Returns:
            The sequence and [B, n], the column each of its tokens came from; None if nothing was removed or merged.

        Raises ValueError if a video's values are not finite.
        """
        if site not in self.stages:
            return None
        site, method = next(stage for stage in self.stages.items() if stage[0] == site)  # which also knows its number
        started = 0.0 if self.prompt is None else time.perf_counter()
        self._to(tokens.mask.device)
        stays, merged, changed = tokens.mask.clone(), [], False
        self.taken = []
        renumbered = [False] * stays.shape[0]
        shared: dict[int, tuple[Reduction, Tensor | None]] = {}  # beams of a sample are the same, and decided once
        for video in self.followed:
            if video.number not in shared:
                features = tokens.embeds[video.row, video.places]
                reduction = self._decide(method, site, video, features, view)
                new = None if reduction.slot is None else reduction.apply(features)
                shared[video.number] = reduction, new
            reduction, new = shared[video.number]
            video.notes[id(method)] = {**video.notes.get(id(method), {}), **reduction.notes}
            self.taken.append((video.row, video.places, reduction))
            stays[video.row, video.places] = stays[video.row, video.newlines] = False
            video.reduce(reduction.keep)
            stays[video.row, video.places] = stays[video.row, video.newlines] = True
            if view is None:
                video.entered = len(reduction)
            if new is not None:
                merged.append((video.row, video.places, new))
            changed |= not reduction.is_identity
            renumbered[video.row] |= method.positions == "renumber" and not reduction.is_identity
        result = self._shorten(tokens, stays, merged, renumbered) if changed else None
        if self.prompt is not None:
            synchronise(tokens.mask.device)
            seconds = time.perf_counter() - started
            self.prompt.seconds += seconds
            self.prompt.inner_seconds += 0.0 if view is None else seconds
        return result

    def narrow(self, features: Tensor, row_of: Tensor) -> Tensor:
        """Other features of the visual tokens, merged with the same weights as the tokens at the last site.

        Args:
            features: [V, C] of all visual tokens of all rows.
            row_of: [B, L] the row of `features` of every column of the sequence before that site.
        """
        for row, columns, reduction in self.taken:
            if reduction.slot is not None:
                mine = row_of[row, columns].to(features.device)
                features = features.index_copy(0, mine[reduction.keep], reduction.apply(features[mine]))
        return features

    def marks(self, tokens: Sequence) -> Tensor | None:
        """[B, n, 2] whose tokens the columns of a sequence hold, as `CachedPrefix.marks`; None if nothing will ever be
        evicted."""
        if not self.evictions:
            return None
        marks = torch.full((*tokens.mask.shape, 2), -1)
        for video in self.followed:
            for columns, places in ((video.places, video.index), (video.newlines, -1 - video.lines)):
                marks[video.row, columns.cpu(), 0] = video.number
                marks[video.row, columns.cpu(), 1] = places.cpu()
        return marks

    def record(self, trace: Trace, lengths: list[int]) -> None:
        """Ends the record of a prompt, over which the decoder's layers ran with so many tokens."""
        if self.prompt is not None:
            self.prompt.layer_lengths = lengths
            self.prompt.length_after = lengths[0]
            trace.prompts.append(self.prompt)

    # -- where things are --------------------------------------------------------------------------------------------
    def _find_videos(self, row: int, places: Tensor, videos: list[EncodedVideo], following: int) -> int:
        """Notes the videos of a row whose placeholders are at `places`; the number of the next row's first one."""
        found = places.numel()
        while places.numel():
            if following == len(videos) or places.numel() < videos[following].placeholders:
                raise ValueError(
                    f"row {row} has {found} video placeholders, which is no whole number of its "
                    f"videos ({[v.placeholders for v in videos]} placeholders each); a truncated prompt?"
                )
            video = videos[following]
            mine, places = places.tensor_split([video.placeholders])
            own, newlines = mine, mine[:0]
            if video.line:
                lines = mine.view(-1, video.line + 1)
                own, newlines = lines[:, :-1].flatten(), lines[:, -1]
            index = torch.arange(video.tokens, device=mine.device)
            line = torch.arange(video.newlines, device=mine.device)
            self.followed.append(Followed(row, following, video, own, index, newlines, line, video.tokens))
            following += 1
        return following

    def _add_frame_features(self, tokens: Sequence) -> None:
        """Where no pooling head gave any: the mean of each frame's tokens, FastVID's rule for towers without one."""
        completed: dict[int, EncodedVideo] = {}
        for video in self.followed:
            if "frame_features" in video.video.signals:
                continue
            if video.number not in completed:
                means = mean_tokens(tokens.embeds[video.row, video.places], video.video.grid[0])
                signals = {**video.video.signals, "frame_features": means}
                completed[video.number] = replace(video.video, signals=signals)
            video.video = completed[video.number]

    def _is_reduced(self, video: Followed) -> bool:
        """Whether something of it is to go before the LLM."""
        site, n = Site.projector(), video.entered
        method = self.stages.get(site)
        return method is not None and (method.loose or method.count(site, video.video.grid, n, n) < n)

    def _find_text(self, row: int, real: Tensor, video: Tensor, pending: Pending) -> None:
        """Notes the text of a row after its last video."""
        column = torch.arange(len(real), device=real.device)
        real = real & (column < pending.limit)
        text = real & (column > (column * video).amax())
        if pending.images is not None:
            text &= ~pending.images[row].to(text.device)
        found = text.nonzero().squeeze(1)
        last = (column * real).amax()[None]
        if not found.numel():
            self.textless.append(row)
        self.text.append(found if found.numel() else last)
        self.last.append(last)

    def _shorten(
        self, tokens: Sequence, stays: Tensor, merged: list[tuple[int, Tensor, Tensor]], renumber: list[bool]
    ) -> tuple[Sequence, Tensor]:
        """The sequence of the columns that stay, merged tokens in place; everything that is followed moves along."""
        embeds = tokens.embeds
        if merged:
            row = torch.cat([torch.full_like(columns, r) for r, columns, _ in merged])
            column = torch.cat([columns for _, columns, _ in merged])
            embeds = embeds.index_put((row, column), torch.cat([new for _, _, new in merged]))
        columns = [stays[row].nonzero().squeeze(1) for row in range(stays.shape[0])]
        shorter, index = replace(tokens, embeds=embeds).shortened(columns, renumber)
        # what is gone (a video token that stood in for text) is followed by the row's last survivor
        moved = torch.full_like(tokens.mask, shorter.length - 1, dtype=torch.long)
        row, column = shorter.mask.nonzero(as_tuple=True)
        moved[row, index[row, column]] = column
        for video in self.followed:
            video.places, video.newlines = moved[video.row, video.places], moved[video.row, video.newlines]
        self.text = [moved[row, columns] for row, columns in enumerate(self.text)]
        self.last = [moved[row, column] for row, column in enumerate(self.last)]
        return shorter, index

    def _to(self, device: torch.device) -> None:
        """Moves along with a decoder that is spread over devices."""
        for video in self.followed:
            video.to(device)
        self.text, self.last = [t.to(device) for t in self.text], [t.to(device) for t in self.last]

    # -- one video at one site ---------------------------------------------------------------------------------------
    def _decide(
        self, method: Method, site: Site, video: Followed, features: Tensor, view: LayerView | None
    ) -> Reduction:
        """The decision for one video, recorded."""
        if self.prompt is None:
            return self._ask(method, site, video, features, view)
        synchronise(features.device)
        start = time.perf_counter()
        reduction = self._ask(method, site, video, features, view)
        synchronise(features.device)
        step = Step(
            row=video.row,
            video=video.number,
            site=site,
            method=method.name,
            grid=video.video.grid,
            before=len(features),
            after=len(reduction),
            newlines=int(video.ends(reduction.keep).sum()),
            seconds=time.perf_counter() - start,
            reduction=reduction,
        )
        self.prompt.steps.append(step)
        return reduction

    def _ask(self, method: Method, site: Site, video: Followed, features: Tensor, view: LayerView | None) -> Reduction:
        notes = video.notes.get(id(method), {})
        if method.rests(site, notes):
            return Reduction.identity(len(features), features.device)
        signals = self._tower_signals(method, video, features)
        if view is not None:
            signals |= self._decoder_signals(method, video, view)
        name = "projector output" if view is None else f"input of {site}"
        _refuse_nonfinite({name: features, **signals}, f"video {video.number} (row {video.row})", view is not None)
        index = None if view is None else video.index
        seen = VideoTokens(features.detach(), video.video.grid, index, signals, notes, video.entered)
        return method.decide(seen, site)

    def _tower_signals(self, method: Method, video: Followed, features: Tensor) -> dict[str, Tensor]:
        """What the vision tower gave, of the tokens that are left."""
        signals = {}
        for name in method.needs & video.video.signals.keys():
            signal = video.video.signals[name].to(features.device)
            signals[name] = signal if name == "frame_features" else signal.flatten(0, 1)[video.index]
        return signals

    def _decoder_signals(self, method: Method, video: Followed, view: LayerView) -> dict[str, Tensor]:
        if video.row in self.textless and method.needs & DECODER_SIGNALS:
            warnings.warn(
                f"the prompt has no text after its last video, by which {method.name} judges relevance; its last token "
                "stands in for it. Put the question after the video",
                stacklevel=2,
            )
        signals = view.signals(method.needs, video.row, video.places, self.text[video.row], self.last[video.row])
        # where a decoder is spread over devices, its layer's modules may live on another one than its input so far
        return {name: signal.to(video.places.device) for name, signal in signals.items()}


def _copies(found: int, videos: list[EncodedVideo]) -> int:
    """How often every sample was repeated (beams, num_return_sequences)."""
    expected = sum(v.placeholders for v in videos)
    if not expected or not found or found % expected:
        raise ValueError(
            f"the prompt holds {found} video placeholders, its {len(videos)} videos need {expected} (a newline "
            "token each included); was it tokenised for other frames, truncated, or cut into prefill chunks?"
        )
    return found // expected


def _refuse_nonfinite(values: dict[str, Tensor], whose: str, inside: bool) -> None:
    """ValueError that names the tensor holding NaN or inf; one wait for the device if all is well."""
    finite = torch.stack([v.isfinite().all() for v in values.values()])
    if not finite.all():
        bad = [name for name, ok in zip(values, finite.tolist(), strict=True) if not ok]
        raise ValueError(
            f"{' and '.join(bad)} of {whose} holds NaN or inf; tokens cannot be compared. "
            f"Look at the input frames, and at the dtype of the {'decoder' if inside else 'vision tower'} (fp16 "
            "overflows where bf16 does not)"
        )
