"""Questions about procedurally rendered clips: an instrument for regressions and coarse comparison, not a benchmark.

A clip is 24 frames of one to four scenes with hard cuts of uneven length: up to five coloured shapes each, small ones
among them, moving, resting or passing before one another on textured and panning backgrounds, and in most clips a digit
that flashes for a frame or two. Eleven kinds of questions ask what a good compression must not lose. Two sets of clips
ship: see frozen.py.
"""

from vidcompress.eval.tinyqa.questions import TYPES, Question, questions_about
from vidcompress.eval.tinyqa.render import render
from vidcompress.eval.tinyqa.scenes import FRAMES, SIDE, Story, invent

__all__ = ["FRAMES", "SIDE", "TYPES", "Question", "Story", "invent", "questions_about", "render"]
