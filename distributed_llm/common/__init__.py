"""What coordinator, workers and clients share: messages, codec, transport, settings, errors."""
