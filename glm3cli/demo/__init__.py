"""The whole chain at toy size, with its own bundled data."""
