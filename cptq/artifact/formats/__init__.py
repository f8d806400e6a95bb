"""How compressed layers are stored, one file per format."""
