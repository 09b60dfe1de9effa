"""The papers' tables as commands: `impart-hf-reproduce`."""
