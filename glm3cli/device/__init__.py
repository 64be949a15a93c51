"""The one place that knows which chip we run on."""
