"""Reads files of every format as chunks of rows, in bounded memory.

Begin with `inputs`, which reads all files of a run, or a part of them. `sources` reads one file, or
a pipe, in its format. `csv_rows` reads CSV and TSV, `json_array` (with `json_recovery`) the
elements of a JSON array, and `tables` (with `arrow_values`) parquet and Arrow. `unpacked` unpacks
gzip, zstd, bzip2 and xz, and `json_text` parses every JSON text.

All of them yield `chunks`: consecutive rows that a worker encodes together. A row that can't be
parsed is a `BadRow` (`bad_rows`) among the others, and reading goes on behind it. A part of a file
that can't be read is a `Damage`, which says what share of the file is lost.

Nothing here deals with tokens or with what rows mean.
"""
