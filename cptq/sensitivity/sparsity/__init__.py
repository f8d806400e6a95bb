"""How sparse the weights and activations of a model are and can become: `--sparsity-analysis`.

Each file measures one thing and returns plain values for JSON. Nothing here feeds a plan but the
outlier ratios (`allocation.profiles.owl`).
"""
