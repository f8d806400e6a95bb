"""Directories that stock tools load: written whole, verified in another process, then renamed."""
