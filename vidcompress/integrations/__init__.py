"""Programs that vidcompress plugs into."""
