"""Reads files of every format as chunks of rows, in bounded memory.

Begin with `sources`: `read_chunks` reads one file, or a pipe, in its format. `tables` reads parquet
and Arrow, `json_array` the elements of a JSON array. `chunks` is what all of them yield:
consecutive rows that a worker encodes together. Nothing here deals with tokens or with what rows
mean.
"""
