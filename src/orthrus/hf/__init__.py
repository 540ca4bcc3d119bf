"""The transformers interface: Auto classes that know our folders, and `generate` with its arguments."""
