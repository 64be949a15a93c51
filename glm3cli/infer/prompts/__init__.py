"""`--prompts-file`: prompts of a file, read, continued and written as a stream.

Begin with `run.continue_file`. `lines` reads the file, and says which of its lines are bad before a
model is loaded; `fields` reads the options of a line. `stream` keeps the engines of all ranks busy
with the lines, of which it holds a bounded number. `records` appends results to --output in the
order of the lines, and finds out where --resume goes on.
"""
