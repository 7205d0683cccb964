"""A compressed model under torch.compile: the same answers, and no end of recompilations. Code is traced, not built."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

import pytest
import torch
from tiny import ONE, compress, generate, llava, llava_inputs
from torch._dynamo.testing import CompileCounter


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize("method, first", [("infomerge", "compile"), ("hieravid", "compress")])
def test_a_compiled_model_is_compressed(method, first):
    model, prompts = llava(layers=4), [llava_inputs([ONE], seed=seed) for seed in (0, 1, 2)]
    with compress(model, method) as handle:
        expected = [generate(model, prompt, 4) for prompt in prompts]
        lengths = handle.trace.last.layer_lengths
    counter = CompileCounter()
    forward = model.forward
    if first == "compile":
        model.forward = torch.compile(forward, backend=counter)
    with compress(model, method) as handle:
        if first == "compress":
            model.forward = torch.compile(forward, backend=counter)
        for prompt, want in zip(prompts, expected, strict=True):
            before = counter.frame_count
            got = generate(model, prompt, 4)
            assert torch.equal(got.sequences, want.sequences)
            assert handle.trace.last.layer_lengths == lengths
            for a, b in zip(got.logits, want.logits, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert counter.frame_count == before > 0  # nothing new for a third prompt of the same shape
    inputs = prompts[0]
    with torch.no_grad():
        compiled, model.forward = model.forward, forward
        plain = model(**inputs).logits
        torch.testing.assert_close(compiled(**inputs).logits, plain, atol=1e-4, rtol=1e-4)


GRAPHS = {"fastvid": 17, "unified": 33}
"""Graphs of four decoder layers for prompts of any length (docs/benchmarks.md)."""


@pytest.mark.parametrize("method", GRAPHS)
@torch._dynamo.config.patch(recompile_limit=64)
def test_prompts_of_many_lengths_compile_a_few_times(method, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    seen = importlib.import_module("compile_report").graphs(method, 3)
    assert seen[-1] == seen[1] <= GRAPHS[method] + 8, seen  # lengths have become symbols; 8 for other versions


def test_a_decoder_is_one_graph_where_nothing_acts_in_its_layers():
    graphs = {}
    for method in (None, "fastvid"):
        torch._dynamo.reset()
        model, counter = llava(layers=4), CompileCounter()
        with compress(model, method) if method else contextlib.nullcontext():
            decoder = model.model.language_model
            decoder.forward = torch.compile(decoder.forward, backend=counter, dynamic=True)
            generate(model, llava_inputs([ONE]), 4)
        graphs[method] = counter.frame_count
    # Two for a prompt, whose positions the rotary embedding is told apart, and one for each of the others.
    assert graphs["fastvid"] <= graphs[None] + 2, graphs
