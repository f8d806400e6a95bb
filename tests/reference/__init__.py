"""Slow, readable truths that the fast code is compared with."""
