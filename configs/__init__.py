"""One YAML per method: its default settings and presets, each with the paper's words for the value."""
