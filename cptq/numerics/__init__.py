"""Pure functions of tensors: grids, sweeps, subspaces, packing."""
