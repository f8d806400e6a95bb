"""Validate scores: choose pairs to measure, and measure how well scores rank them."""
