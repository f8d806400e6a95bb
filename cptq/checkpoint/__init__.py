"""Read checkpoints: their files, their layers in forward order, their decision units."""
