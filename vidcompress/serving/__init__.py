"""Compressed video-LLMs in vLLM: the plugin that vLLM loads by itself once vidcompress is installed beside it."""

from __future__ import annotations


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in every process. Raises RuntimeError as `plugin.install`."""
    from vidcompress.serving.plugin import install

    install()
