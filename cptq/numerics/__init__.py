"""Pure tensors: grids, sweeps, subspaces, packing. Knows only torch."""
