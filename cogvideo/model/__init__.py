"""The dual-channel transformer: configuration, masks, attention, blocks, cache, initialisation."""
