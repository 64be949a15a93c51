"""Writes the files of a run of preprocess, and resumes a run that was killed.

Begin with `write`: it opens the `output`, lets the run append its documents, and completes the
files. The output saves a `note` of how far it is, and leaves `records` of what it wrote. `packing`
puts several samples into one sequence, and `statistics` describes the result. The pairs of files
themselves are written by `data.indexed`.
"""
