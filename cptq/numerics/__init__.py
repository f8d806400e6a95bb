"""Pure functions of tensors: grids, sweeps, correlations, packing. Imports only torch."""
