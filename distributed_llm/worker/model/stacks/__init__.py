"""Encoder-decoders: both stacks of layers as one list, their attention, and steps through them."""
