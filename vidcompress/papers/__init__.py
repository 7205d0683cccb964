"""What three papers published, and what was measured here, side by side: behind `vidcompress table`."""
