"""The machine around the program: files written whole, signals, memory, installed versions.

Begin with `files`. Everything else may import this room; it imports nothing of ours but `errors`,
and neither torch nor a vendor's package.
"""
