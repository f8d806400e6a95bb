"""What is in a checkpoint: its files, its layers in forward order, its decision units."""
