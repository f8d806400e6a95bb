"""What flows through a model: token batches, replay from block to block, samples."""
