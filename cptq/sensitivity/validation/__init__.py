"""Is a score any good? Pairs to measure the truth of, and how well a score ranks them."""
